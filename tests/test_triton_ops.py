"""What the registry says of the Triton kernels, on machines with Triton and without."""

import subprocess
import sys

import pytest
import torch

from sana_bench.cases import cases
from sana_kernels import backend

KERNELS = {op: kernel for op in backend.OPS for kernel in backend.kernels(op) if kernel.backend == "triton"}


def test_every_call_of_sana_is_accepted():
    assert len(KERNELS) == 10
    for op, kernel in KERNELS.items():
        for case in cases(op):
            assert kernel.accepts(*case.arguments("bf16", "meta")) is None, case


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


HEADS = meta(1, 5, 3, 72, dtype=torch.float32)


@pytest.mark.parametrize(
    ("op", "args", "sentence"),
    [
        ("modulate", (meta(1, 3, 16385), None, None, 1e-6), "up to 16384 channels, not 16385"),
        ("quantize", (meta(2, 8, dtype=torch.float64), torch.int8), "not torch.float64"),
        ("linear_attention", (HEADS, HEADS, HEADS, None, None, 1e-5, 1e-15), "up to 64 in torch.float32, not 72"),
        ("linear_attention_from", (meta(1, 5, 64), None, meta(72, 64), None, 24, 1e-15), "16, 32 and 64, not 24"),
        ("gemm", (meta(1, 5, 64), None, meta(2, 4, 16, 16), *[None] * 5, torch.bfloat16), "rows .N, K., not packed"),
        ("gemm", (meta(1, 2**20, 64), None, meta(2048, 64), *[None] * 5, torch.bfloat16), "fewer than 2³¹ elements"),
        ("depthwise_glu_quantized", (meta(1, 4, 8, dtype=torch.float32), 2, 2, None, None, torch.int8), "not of float32"),
    ],
)  # fmt: skip
def test_refusals_are_sentences(op, args, sentence):
    with pytest.raises(AssertionError, match=sentence):
        assert KERNELS[op].accepts(*args) is None, KERNELS[op].accepts(*args)


def test_importing_the_ops_imports_no_triton():
    script = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import torch, sana_kernels
from sana_kernels import backend
x, row = torch.randn(1, 3, 8), torch.randn(1, 8)
sana_kernels.gate_residual(x, x, row)
print([name for name in sys.modules if name.startswith("sana_kernels.") and name.endswith("triton")])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
