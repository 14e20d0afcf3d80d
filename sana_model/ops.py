"""The ops that the networks are written in terms of, as one value: a network computes with whatever `Ops` it is given.

`REFERENCE_OPS` is plain PyTorch. `sana_model.plan` makes others, in which each op is bound to the kernel that was chosen for
it before the first step.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import sana_kernels


@dataclass(frozen=True)
class Ops:
    """Signatures as in `sana_kernels`, without `backend`."""

    gemm: Callable
    quantize: Callable
    linear_attention: Callable
    modulate: Callable
    gate_residual: Callable
    cross_attention: Callable
    mix_ffn: Callable


REFERENCE_OPS = Ops(**{f.name: partial(getattr(sana_kernels, f.name), backend="reference") for f in fields(Ops)})
