"""multi_scale on every backend and instruction set, AMX on emulated tiles included, against fp64 and
diffusers' projection."""

import pytest
import torch
from compare import assert_close, assert_kernel
from convolutions import CPU, FLOATS, banded, of_diffusers
from variants import double, run, signed

import sana_kernels


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", CPU)
def test_multi_scale_against_fp64_and_diffusers(variant, dtype):
    projection = of_diffusers("attention_processor", "SanaMultiscaleAttentionProjection")
    for B, H, W, C, kernel in ((1, 1, 1, 32, 5), (2, 7, 33, 96, 5), (1, 33, 7, 64, 3)):
        theirs = projection(C // 3, C // 96, kernel) if C % 96 == 0 else None
        x, taps = signed(B, H, W, C, dtype=dtype), torch.randn(C, 1, kernel + 2, kernel + 2).to(dtype) / kernel
        depthwise = taps[:, :, 1:-1, 1:-1]  # in no order that a view could flatten
        grouped = torch.randn(C, 32, 1, 1).to(dtype) / 6
        y = run(variant, "multi_scale", x, depthwise, grouped)
        same = sana_kernels.multi_scale(x, depthwise, grouped, backend="reference")
        oracle = sana_kernels.multi_scale(*double(x, depthwise, grouped), backend="reference")
        assert_kernel(y, same, oracle, f"{variant} {C}")
        if theirs is not None:
            theirs = theirs.double()
            theirs.load_state_dict({"proj_in.weight": depthwise.double(), "proj_out.weight": grouped.double()})
            assert_close(oracle, theirs(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1), of_rms=1e-12)
        with pytest.raises(AssertionError):  # the groups' matrices transposed
            wrong = grouped.view(-1, 32, 32).mT.reshape(C, 32, 1, 1)
            assert_kernel(run(variant, "multi_scale", x, depthwise, wrong), same, oracle)
        parts = banded(
            x, sorted({0, 1, H // 2, H}), 1, kernel // 2,
            lambda rows, band, *_, w=(depthwise, grouped): run(variant, "multi_scale", rows, *w, band=band),
        )  # fmt: skip
        assert torch.equal(parts, y)
