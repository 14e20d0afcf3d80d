"""Hands tensors to the CUDA kernel in csrc/linear_attention."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float, eps: float
) -> Tensor:
    """As the reference; arguments as `_check` and `_accepts` of this package let them through."""
    module = extension("_cuda")[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Freed on return, while the kernels may still run: the memory's next user is on the same stream.
    floats = module.linear_attention_scratch(q.shape, q_norm is not None or k_norm is not None)
    scratch = torch.empty(floats, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        module.linear_attention(
            [x.data_ptr() for x in (q, k, v, out)],
            q.shape,
            [x.stride()[:3] for x in (q, k, v)],
            DTYPE_CODES[q.dtype],
            [None if w is None else (w.data_ptr(), DTYPE_CODES[w.dtype]) for w in (q_norm, k_norm)],
            norm_eps,
            eps,
            scratch.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return out
