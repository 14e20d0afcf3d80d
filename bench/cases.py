"""The shapes that SANA's ops are called with, shared by tests and benchmarks.

A `Case` makes the arguments of one op call by position, without `backend`, as `sana_kernels.backend` takes them: normal
values with a thousandth of outlier channels, in the strides that the networks produce. Guidance doubles the batch, so B
is 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sana_kernels.conv2d import winograd_conv2d, winograd_upsample
from sana_kernels.conv2d.reference import quantize_weight
from sana_kernels.gemm import fake_quantize
from sana_kernels.gemm.reference import quantize
from sana_kernels.quant.formats import quantize_int4
from sana_model.config import BUILT_IN
from sana_model.settings import DTYPES, PRECISIONS, QUANTIZED

OUTLIER, OUTLIER_SHARE = 30.0, 0.001
WITH_W8A8 = (*DTYPES, "w8a8")
WITH_QUANTIZED = (*DTYPES, *QUANTIZED)  # of matrix products
TRANSFORMED = {None: WITH_W8A8, torch.int8: ("w8a8",), torch.int16: ("bf16",)}
"""The precisions of convolutions by their transformed kernel's integers."""
CHAINS = {"gemm": "K", "linear_attention": "N", "linear_attention_from": "CN", "mix_ffn": "CF"}
"""Lengths of the sums in an op, by the names in a case's shape."""


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    name: str  # variant_size, such as 0.6b_1024
    shape: dict[str, int]
    macs: int  # multiply-adds
    make: Callable[["Inputs"], tuple]

    precisions: tuple[str, ...] = tuple(DTYPES)

    def arguments(self, precision: str = "bf16", device: torch.device | str = "cpu", seed: int = 0) -> tuple:
        """The same values for the same seed, whatever the device."""
        generator = torch.Generator().manual_seed(seed)
        return self.make(Inputs(PRECISIONS[precision], torch.device(device), generator, QUANTIZED.get(precision)))

    @property
    def chain(self) -> int:
        """How many values a kernel may add one by one (`check.kernel_check`)."""
        return sum(self.shape[length] for length in CHAINS.get(self.op, ""))

    def __str__(self) -> str:
        return f"{self.op}/{self.name}"


@dataclass(frozen=True)
class Inputs:
    """Draws tensors: signed, with outliers, reproducible. On "meta" they are only shapes."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator
    quantized: torch.dtype | None = None  # what `rows` makes

    def rows(self, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Operands of a matrix product: (values, None), or quantised with their scales."""
        x = self(*shape, scale=scale)
        if self.quantized is None:
            return x, None
        return fake_quantize(x, self.quantized, "") if x.is_meta else quantize(x, self.quantized)

    def kernel(self, out: int, channels: int, size: int) -> tuple[Tensor, Tensor | None]:
        """A convolution's weight (out, channels, size, size), or quantised with its scales."""
        weight = self(out, channels, size, size, scale=channels**-0.5 / size)
        if self.quantized is None:
            return weight, None
        if weight.is_meta:
            return weight.to(self.quantized), weight.new_empty(out, dtype=torch.float32)
        return quantize_weight(weight)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        x = torch.randn(shape, generator=self.generator) * scale
        columns = torch.rand(shape[-1], generator=self.generator)
        return torch.where(columns < OUTLIER_SHARE, OUTLIER * x, x).to(self.device, self.dtype)


def _quantized(plain: Case) -> Case:
    """The same op, ending in 8-bit rows."""
    return replace(plain, op=f"{plain.op}_quantized", make=lambda inputs: (*plain.make(inputs), torch.int8))


