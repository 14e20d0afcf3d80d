"""The autoencoder against diffusers' AutoencoderDC: same parameter names, same pictures, no larger an error.

Every parameter is random, norms included: a norm at its initial weight 1 and bias 0 hides half of all mistakes.
"""

from dataclasses import replace

import pytest
import torch
from compare import assert_close, relative_rms
from diffusers import AutoencoderDC
from torch.overrides import TorchFunctionMode

from sana_model.autoencoder import blocks
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, AutoencoderConfig
from sana_model.errors import UserError
from sana_model.ops import REFERENCE_OPS

# Every ratio of neighbouring widths that a shortcut can bridge: 1, 2 and 4.
SMALL = AutoencoderConfig(
    widths=(8, 32, 32, 32, 64, 128), encoder_layers=(1, 2, 1, 1, 1, 2), decoder_layers=(1, 1, 2, 1, 2, 1)
)
TRUE_WIDTH = AutoencoderConfig(encoder_layers=(1,) * 6, decoder_layers=(1,) * 6)
LIMIT = 2e-5  # of the RMS, in fp32: the folded upsampling sums its weights first; EXACT is the proof
EXACT = 1e-13  # of the RMS, in fp64


def build_public(config: AutoencoderConfig) -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=config.latent_channels,
        attention_head_dim=config.head_dim,
        encoder_block_out_channels=config.widths,
        decoder_block_out_channels=config.widths,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=config.decoder_layers,
        encoder_block_types=config.encoder_block_types,
        decoder_block_types=config.decoder_block_types,
        encoder_qkv_multiscales=config.encoder_qkv_multiscales,
        decoder_qkv_multiscales=config.decoder_qkv_multiscales,
        decoder_norm_types=config.decoder_norms,
        decoder_act_fns=config.decoder_activations,
        decoder_conv_act_fn=config.out_activation,
        downsample_block_type=config.downsample,
        upsample_block_type=config.upsample,
        encoder_out_shortcut=config.encoder_out_shortcut,
        decoder_in_shortcut=config.decoder_in_shortcut,
    ).eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(generator=generator)
        if p.ndim > 1:
            p.mul_(p[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            p.mul_(0.3).add_(1)
            p[0], p[1] = -4.0, 0.0  # an outlier, a dead channel
        if name.endswith("to_q.weight"):
            p[:32] = 0  # head 0 asks for nothing: its denominator is 0 at every pixel


def pair(config: AutoencoderConfig) -> tuple[AutoencoderDC, Autoencoder]:
    public = build_public(config)
    randomise(public)
    ours = Autoencoder(config)
    ours.load_state_dict(public.state_dict())
    return public, ours


@pytest.fixture(scope="module")
def small() -> tuple[AutoencoderDC, Autoencoder]:
    return pair(SMALL)


class InDouble(TorchFunctionMode):
    """Runs a model in real fp64: where its code asks for fp32 (attention, norms), it gets fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        return function(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


def exactly(public: AutoencoderDC, method: str, x: torch.Tensor) -> torch.Tensor:
    """The truth: diffusers in fp64."""
    try:
        with InDouble():
            return getattr(public.double(), method)(x.double(), return_dict=False)[0]
    finally:
        public.float()


def awkward_input(method: str, grid: tuple[int, int], batch: int = 2) -> torch.Tensor:
    """Latents with outliers, or images in [-1, 1] with flat and saturated areas, for a latent grid (h, w)."""
    if method == "decode":
        x = 2 * torch.randn(batch, 32, *grid)
        x[0, 5, -1, -1], x[-1, 9, 0, 0] = 15.0, -12.0
        return x
    x = torch.randn(batch, 3, 32 * grid[0], 32 * grid[1]).clamp(-1, 1)
    x[0, :, :16], x[-1, 1, 8:24] = -1.0, 0.25
    return x


def run(public: AutoencoderDC, method: str, x: torch.Tensor) -> torch.Tensor:
    return getattr(public, method)(x, return_dict=False)[0]


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"),
    [(AutoencoderConfig(), 153_027_104, 159_223_171), (BUILT_IN["sana-tiny-random"].autoencoder, 2_645_600, 2_742_707)],
    ids=["sana", "tiny"],
)
def test_parameters_are_those_of_diffusers(config, encoder, decoder):
    with torch.device("meta"):
        ours, public = Autoencoder(config), build_public(config)
    assert sum(p.numel() for p in ours.encoder.parameters()) == encoder
    assert sum(p.numel() for p in ours.decoder.parameters()) == decoder
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in public.state_dict().items()}


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 5), (6, 9)], ids=str)
@torch.no_grad()
def test_parity(small, method, grid):
    """The same maths to the last digits of fp64; in fp32 at most 4 × as far from the truth as diffusers."""
    public, ours = small
    x = awkward_input(method, grid)
    truth = exactly(public, method, x)
    assert_close(getattr(ours.double(), method)(x), truth, EXACT, "fp64")
    actual, theirs = getattr(ours.float(), method)(x), run(public, method, x)
    assert actual.dtype == torch.float32
    assert_close(actual, theirs, LIMIT, "fp32")
    assert (actual - truth).abs().max() <= 4 * (theirs - truth).abs().max()
    assert relative_rms(actual, truth) <= 1.5 * relative_rms(theirs, truth)


@pytest.mark.parametrize("method", ["encode", "decode"])
@torch.no_grad()
def test_bf16_is_as_good_as_diffusers(small, method):
    public, ours = small
    x = awkward_input(method, (3, 5)).bfloat16()
    truth = exactly(public, method, x)
    try:
        actual, theirs = getattr(ours.bfloat16(), method)(x), run(public.bfloat16(), method, x)
    finally:
        randomise(public.float())
        ours.float().load_state_dict(public.state_dict())
    assert actual.dtype == torch.bfloat16
    assert relative_rms(actual, truth) <= 1.25 * relative_rms(theirs, truth)


@pytest.mark.parametrize("method", ["encode", "decode"])
@torch.no_grad()
def test_parity_at_the_true_widths(method):
    public, ours = pair(TRUE_WIDTH)
    x = awkward_input(method, (1, 2), batch=1)
    assert_close(getattr(ours, method)(x), run(public, method, x), LIMIT)


@pytest.mark.parametrize("mistake", ["norm eps", "attention eps", "head layout", "norm bias", "shortcut"])
@torch.no_grad()
def test_parity_can_fail(small, mistake, monkeypatch):
    """Each of these is a model that looks right and is not; fp64 tells even the DiT's eps from the autoencoder's."""
    config = replace(SMALL, norm_eps=1e-6) if mistake == "norm eps" else SMALL
    config = replace(config, attention_eps=1e-8) if mistake == "attention eps" else config
    public, _ = small
    ours = Autoencoder(config)
    ours.load_state_dict(public.state_dict())
    if mistake == "head layout":  # all queries first, then all keys, then all values, as the names suggest

        def attend(self, qkv):
            q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
            return self.ops.linear_attention(q, k, v, eps=self.eps).flatten(2)

        monkeypatch.setattr(blocks.MultiScaleLinearAttention, "attend", attend)
    if mistake == "norm bias":
        for name, p in ours.named_parameters():
            if "norm" in name and name.endswith("bias"):
                p.zero_()
    if mistake == "shortcut":
        monkeypatch.setattr(blocks.Upsample, "compute", _upsample_shuffled_wrongly)
    z = awkward_input("decode", (3, 5))
    with pytest.raises(AssertionError):
        assert_close(ours.double().decode(z), exactly(public, "decode", z), 10 * EXACT)


def _upsample_shuffled_wrongly(self, x, band):
    """Rows and columns of the pixel shuffle changed places."""
    nearest = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    y = self.ops.conv2d(nearest, self.conv.weight, self.conv.bias)
    repeated = x.repeat_interleave(y.shape[-1] * 4 // x.shape[-1], dim=-1).permute(0, 3, 2, 1)
    return y + torch.nn.functional.pixel_shuffle(repeated, 2).permute(0, 3, 2, 1)


@pytest.mark.parametrize(
    ("grid", "tile", "stride"),
    [((7, 5), 96, 64), ((4, 6), 128, 64), ((3, 7), 64, 64), ((2, 2), 512, 448)],
    ids=["slivers", "wide overlap", "no overlap", "one tile"],
)
@torch.no_grad()
def test_tiles(small, grid, tile, stride):
    public, ours = small
    z = awkward_input("decode", grid)
    before = z.clone()
    public.enable_tiling(tile, tile, stride, stride)
    try:
        expected = public.tiled_decode(z, return_dict=False)[0]
    finally:
        public.disable_tiling()
    assert_close(ours.tiled_decode(z, tile, stride), expected, LIMIT)
    assert torch.equal(z, before)
    if max(grid) * 32 > tile:
        with pytest.raises(AssertionError):  # tiles do not see each other: this is another picture than decode's
            assert_close(ours.decode(z), expected, 10 * LIMIT)


@torch.no_grad()
def test_tiles_of_the_default_size(small):
    """15 latents: one full tile of 16 would do, but a sliver of one latent is decoded at the far edge all the same."""
    public, ours = small
    z = awkward_input("decode", (2, 15), batch=1)
    assert_close(ours.tiled_decode(z), public.tiled_decode(z, return_dict=False)[0], LIMIT)


@torch.no_grad()
def test_contiguous_and_channels_last_weights_agree(small):
    """What `to(memory_format=...)` moves in memory stays the same model, and inputs may have any strides."""
    public, _ = small
    ours = Autoencoder(SMALL)
    ours.load_state_dict(public.state_dict())
    z = awkward_input("decode", (3, 5))
    expected = ours.decode(z)
    ours.to(memory_format=torch.channels_last)
    assert_close(ours.decode(z.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)), expected, LIMIT)


def test_every_block_uses_the_chosen_ops():
    calls = []

    def counted(name):
        def op(*args, **kwargs):
            calls.append(name)
            return getattr(REFERENCE_OPS, name)(*args, **kwargs)

        return op

    ours = Autoencoder(SMALL)
    ours.use(replace(REFERENCE_OPS, **{name: counted(name) for name in ("linear_attention", "mix_ffn")}))
    with torch.no_grad():
        ours.encode(ours.decode(torch.zeros(1, 32, 1, 1)))
    blocks = sum(SMALL.encoder_layers[3:]) + sum(SMALL.decoder_layers[3:])
    assert calls.count("mix_ffn") == blocks
    assert calls.count("linear_attention") == 2 * blocks  # two scales each


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda ae: ae.encode(torch.zeros(1, 3, 64, 48)), "multiples of 32"),
        (lambda ae: ae.encode(torch.zeros(1, 4, 64, 64)), r"\(B, 3, H, W\)"),
        (lambda ae: ae.decode(torch.zeros(1, 16, 2, 2)), r"\(B, 32, h, w\)"),
        (lambda ae: ae.tiled_decode(torch.zeros(1, 32, 2, 2), tile=500), "multiples of 32"),
        (lambda ae: ae.tiled_decode(torch.zeros(1, 32, 2, 2), tile=64, stride=96), "0 < stride <= tile"),
        (lambda ae: Autoencoder(replace(SMALL, decoder_block_types=("Conv",) * 6)), "'Conv' is not supported"),
    ],
)
def test_mistakes_are_named(small, call, says):
    with pytest.raises(UserError, match=says):
        call(small[1])
