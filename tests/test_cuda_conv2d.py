"""The decoder's CUDA kernels on the emulator, beside the library's convolution on the CPU; and the whole decoder of them."""

from dataclasses import replace

import pytest
import torch
from compare import assert_close, assert_kernel
from convolutions import ACTIVATIONS, Case, upsample_inputs
from models import SMALL
from test_conv2d import CASES
from test_rms_norm import NORM_SHAPES, norm_inputs
from variants import DTYPES, double

from sana_kernels import backend
from sana_kernels.conv2d import cuda, reference
from sana_model.autoencoder.packed import PackedConv2d, pack_autoencoder
from sana_model.ops import REFERENCE_OPS, ops_on
from sana_model.weights.random_weights import random_model
from tests import emulated


@pytest.fixture(scope="module")
def module():
    return emulated.cuda_module()


def check_rms_norm(module, shape, dtype, activation, orders=emulated.ORDERS):
    args = *norm_inputs(shape, dtype, residual=activation != "relu"), activation, 1e-5
    (out,) = emulated.run(module, cuda.rms_norm, *args, orders=orders)
    assert_kernel(out, reference.rms_norm(*args), reference.rms_norm(*double(*args)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm(module, shape, dtype, activation):
    check_rms_norm(module, shape, dtype, activation)


def check_upsample(module, shape, dtype, orders=emulated.ORDERS):
    """Against the library's phases and fp64 additions."""
    x, weight, bias = upsample_inputs(*shape, dtype)
    folded = reference.fold_upsample(weight)
    args = x, folded, None, list(folded.shape), bias, [0, 0, x.shape[1], x.shape[1]], None
    assert cuda.accepts_upsample(*args) is None
    (out,) = emulated.run(module, cuda.upsample, *args, orders=orders)
    phases = reference.split_phases(reference.convolve_phases(x, folded).permute(0, 3, 1, 2).double(), 2)
    assert_kernel(out, reference.upsample(*args), reference.shuffle(phases, *double(x, bias)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64, 32), (2, 3, 5, 32, 32), (1, 7, 2, 128, 64), (2, 4, 3, 48, 24)], ids=str
)
def test_upsample(module, shape, dtype):
    check_upsample(module, shape, dtype)


def test_a_module_whose_kernels_load_says_nothing(module):
    assert module.refusal() is None


def every_second(x: torch.Tensor) -> torch.Tensor:
    """The same vector, with others between its values."""
    return torch.stack((x, torch.full_like(x, 9)), 1).flatten()[::2]


def test_vectors_with_gaps(module):
    x, weight, bias, residual = norm_inputs((2, 5, 3, 40), torch.bfloat16, residual=True)
    args = x, every_second(weight), every_second(bias), residual, "none", 1e-5
    (out,) = emulated.run(module, cuda.rms_norm, *args)
    assert torch.equal(out, *emulated.run(module, cuda.rms_norm, x, weight, bias, residual, "none", 1e-5))
    x, weight, bias = upsample_inputs(1, 3, 5, 32, 32, torch.bfloat16)
    folded = reference.fold_upsample(weight)
    rest = [0, 0, 3, 3], None
    (out,) = emulated.run(module, cuda.upsample, x, folded, None, list(folded.shape), every_second(bias), *rest)
    assert torch.equal(out, *emulated.run(module, cuda.upsample, x, folded, None, list(folded.shape), bias, *rest))


def conv2d_args(case: Case, dtype: torch.dtype) -> tuple:
    """Arguments of the op by position."""
    (x, weight), around = case.make(dtype)
    norm, before = around.get("norm", (None, None)), around.get("input_norm", (None, None))
    band = [0, 0, -(-case.H // case.stride), case.H]
    return (
        x, weight, None, list(weight.shape), around.get("bias"), case.stride, case.activation, *norm,
        around.get("residual"), *before, around.get("input_activation", "none"), 1e-5, band, None, None,
    )  # fmt: skip


def by_parts(
    x, weight, scale, shape, bias, stride, activation, norm_weight, norm_bias, residual, *rest
):  # fmt: skip
    """The reference, the convolution rounded before the bias is added: so NVIDIA's library does it, and CPUs do not."""
    *before, eps, band, above, residual_above = rest
    y = reference.conv2d(
        x, weight, None, shape, None, stride, "none", None, None, None, *before, eps, band, above, residual_above
    )
    y = reference.ACTIVATIONS[activation](y if bias is None else y + bias)
    if norm_weight is not None:
        return reference.rms_norm(y, norm_weight, norm_bias, residual, "none", eps)
    return y if residual is None else y + residual


def check_conv2d(module, case, dtype, orders=emulated.ORDERS):
    args = conv2d_args(case, dtype)
    assert cuda.accepts_conv2d(*args) is None
    (out,) = emulated.run(module, cuda.conv2d, *args, orders=orders)
    assert out.is_contiguous()
    assert_kernel(out, by_parts(*args), reference.conv2d(*double(*args)))


# Two kernels after the convolution; a residual alone; nothing at all, and so no kernel.
MORE = [Case(2, 5, 9, 50, 24, activation="relu", around="bias norm residual"), Case(2, 9, 7, 16, 40, around="residual")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES[1:4], *CASES[5:7], CASES[8], *MORE, Case(2, 9, 7, 16, 40)], ids=str)
def test_conv2d(module, case, dtype):
    check_conv2d(module, case, dtype)


def test_what_conv2d_does_not_take():
    x, weight, *rest = conv2d_args(CASES[2], torch.float32)
    assert "not torch.int8" in cuda.accepts_conv2d(x, weight.char(), torch.ones(128), *rest[1:])
    assert "whole images" in cuda.accepts_conv2d(x, weight, *rest[:-3], [0, 0, 8, 33], None, None)
    assert "not in two" in cuda.accepts_conv2d(x, weight, *rest[:-1], x)
    assert "not in two" in cuda.accepts_conv2d(x, weight, *rest[:-2], x, None)
    assert "not packed for a CPU" in cuda.accepts_conv2d(x, weight.flatten(1), *rest)


OF_CUDA = ("conv2d", "upsample", "rms_norm")


@torch.inference_mode()
@pytest.mark.parametrize("norm", ["rms_norm", "batch_norm"])
def test_the_decoder(module, monkeypatch, norm):
    """Packed for CUDA, and computed by its kernels: the picture of the reference. Without one of the shortcuts, not."""
    stages = len(SMALL.autoencoder.widths)
    config = replace(SMALL, autoencoder=replace(SMALL.autoencoder, decoder_norms=(norm,) * stages))
    packed, plain = (random_model(config, seed=1, dtype=torch.float32).autoencoder for _ in range(2))
    pack_autoencoder(packed, None, lambda op, wide: "cuda" if op in OF_CUDA else "reference")
    convolutions = [m for m in packed.decoder.modules() if isinstance(m, PackedConv2d)]
    assert convolutions and all(m.values.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    assert not any(isinstance(m, torch.nn.Conv2d) and m.groups == 1 and m.kernel_size == (3, 3)
                   for m in packed.decoder.modules())  # fmt: skip
    monkeypatch.setattr(backend, "_objection", lambda kernel, args, device: kernel.accepts(*args))
    kernels = {op: getattr(ops_on("cuda"), op) for op in OF_CUDA}
    latents = torch.randn(2, config.autoencoder.latent_channels, 2, 3)
    expected = plain.decode(latents)
    with emulated.device(module, seed=2):
        packed.use(replace(REFERENCE_OPS, **kernels))
        assert_close(packed.decode(latents), expected, of_rms=1e-5)
        packed.use(replace(REFERENCE_OPS, **kernels | {"conv2d": lambda *args, residual=None, **kwargs:
                                                       kernels["conv2d"](*args, **kwargs)}))  # fmt: skip
        with pytest.raises(AssertionError):
            assert_close(packed.decode(latents), expected, of_rms=1e-5)


def test_what_upsample_does_not_take():
    weight = torch.zeros(4 * 12, 12, 2, 2)
    x, whole = torch.zeros(1, 2, 2, 12), [0, 0, 2, 2]
    assert "multiples of 8 output channels" in cuda.accepts_upsample(x, weight, None, [48, 12, 2, 2], None, whole, None)
    assert "whole images" in cuda.accepts_upsample(x, weight, None, [48, 12, 2, 2], None, [0, 0, 1, 2], None)
    assert "not in two" in cuda.accepts_upsample(x, weight, None, [48, 12, 2, 2], None, whole, x)
    assert "not torch.int8" in cuda.accepts_upsample(
        x, weight.char(), torch.ones(48), [48, 12, 2, 2], None, whole, None
    )


NORM, UPSAMPLE = "csrc/conv2d/rms_norm.cu", "csrc/conv2d/upsample_shuffle.cu"
DEFECTS = {
    "norm: a row's neighbour joins in": ((NORM, "offset = lanes / 2; offset > 0", "offset = lanes; offset > 0"),),
    "norm: the sum of one lane": ((NORM, "sum += __shfl_xor_sync(0xffffffffu, sum, offset)", "sum += 0"),),
    "norm: no mask for rows": ((NORM, "bool inside = row < p.rows;", "bool inside = true;"),),
    "norm: one where none is asked for": ((NORM, "if (p.weight != nullptr) {", "if (true) {"),),
    "norm: no bias without a weight": ((NORM, "load_or(0, p.bias, c, bias)", "load_or(0, p.weight, c, bias)"),),
    "norm: no activation": ((NORM, "bias[i], p.activation)", "bias[i], Activation::none)"),),
    "upsample: phase row off by one": ((UPSAMPLE, "(p.H + 1) + h + dy)", "(p.H + 1) + h + 1 - dy)"),),
    "upsample: phases crossed": ((UPSAMPLE, "dy = phase / 2, dx = phase % 2", "dy = phase % 2, dx = phase / 2"),),
    "upsample: shortcut of the first phase for all": ((UPSAMPLE, "(4 * i + phase) / Repeats", "4 * i / Repeats"),),
    "upsample: no mask": ((UPSAMPLE, "if (index >= p.threads) return;", ""),),
}  # fmt: skip
SMALLER = tuple(
    (path, "  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, on));\n"
     "  return cuda_status(run<__nv_bfloat16>(p, on));", "  return Status::bad_dtype;")
    for path in (NORM, UPSAMPLE)
)  # fmt: skip


def check_all(module, orders=(0, 1)):
    check_rms_norm(module, (2, 25, 13, 128), torch.float32, "silu", orders=orders)
    check_rms_norm(module, (3, 11, 15, 50), torch.float32, "relu", orders=orders)
    check_upsample(module, (2, 3, 5, 32, 16), torch.float32, orders=orders)
    check_conv2d(module, Case(1, 9, 7, 16, 40, activation="silu", around="bias"), torch.float32, orders=orders)


@pytest.fixture(scope="module")
def defective():
    return emulated.defective(DEFECTS, *SMALLER)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defective, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(defective[defect])


def test_the_cases_of_the_defects_pass_without_one(module):
    check_all(module)
