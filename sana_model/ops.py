"""The ops that the networks are written in terms of, as one value: a network computes with whatever `Ops` it is given.

`REFERENCE_OPS` is plain PyTorch. `sana_model.plan` makes others, in which each op is bound to the kernel that was chosen for
it before the first step.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sana_kernels.cross_attention.reference import cross_attention
from sana_kernels.linear_attention.reference import linear_attention
from sana_kernels.mix_ffn.reference import mix_ffn
from sana_kernels.modulate.reference import gate_residual, modulate


@dataclass(frozen=True)
class Ops:
    """Signatures as in `sana_kernels`, without `backend`."""

    linear_attention: Callable
    modulate: Callable
    gate_residual: Callable
    cross_attention: Callable
    mix_ffn: Callable


REFERENCE_OPS = Ops(linear_attention, modulate, gate_residual, cross_attention, mix_ffn)
