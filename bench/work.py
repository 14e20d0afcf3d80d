"""How much arithmetic a picture takes: multiply-adds (MAC), counted from the formulas of the networks.

Only work that no implementation can avoid is counted: text keys and values once per prompt, text tokens without pads;
where an algorithm with fewer products ran (Winograd's), its own. So a percentage of peak never flatters code that computes
a thing twice. Notation: N latent tokens, L text tokens, C hidden channels, F Mix-FFN channels, D head dim.
"""

from sana_kernels.conv2d import WINOGRAD_CHANNELS
from sana_model.config import AutoencoderConfig, DiTConfig


def dit_step_macs(config: DiTConfig, tokens: int, text_tokens: int) -> int:
    """One evaluation of the DiT for one image, with the keys and values of the text given."""
    N, L, C, F, D = tokens, text_tokens, config.hidden, config.ffn, config.head_dim
    attention = (
        N * C * 3 * C + 2 * N * C * (D + 1) + N * C * C
    )  # qkv; state and its use, each with the row of sums; out
    cross_attention = N * C * C + 2 * N * L * C + N * C * C  # q; scores and their use; out
    mix_ffn = N * C * 2 * F + N * 2 * F * 9 + N * F * C  # expand, depthwise 3×3, project
    ends = N * C * (config.in_channels + config.out_channels)
    return config.layers * (attention + cross_attention + mix_ffn) + ends


def dit_time_macs(config: DiTConfig) -> int:
    """The time embedding and the modulation of all blocks, for one time."""
    C = config.hidden
    return 256 * C + C * C + 6 * C * C


def dit_text_macs(config: DiTConfig, text_tokens: int) -> int:
    """The caption projection and the keys and values of every block, for one prompt."""
    L, C = text_tokens, config.hidden
    return L * (config.caption_channels * C + C * C) + config.layers * L * C * 2 * C


def denoise_macs(config: DiTConfig, tokens: int, steps: int, lengths: tuple[int, ...]) -> int:
    """All steps for one image; `lengths` are the text tokens of each row of the guided batch (negative, positive)."""
    per_row = (
        steps * (dit_step_macs(config, tokens, length) + dit_time_macs(config)) + dit_text_macs(config, length)
        for length in lengths
    )
    return sum(per_row)


def decoder_macs(
    config: AutoencoderConfig, height: int, width: int, *, folded: bool = True, transformed: bool = False
) -> int:
    """One decode of an image of height × width pixels.

    `folded`: of a convolution after nearest ×2, only the 4 taps of each pixel that are different ones, not all 9.
    `transformed`: of what is wide enough (WINOGRAD_CHANNELS), only the 9/4 products of each pixel that transforms leave, in
    ResBlocks and after nearest ×2.
    """
    widths, last = config.widths, len(config.widths) - 1
    pixels = [(height >> i) * (width >> i) for i in range(len(widths))]
    total = pixels[last] * config.latent_channels * widths[last] * 9
    total += pixels[0] * widths[0] * 3 * 9 if config.decoder_layers[0] else pixels[1] * widths[1] * 12 * 9
    for i, C in enumerate(widths):
        count, residual = config.decoder_layers[i], config.decoder_block_types[i] == "ResBlock"
        if i < last and count:  # the up-sampling convolution into this stage: at its resolution, or before it
            taps = 4 if folded and config.upsample == "interpolate" else 9  # a shuffle's 4C channels are as many pixels
            wide = min(C, widths[i + 1]) >= WINOGRAD_CHANNELS
            if transformed and wide and config.upsample == "interpolate":
                taps = 9 / 4
            total += round(pixels[i] * widths[i + 1] * C * taps)
        scales = len(config.decoder_qkv_multiscales[i])
        taps = 9 / 4 if transformed and C >= WINOGRAD_CHANNELS else 9
        total += round(pixels[i] * count * (2 * C * C * taps if residual else _efficientvit_macs(config, C, scales)))
    return total


def _efficientvit_macs(config: AutoencoderConfig, C: int, scales: int) -> int:
    """Per pixel: multi-scale linear attention, then a gated inverted bottleneck of expansion 4."""
    D, branches = config.head_dim, 1 + scales
    aggregate = scales * (3 * C * 25 + 3 * C * D)  # depthwise 5×5, then 1×1 within each head
    attention = C * 3 * C + aggregate + branches * 2 * C * (D + 1) + branches * C * C
    bottleneck = C * 8 * C + 8 * C * 9 + 4 * C * C
    return attention + bottleneck
