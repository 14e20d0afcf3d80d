"""The kernels under pytest-benchmark: `pytest bench --benchmark-only`. Inputs are cold, as in `sana bench kernels`.

A kernel that fails its check against fp64 fails its benchmark.
"""

import itertools

import pytest
import torch

from sana_bench import check
from sana_bench.cases import CASES
from sana_bench.kernels import cold_inputs, expected, prepared, runner, values
from sana_kernels.backend import BACKENDS, why_not


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case, backend, benchmark):
    device = torch.device("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")
    inputs = cold_inputs(case, "bf16" if "bf16" in case.precisions else case.precisions[0], device, seed=0)
    reason = why_not(case.op, backend, *inputs[0])
    if reason is not None:
        pytest.skip(reason)
    call, own = runner(case.op, backend), [prepared(case.op, backend, given) for given in inputs]
    plain, oracle = expected(case.op, inputs[0])
    checked = check.kernel_check(values(case.op, call(*own[0])), values(case.op, plain), oracle)
    assert checked["passed"], checked
    turns = itertools.cycle(own)

    def once() -> None:
        call(*next(turns))
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(gmac=case.macs / 1e9, **case.shape)
    benchmark.pedantic(once, rounds=20, warmup_rounds=2)
