"""Every op as a model calls it: arguments by position, without memory (device "meta"), for a plan to ask kernels about.

`text_examples`, `dit_examples` and `autoencoder_examples` take the model and the precision of that part → op → arguments. An
op that a part calls in two precisions appears twice, the second time with `WIDE` behind its name.
"""

from collections.abc import Callable
from functools import partial

import torch

from sana_kernels.gemm import fake_quantize
from sana_kernels.quant.formats import GROUP
from sana_model.config import ModelConfig
from sana_model.quantize.layers import RANK_STEP
from sana_model.settings import FOUR_BIT, PRECISIONS, QUANTIZED

NATIVE = {"w4a4": "gemm_w4a4", "w4a16": "gemm_w4a16"}  # the ops that multiply 4-bit weights as they are
WIDE = "_16bit"  # the form of what stays in 16 bits: keys and values of the caption, low-rank branches


def text_examples(config: ModelConfig, precision: str) -> dict[str, tuple]:
    like, C = partial(torch.empty, dtype=PRECISIONS[precision], device="meta"), config.text.hidden
    examples = {"gemm": _gemm_example(like, precision, 1, config.max_text_tokens, C, config.text.ffn)}
    return examples | _four_bit_examples(like, precision, 1, config.max_text_tokens, C, config.text.ffn)


def dit_examples(config: ModelConfig, precision: str) -> dict[str, tuple]:
    """Arguments of every op as the DiT calls it, without memory (device "meta")."""
    dit, N, L = config.dit, config.dit.sample_size**2, config.max_text_tokens
    C = dit.hidden
    like = partial(torch.empty, dtype=PRECISIONS[precision], device="meta")
    x, row = like(2, N, C), like(2, C)
    norm = like(C) if dit.qk_norm else None
    q, k, v = like(2, N, 3, dit.heads, dit.head_dim).unbind(2)
    cross_q, cross_kv = like(2, N, dit.cross_heads, dit.cross_head_dim), like(2, L, dit.cross_heads, dit.cross_head_dim)
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    examples = {
        "modulate": (x, row, row, dit.norm_eps),
        "gemm": _gemm_example(like, precision, 2, N, C, 3 * C),
        "linear_attention": (q, k, v, norm, norm, dit.qk_norm_eps, dit.attention_eps),
        "gate_residual": (x, x, row),
        "cross_attention": (cross_q, cross_kv, cross_kv, lengths),
        "mix_ffn": _mix_ffn_example(like, precision, 2, dit.sample_size, C, dit.ffn),
    }
    h, depthwise = like(2, N, 2 * dit.ffn), (like(2 * dit.ffn, 1, 3, 3), like(2 * dit.ffn))
    examples["depthwise_glu"] = h, dit.sample_size, dit.sample_size, *depthwise  # a LoRA may come at any time
    if precision in FOUR_BIT:
        del examples["mix_ffn"]  # which takes no 4-bit weights
    if dtype := QUANTIZED.get(precision):
        examples |= {"modulate_quantized": (x, row, row, dit.norm_eps, dtype), "quantize": (x, dtype)}
        examples["gemm" + WIDE] = _gemm_example(like, "bf16", 1, L, C, 2 * C)
    if not dit.qk_norm and precision not in FOUR_BIT:
        operands = *_rows_example(like, precision, 2, N, C), *_rows_example(like, precision, 3 * C, C)
        examples["linear_attention_from"] = *operands, dit.head_dim, dit.attention_eps
    return examples | _four_bit_examples(like, precision, 2, N, C, 3 * C)


def autoencoder_examples(config: ModelConfig, precision: str) -> dict[str, tuple]:
    ae, side = config.autoencoder, config.dit.sample_size
    C, outer = ae.widths[-1], ae.widths[1]
    like = partial(torch.empty, dtype=PRECISIONS[precision], device="meta")
    q, k, v = like(1, side**2, C // ae.head_dim, 3, ae.head_dim).unbind(3)
    x, channels, band = like(1, side, side, outer), like(outer), [0, 0, side, side]

    def convolution(precision: str, *shape: int) -> tuple:
        if precision in QUANTIZED:
            return like(*shape).to(QUANTIZED[precision]), like(shape[0]).float(), list(shape)
        return like(*shape), None, list(shape)

    def conv2d(precision: str) -> tuple:
        norms = channels, channels, x, None, None, "none"
        return (
            x, *convolution(precision, outer, outer, 3, 3), channels, 1, "silu", *norms, ae.norm_eps, band, None, None,
        )  # fmt: skip

    size, bias = (3, like(4 * outer)) if ae.upsample == "pixel_shuffle" else (2, channels)
    examples = {
        "conv2d": conv2d(precision),
        "upsample": (x, *convolution(precision, 4 * outer, outer, size, size), bias, band, None),
        "rms_norm": (x, channels, channels, x, "none", ae.norm_eps),
    }
    if precision in QUANTIZED:
        examples["conv2d" + WIDE] = conv2d("bf16")
    if "EfficientViTBlock" in ae.encoder_block_types + ae.decoder_block_types:
        examples |= {
            "gemm": _gemm_example(like, precision, 1, side**2, C, 3 * C),
            "multi_scale": (like(1, side, side, 3 * C), like(3 * C, 1, 5, 5), like(3 * C, ae.head_dim, 1, 1), band),
            "linear_attention": (q, k, v, None, None, 1e-5, ae.attention_eps),
            "mix_ffn": _mix_ffn_example(like, precision, 1, side, C, 4 * C),
        }
        if precision in QUANTIZED:
            examples |= {
                "gemm" + WIDE: _gemm_example(like, "bf16", 1, side**2, C, C),
                "quantize": (like(1, side**2, C), QUANTIZED[precision]),
            }
    return examples


def _rows_example(like: Callable[..., torch.Tensor], precision: str, *shape: int) -> tuple:
    """Rows in the model's dtype, or quantised: values and scales."""
    if precision not in QUANTIZED:
        return like(*shape), None
    return fake_quantize(like(*shape), QUANTIZED[precision], "")


def _gemm_example(like: Callable[..., torch.Tensor], precision: str, B: int, M: int, K: int, N: int) -> tuple:
    x, weight = _rows_example(like, precision, B, M, K), _rows_example(like, precision, N, K)
    return *x, *weight, None, False, None, None, like(0).dtype


def _four_bit_examples(
    like: Callable[..., torch.Tensor], precision: str, B: int, M: int, K: int, N: int
) -> dict[str, tuple]:
    """Of the ops of NATIVE, for a precision that has one."""
    if precision not in NATIVE:
        return {}

    def int4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = -(-shape[-1] // GROUP)
        return like(*shape[:-1], groups * GROUP // 2).byte(), like(*shape[:-1], groups).float()

    x, weight, dtype = like(B, M, K), int4(N, K), like(0).dtype
    if precision == "w4a16":
        return {"gemm_w4a16": (x, *weight, None, False, None, None, dtype)}
    branch = like(B, M, RANK_STEP), like(N, RANK_STEP)
    return {"gemm_w4a4": (*int4(B, M, K), *weight, *branch, None, False, None, None, dtype)}


def _mix_ffn_example(like: Callable[..., torch.Tensor], precision: str, B: int, side: int, C: int, F: int) -> tuple:
    x, expand = _rows_example(like, precision, B, side**2, C), _rows_example(like, precision, 2 * F, C)
    depthwise, project = (like(2 * F, 1, 3, 3), like(2 * F)), _rows_example(like, precision, C, F)
    return *x, side, side, *expand, like(2 * F), *depthwise, *project, None, None
