"""The ops that the networks are written in terms of, as one value: a network computes with whatever `Ops` it is given.

`REFERENCE_OPS` is plain PyTorch. `sana_model.plan` makes others, in which each op is bound to the kernel that was chosen for
it before the first step.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial

import sana_kernels


@dataclass(frozen=True)
class Ops:
    """Signatures as in `sana_kernels`, without `backend`.

    `linear_attention_from` is None where no kernel fuses it: the projection then is a product like others.
    """

    gemm: Callable
    quantize: Callable
    linear_attention: Callable
    modulate: Callable
    gate_residual: Callable
    cross_attention: Callable
    mix_ffn: Callable
    depthwise_glu: Callable
    gemm_w4a16: Callable
    gemm_w4a4: Callable
    quantize_int4: Callable
    conv2d: Callable
    upsample: Callable
    multi_scale: Callable
    rms_norm: Callable
    linear_attention_from: Callable | None = None


@cache
def ops_on(backend: str) -> Ops:
    """All of them on one backend, each by itself."""
    names = (f.name for f in fields(Ops) if f.default is MISSING)
    return Ops(**{name: partial(getattr(sana_kernels, name), backend=backend) for name in names})


REFERENCE_OPS = ops_on("reference")
