"""AWQ's scales: where they go leaves Gemma as it was, and rounding then costs less."""

from dataclasses import replace

import pytest
import torch
from compare import assert_close, relative_rms
from test_text_encoder import LENGTHS, SMALL, THIRD, batch, ours, theirs

from sana_kernels.quant import formats
from sana_kernels.quant.awq import awq_scale
from sana_model.config import TextEncoderConfig
from sana_model.quantize.awq import scale_text_encoder
from sana_model.text_encoder import TextEncoder

WIDE = {config.qk_norm: replace(config, hidden=144, ffn=192) for config in (SMALL, THIRD)}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    rows = formats.quantize_int4(weight, scale_dtype=torch.bfloat16)
    return formats.dequantize_int4(rows).float()[:, : weight.shape[1]]


def loud(config: TextEncoderConfig) -> TextEncoder:
    """A network whose norms make some channels 20 times as large as the others, as trained ones do."""
    encoder = ours(config, theirs(config))
    for block in encoder.layers:
        for norm in (block.input_layernorm, block.pre_feedforward_layernorm):
            norm.weight[::16] = 19.0
    return encoder


def errors(config: TextEncoderConfig, scale: bool) -> float:
    encoder = loud(config)
    expected = encoder(batch(), LENGTHS)
    if scale:
        scale_text_encoder(encoder, batch().roll(1, 1), LENGTHS, rounded)
    for layer in encoder.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.copy_(rounded(layer.weight))
    return relative_rms(encoder(batch(), LENGTHS), expected)


@pytest.mark.parametrize("third", [False, True], ids=["Gemma-2", "Gemma-3"])
def test_scaling_changes_nothing_but_the_weights(third):
    encoder = loud(WIDE[third])
    expected, before = encoder(batch(), LENGTHS), [p.clone() for p in encoder.parameters()]
    scale_text_encoder(encoder, batch(), LENGTHS, rounded)
    assert_close(encoder(batch(), LENGTHS), expected, 2e-4)
    assert sum(not torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True)) > 5 * SMALL.layers
    encoder.layers[2].self_attn.v_proj.weight[:8] *= 1.1  # control: of all rows the norm behind would undo it
    with pytest.raises(AssertionError):
        assert_close(encoder(batch(), LENGTHS), expected, 2e-4)


@pytest.mark.parametrize("third", [False, True], ids=["Gemma-2", "Gemma-3"])
def test_scaled_weights_lose_less(third):
    """Of one layer: random ones amplify whatever error they are given."""
    config = replace(WIDE[third], layers=1)
    assert errors(config, scale=True) < 0.8 * errors(config, scale=False)


def test_the_scale_is_the_best_of_its_grid():
    """On outliers better than none; on channels of one size none, or nearly so."""
    weight, rows = torch.randn(96, 128), torch.randn(200, 128)
    rows[:, ::32] *= 30
    exact = rows @ weight.t()

    def error(scale):
        return relative_rms((rows / scale) @ rounded(weight * scale).t(), exact)

    scale = awq_scale(rows, [weight], rounded)
    assert error(scale) < 0.7 * error(torch.ones(128))
    assert scale[::32].min() > 2 * scale[1:32].max()
    shared = awq_scale(rows, [weight[:48], weight[48:]], rounded)
    assert torch.allclose(shared, scale)  # layers that share an input are scaled as one
    flat = awq_scale(torch.randn(4000, 128), [weight], rounded)
    assert flat.max() / flat.min() < 1.2
    tied = awq_scale(rows, [weight], rounded, magnitude=torch.ones(128))
    assert torch.equal(tied, torch.ones(128))
