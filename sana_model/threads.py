"""How many CPU threads a command computes on: PyTorch's number, which our kernels take, too."""

import torch

from sana_model.errors import UserError

MOST = 1024  # some ten thousand end the process


def use_threads(count: int | None) -> None:
    """Compute on that many threads; None leaves PyTorch's own choice. Raises UserError for a number that cannot be."""
    if count is None:
        return
    if not 1 <= count <= MOST:
        raise UserError(f"the number of threads must lie between 1 and {MOST}, not {count}")
    torch.set_num_threads(count)
