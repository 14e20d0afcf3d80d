"""`python -m sana_model` is the `sana` command."""

import sys

from sana_model.cli import main

if __name__ == "__main__":
    sys.exit(main())
