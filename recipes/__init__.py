"""How `sana-tiny` was made: data, captions and training. Run from a checkout; no part of the installed package."""

import sys
from collections.abc import Callable

from sana_model.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Run a script; what its user can put right is a line on stderr and an exit status, not a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