def _dit_attention(name: str, B: int, N: int, C: int, D: int = 32, normed: bool = False) -> Case:
    def make(inputs: Inputs) -> tuple:
        q, k, v = inputs(B, N, 3 * C).view(B, N, 3, C // D, D).unbind(2)
        q_norm, k_norm = (inputs(C) if normed else None for _ in range(2))
        return q, k, v, q_norm, k_norm, 1e-5, 1e-15

    return Case("linear_attention", name, {"B": B, "N": N, "H": C // D, "D": D}, 2 * B * N * C * (D + 1), make)


def _attention_from(name: str, B: int, N: int, C: int, D: int = 32) -> Case:
    def make(inputs: Inputs) -> tuple:
        return inputs(B, N, C), None, inputs(3 * C, C, scale=C**-0.5), None, D, 1e-15

    macs = B * N * C * 3 * C + 2 * B * N * C * (D + 1)
    return Case("linear_attention_from", name, {"B": B, "N": N, "C": C, "D": D}, macs, make)


def _decoder_attention(name: str, N: int, C: int, D: int = 32) -> Case:
    """The DC-AE's layout: head by head, q, k and v beside each other; two scales double the heads."""

    def make(inputs: Inputs) -> tuple:
        q, k, v = inputs(1, N, 3 * 2 * C).view(1, N, 2 * C // D, 3, D).unbind(3)
        return q, k, v, None, None, 1e-5, 1e-15

    return Case("linear_attention", name, {"B": 1, "N": N, "H": 2 * C // D, "D": D}, 2 * N * 2 * C * (D + 1), make)


def _modulate(name: str, B: int, N: int, C: int) -> Case:
    def make(inputs: Inputs) -> tuple:
        table = inputs(B, 6, C, scale=0.3)
        return inputs(B, N, C), table[:, 0], table[:, 1], 1e-6

    return Case("modulate", name, {"B": B, "N": N, "C": C}, 2 * B * N * C, make)


def _gate_residual(name: str, B: int, N: int, C: int) -> Case:
    def make(inputs: Inputs) -> tuple:
        return inputs(B, N, C), inputs(B, N, C), inputs(B, 6, C, scale=0.3)[:, 2]

    return Case("gate_residual", name, {"B": B, "N": N, "C": C}, B * N * C, make)


def _cross_attention(name: str, N: int, C: int, H: int, L: int, lengths: tuple[int, ...]) -> Case:
    """One row per length: an empty negative prompt and a caption, in a batch padded to L."""
    B = len(lengths)

    def make(inputs: Inputs) -> tuple:
        k, v = inputs(B, L, 2 * C).view(B, L, 2, H, C // H).unbind(2)
        return inputs(B, N, C).view(B, N, H, C // H), k, v, torch.tensor(lengths, device=inputs.device)

    return Case("cross_attention", name, {"B": B, "N": N, "L": L, "H": H, "D": C // H}, 2 * N * C * sum(lengths), make)


def _gemm(name: str, B: int, M: int, K: int, N: int, silu: bool = False, gated: bool = False) -> Case:
    """A 1 × 1 convolution or linear layer of the DiT: bias and SiLU as in the Mix-FFN's expansion, or gate and residual."""

    def make(inputs: Inputs) -> tuple:
        bias = inputs(N, scale=0.1) if silu else None
        gate, residual = (inputs(B, 6, N)[:, 5], inputs(B, M, N)) if gated else (None, None)
        weight = inputs.rows(N, K, scale=K**-0.5)
        return *inputs.rows(B, M, K), *weight, bias, silu, gate, residual, inputs.dtype

    return Case("gemm", name, {"B": B, "M": M, "K": K, "N": N}, B * M * K * N, make, WITH_QUANTIZED)


def _quantize_gemm(gemm: Case) -> Case:
    """The same product in 8 bits, of 16-bit rows that are quantised first."""

    def make(inputs: Inputs) -> tuple:
        _, _, *rest = gemm.make(inputs)
        return inputs(*(gemm.shape[size] for size in "BMK")), None, *rest

    return replace(gemm, name=f"{gemm.name}+quantize", make=make, precisions=tuple(QUANTIZED))


def _quantize_int4(name: str, B: int, N: int, C: int) -> Case:
    def make(inputs: Inputs) -> tuple:
        return inputs(B, N, C), 1 + inputs(C).abs()

    return Case("quantize_int4", name, {"B": B, "N": N, "C": C}, B * N * C, make)


def _gemm_w4a16(name: str, M: int, K: int, N: int) -> Case:
    """A linear layer of the text encoder, in groups of 128."""

    def make(inputs: Inputs) -> tuple:
        weight = quantize_int4(inputs(N, K, scale=K**-0.5), group=128)
        return inputs(1, M, K), *weight, None, False, None, None, inputs.dtype

    return Case("gemm_w4a16", name, {"B": 1, "M": M, "K": K, "N": N}, M * K * N, make)


def _gemm_w4a4(name: str, B: int, M: int, K: int, N: int, rank: int = 32) -> Case:
    """SVDQuant with its low-rank branch, gate and residual."""

    def make(inputs: Inputs) -> tuple:
        x, weight = quantize_int4(inputs(B, M, K)), quantize_int4(inputs(N, K, scale=K**-0.5))
        low, up = inputs(B, M, rank), inputs(N, rank, scale=rank**-0.5)
        if inputs.dtype not in (torch.float16, torch.bfloat16):
            low, up = low.bfloat16(), up.bfloat16()
        return *x, *weight, low, up, None, False, inputs(B, 6, N)[:, 5], inputs(B, M, N), inputs.dtype

    return Case("gemm_w4a4", name, {"B": B, "M": M, "K": K, "N": N}, B * M * (K + rank) * N, make)


def _quantize(name: str, B: int, N: int, C: int) -> Case:
    def make(inputs: Inputs) -> tuple:
        return inputs(B, N, C), torch.int8

    return Case("quantize", name, {"B": B, "N": N, "C": C}, B * N * C, make)


def _depthwise_glu(name: str, B: int, height: int, width: int, F: int) -> Case:
    N = height * width

    def make(inputs: Inputs) -> tuple:
        weights = inputs(2 * F, 1, 3, 3, scale=1 / 3), inputs(2 * F, scale=0.1)
        return inputs(B, N, 2 * F), height, width, *weights

    return Case("depthwise_glu", name, {"B": B, "N": N, "F": F}, B * N * 2 * F * 9, make)


def _mix_ffn(name: str, B: int, height: int, width: int, C: int, F: int) -> Case:
    N = height * width

    def make(inputs: Inputs) -> tuple:
        return (
            *inputs.rows(B, N, C), height, width, *inputs.rows(2 * F, C, scale=C**-0.5), inputs(2 * F, scale=0.1),
            inputs(2 * F, 1, 3, 3, scale=1 / 3), inputs(2 * F, scale=0.1), *inputs.rows(C, F, scale=F**-0.5), None, None,
        )  # fmt: skip

    macs = B * N * (C * 2 * F + 2 * F * 9 + F * C)
    return Case("mix_ffn", name, {"B": B, "N": N, "C": C, "F": F}, macs, make, WITH_QUANTIZED)


def _rms_norm(name: str, side: int, C: int) -> Case:
    """The end of a decoder block: norm, then the residual."""

    def make(inputs: Inputs) -> tuple:
        return inputs(1, side, side, C), inputs(C), inputs(C), inputs(1, side, side, C), "none", 1e-5

    return Case("rms_norm", name, {"H": side, "W": side, "C": C}, 2 * side * side * C, make)


def _upsample(name: str, side: int, channels: int, C: int, integers: torch.dtype | None = None) -> Case:
    """To twice `side`, from `channels` to C; the folded 3 × 3 convolution has 16 taps per pixel and channel.

    integers: those of a transformed kernel, which has 9.
    """

    def make(inputs: Inputs) -> tuple:
        if integers is not None:
            weight, scale, _ = winograd_upsample(inputs(C, channels, 3, 3, scale=channels**-0.5 / 3), integers)
        else:
            weight, scale = inputs.kernel(4 * C, channels, 2)
        return inputs(1, side, side, channels), weight, scale, list(weight.shape), inputs(C), [0, 0, side, side], None

    shape, taps = {"H": side, "W": side, "in": channels, "out": C}, 16 if integers is None else 9
    return Case("upsample", name, shape, side**2 * taps * C * channels, make, TRANSFORMED[integers])


def _conv2d(
    name: str, side: int, C: int, N: int, integers: torch.dtype | None = None, *, norm: bool = False, silu: bool = False
) -> Case:
    """64 rows, as of a band, of a decoder's block: its first convolution, with SiLU, or its second, with norm.

    integers: those of a transformed kernel.
    """
    rows, taps = min(side, 64), 9 if integers is None else 9 / 4

    def make(inputs: Inputs) -> tuple:
        if integers is None:
            weight, scale = inputs.kernel(N, C, 3)
        else:
            weight, scale, _ = winograd_conv2d(inputs(N, C, 3, 3, scale=C**-0.5 / 3), integers)
        bias = None if norm else inputs(N, scale=0.1)
        after = (inputs(N), inputs(N, scale=0.1), inputs(1, rows, side, N)) if norm else (None, None, None)
        return (
            inputs(1, rows, side, C), weight, scale, list(weight.shape), bias, 1, "silu" if silu else "none", *after, None,
            None, "none", 1e-5, [0, 0, rows, rows], None, None,
        )  # fmt: skip

    shape = {"H": rows, "W": side, "in": C, "out": N}
    return Case("conv2d", name, shape, round(rows * side * taps * C * N), make, TRANSFORMED[integers])


def _multi_scale(name: str, side: int, C: int, D: int = 32) -> Case:
    """Queries, keys and values of one stage's attention."""

    def make(inputs: Inputs) -> tuple:
        weights = inputs(3 * C, 1, 5, 5, scale=1 / 5), inputs(3 * C, D, 1, 1, scale=D**-0.5)
        return inputs(1, side, side, 3 * C), *weights, [0, 0, side, side]

    return Case("multi_scale", name, {"H": side, "W": side, "C": 3 * C}, side**2 * 3 * C * (25 + D), make)


def _published() -> list[Case]:
    """Every op of the DiTs at their native size, some in a wide bin or at 4096 px, and the decoder's at 1024 px."""
    cases = []
    for name, B, grid in (("sana-tiny", 2, (8, 8)), ("sana-0.6b", 2, (32, 32)), ("sana-1.6b", 2, (32, 32))):
        dit = BUILT_IN[name].dit
        label, N, C, F = f"{name.removeprefix('sana-')}_{32 * grid[0]}", grid[0] * grid[1], dit.hidden, dit.ffn
        cases += [
            attention := _dit_attention(label, B, N, C),
            _quantized(attention),
            _attention_from(label, B, N, C),
            modulate := _modulate(label, B, N, C),
            _quantized(modulate),
            _quantize(label, B, N, C),
            _gate_residual(label, B, N, C),
            cross := _cross_attention(label, N, C, dit.cross_heads, 60, (1, 60)),
            _quantized(cross),
            qkv := _gemm(f"{label}_qkv", B, N, C, 3 * C),
            _quantize_gemm(qkv),
            _gemm(f"{label}_out", B, N, C, C, gated=True),
            _gemm(f"{label}_expand", B, N, C, 2 * F, silu=True),
            _gemm(f"{label}_project", B, N, F, C, gated=True),
            _quantize_int4(label, B, N, C),
            _gemm_w4a4(f"{label}_out", B, N, C, C),
            _gemm_w4a4(f"{label}_project", B, N, F, C),
            glu := _depthwise_glu(label, B, *grid, F),
            _quantized(glu),
            _mix_ffn(label, B, *grid, C, F),
        ]
    small = BUILT_IN["sana-0.6b"].dit
    cases += [
        _dit_attention("sprint-0.6b_1024", 1, 1024, small.hidden, normed=True),
        _dit_attention("0.6b_768x1344", 2, 24 * 42, small.hidden),
        _dit_attention("0.6b_4096", 2, 128 * 128, small.hidden),
        _mix_ffn("0.6b_768x1344", 2, 24, 42, small.hidden, small.ffn),
    ]
    for name, M in (("sana-tiny", 16), ("sana-0.6b", 64)):
        text = BUILT_IN[name].text
        cases.append(_gemm_w4a16(f"{name.removeprefix('sana-')}_text_up", M, text.hidden, text.ffn))
    tiny = BUILT_IN["sana-tiny"].autoencoder.widths
    cases += [_rms_norm("tiny_decoder_stage0", 256, tiny[0]), _upsample("tiny_decoder_stage5", 8, tiny[5], tiny[4])]
    cases += [_conv2d("tiny_decoder_stage2", 64, tiny[2], tiny[2]), _multi_scale("tiny_decoder_stage5", 8, tiny[5])]
    widths = BUILT_IN["sana-0.6b"].autoencoder.widths
    cases += [_rms_norm(f"decoder_stage{i}_1024", 1024 >> i, widths[i]) for i in (2, 5)]
    kinds = (None, ""), (torch.int8, "_winograd_int8"), (torch.int16, "_winograd_int16")
    for i in (2, 4):
        size, label = (512 >> i, widths[i + 1], widths[i]), f"decoder_stage{i}_1024"
        cases += [_upsample(f"{label}{kind}", *size, integers) for integers, kind in kinds]
    for i in (0, 1, 2):  # 85 % of the decoder's work
        size, label = (1024 >> i, widths[i], widths[i]), f"decoder_stage{i}_1024"
        for integers, kind in kinds:
            cases += [_conv2d(f"{label}_{end}{kind}", *size, integers, **{end: True}) for end in ("silu", "norm")]
    cases += [_conv2d("decoder_out_1024", 1024, widths[0], 3), _multi_scale("decoder_stage3_1024", 128, widths[3])]
    cases += [_decoder_attention(f"decoder_stage{i}_1024", (1024 >> i) ** 2, widths[i]) for i in (3, 4, 5)]
    return cases


CASES: tuple[Case, ...] = tuple(_published())
"""All of them. `cases(op)` picks."""


def cases(op: str | None = None) -> list[Case]:
    """Those of one op, or all, in the order of the models' sizes."""
    return [case for case in CASES if op in (None, case.op)]
