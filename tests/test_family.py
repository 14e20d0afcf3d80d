"""The DC-AE family against diffusers: every published shape key for key, the maths at small sizes, and the files."""

import json
import re
from dataclasses import replace

import pytest
import torch
from compare import assert_close
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from safetensors.torch import save_file
from test_autoencoder import EXACT, LIMIT, awkward_input, build_public, exactly, randomise, run

import sana_model
from sana_model.autoencoder.blocks import BatchNorm
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.autoencoder.family import FAMILY, find_autoencoder, lite, with_decoder
from sana_model.config import AutoencoderConfig
from sana_model.errors import UserError
from sana_model.files import write_text
from sana_model.weights import checkpoint_config as configs
from sana_model.weights.models import find, load_model

PARAMETERS = {  # encoder, decoder, in millions
    "dc-ae-lite-f32c32-sana-1.1": (153.0, 268.2), "dc-ae-f32c32-in-1.0": (123.2, 200.2),
    "dc-ae-f64c128-mix-1.0": (264.6, 412.3), "dc-ae-f128c512-in-1.0": (415.7, 705.0),
    "dc-ae-1.5-f32c128": (228.6, 295.0), "dc-ae-1.5-f64c128": (306.5, 408.3),
}  # fmt: skip


def shrunk(config: AutoencoderConfig) -> AutoencoderConfig:
    """The same kind of model with narrow stages, of at most one block (two in the third, where there are any)."""
    narrow = (16, 32, 64, 64, 128, 128, 128, 128)[: len(config.widths)]

    def few(layers):
        return tuple(min(count, 2 if i == 2 else 1) for i, count in enumerate(layers))

    return replace(
        config, widths=narrow, latent_channels=32,
        encoder_layers=few(config.encoder_layers), decoder_layers=few(config.decoder_layers),
    )  # fmt: skip


SMALL = {name: shrunk(FAMILY[name]) for name in PARAMETERS}


def pair(config: AutoencoderConfig):
    public = build_public(config)
    randomise(public)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in public.named_buffers():  # running statistics that are not those of a new network
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.25, 4, generator=generator)
    ours = Autoencoder(config).eval()
    ours.load_state_dict(public.state_dict())
    return public, ours


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_are_those_of_diffusers(name):
    with torch.device("meta"):
        ours, public = Autoencoder(FAMILY[name]), build_public(FAMILY[name])
    expected = {key: value.shape for key, value in public.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    if name in PARAMETERS:
        for side, millions in zip((ours.encoder, ours.decoder), PARAMETERS[name], strict=True):
            assert sum(p.numel() for p in side.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_parity(name, method):
    """The same maths to the last digits of fp64, and in fp32 the same image."""
    config = SMALL[name]
    public, ours = pair(config)
    factor = config.spatial_compression
    x = awkward_input(method, (3, 2) if factor == 32 else (2, 1))
    if method == "encode":
        x = x.repeat(1, 1, factor // 32, factor // 32)
    truth = exactly(public, method, x)
    assert_close(getattr(ours.double(), method)(x), truth, 10 * EXACT, "fp64")
    ours.load_state_dict(public.float().state_dict())
    assert_close(getattr(ours.float(), method)(x), run(public, method, x), LIMIT, "fp32")


@pytest.mark.parametrize("mistake", ["statistics", "activation", "shortcut", "shuffle"])
@torch.no_grad()
def test_parity_can_fail(mistake, monkeypatch):
    config = SMALL["dc-ae-1.5-f32c128" if mistake == "shortcut" else "dc-ae-f32c32-in-1.0"]
    public, _ = pair(config)
    wrong = {
        "activation": {"decoder_activations": ("silu",) * 6},
        "shortcut": {"decoder_in_shortcut": True},
    }.get(mistake, {})
    ours = Autoencoder(replace(config, **wrong)).eval()
    ours.load_state_dict(public.state_dict())
    if mistake == "statistics":
        for module in ours.modules():
            if isinstance(module, BatchNorm):
                module.reset_running_stats()
    if mistake == "shuffle":  # channels in the order of phases, which only a packed weight has
        monkeypatch.setattr("sana_model.autoencoder.blocks.Upsample.phases", lambda self: tuple(self.conv.parameters()))
    z = awkward_input("decode", (2, 3))
    with pytest.raises(AssertionError):
        assert_close(ours.decode(z), run(public, "decode", z), 100 * LIMIT)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", FAMILY)
def test_configurations_come_back_from_their_files(name):
    written = configs.write_autoencoder(FAMILY[name])
    assert configs.read_autoencoder(written, "config.json") == FAMILY[name]


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as efficientvit names and shapes it, the inverse of what diffusers' converter does."""
    out = {}
    for name, tensor in state.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [state[name.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"]
            tensor = torch.cat(parts)[..., None, None]
        if ".attn.to_out." in name:
            tensor = tensor[..., None, None]
        out[_original_name(name)] = tensor
    return out


def _original_name(name: str) -> str:
    for ours, theirs in (
        (r"^encoder\.conv_in\.", "encoder.project_in.conv."),
        (r"^encoder\.conv_out\.", "encoder.project_out.main.op_list.0.conv."),
        (r"^decoder\.conv_in\.", "decoder.project_in.main.conv."),
        (r"^decoder\.norm_out\.", "decoder.project_out.op_list.0."),
        (r"^decoder\.conv_out\.", "decoder.project_out.op_list.2.conv."),
        (r"\.(?:down|up)_blocks\.(\d+)\.(\d+)\.attn\.", r".stages.\1.op_list.\2.context_module.main."),
        (r"\.(?:down|up)_blocks\.(\d+)\.(\d+)\.conv_out\.", r".stages.\1.op_list.\2.local_module.main."),
        (r"\.(?:down|up)_blocks\.(\d+)\.(\d+)\.", r".stages.\1.op_list.\2.main."),
        (r"\.to_q\.", ".qkv.conv."), (r"\.to_out\.", ".proj.conv."), (r"\.norm_out\.", ".proj.norm."),
        (r"\.to_qkv_multiscale\.0\.proj_in\.", ".aggreg.0.0."), (r"\.to_qkv_multiscale\.0\.proj_out\.", ".aggreg.0.1."),
        (r"(local_module\.main\.)conv_(\w+)\.", r"\1\2_conv.conv."),
        (r"(local_module\.main\.)norm\.", r"\1point_conv.norm."),
        (r"main\.norm\.", "main.conv2.norm."), (r"main\.(conv[12])\.(weight|bias)$", r"main.\1.conv.\2"),
        (r"(op_list\.\d+\.main)\.conv\.(weight|bias)$", r"\1.conv.conv.\2"),
    ):  # fmt: skip
        if not (theirs.startswith("decoder.project_out") and "proj.norm" in name):
            name = re.sub(ours, theirs, name)
    return name


@pytest.mark.parametrize("name", ["dc-ae-f32c32-sana-1.1", *SMALL])
@torch.no_grad()
def test_original_checkpoints(name, tmp_path, monkeypatch):
    """A file in efficientvit's names: what diffusers' own converter makes of it, tensor by tensor."""
    config = SMALL.get(name) or shrunk(FAMILY[name])
    monkeypatch.setitem(FAMILY, name, config)
    public, _ = pair(config)
    state = public.state_dict()
    theirs = original_names(state)
    if name in ("dc-ae-f32c32-sana-1.1", "dc-ae-f32c32-in-1.0"):  # the kinds that its converter knows
        converted = convert_autoencoder_dc_checkpoint_to_diffusers(dict(theirs))
        assert converted.keys() == state.keys() and all(torch.equal(converted[key], state[key]) for key in state)
    file = tmp_path / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in theirs.items()}, file)
    source = find_autoencoder(file)
    assert source.config.autoencoder == config
    loaded = load_model(source, parts=("autoencoder",)).autoencoder.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(loaded[key], value.to(loaded[key].dtype)), key


@torch.no_grad()
def test_folders_and_names(tmp_path):
    """An autoencoder's folder in diffusers' format, a whole model, a name of the family."""
    config = SMALL["dc-ae-lite-f32c32-sana-1.1"]
    public, _ = pair(config)
    public.save_pretrained(tmp_path / "vae")
    loaded = load_model(find_autoencoder(tmp_path / "vae"), parts=("autoencoder",)).autoencoder
    z = awkward_input("decode", (1, 2))
    assert_close(loaded.decode(z), run(public, "decode", z), LIMIT)
    assert find_autoencoder("sana-tiny").config.autoencoder.widths == (16, 32, 64, 64, 128, 128)
    assert find_autoencoder("dc-ae-1.5-f64c128").config.autoencoder == FAMILY["dc-ae-1.5-f64c128"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda f: save_file({"decoder.conv_in.weight": torch.zeros(3)}, f / "x.safetensors"),
            "no DC-AE of a published",
        ),
        (lambda f: write_text(f / "x.safetensors", "no tensors"), "damaged"),
        (lambda f: None, "is no file"),
    ],
)
def test_what_is_no_autoencoder(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(UserError, match=says):
        find_autoencoder(tmp_path / "x.safetensors")


@pytest.mark.parametrize("damage", ["weights", "shape"])
def test_a_decoder_is_checked_before_anything_is_read(tmp_path, damage, monkeypatch):
    config = sana_model.load("sana-tiny-random").config.autoencoder
    folder = tmp_path / "vae"
    folder.mkdir()
    write_text(folder / "config.json", json.dumps(configs.write_autoencoder(config)))
    if damage == "shape":
        save_file({"decoder.conv_in.weight": torch.zeros(3)}, folder / "diffusion_pytorch_model.safetensors")
    read = []
    monkeypatch.setattr("sana_model.weights.models.fill", lambda *_: read.append(1))
    with pytest.raises(UserError, match="holds no weights" if damage == "weights" else "is missing"):
        sana_model.load("sana-tiny", decoder=str(folder))
    assert not read


def test_another_decoder_for_the_same_latents():
    """`--decoder lite` paints from the same latents; a decoder of other latents is refused."""
    pictures = {}
    for decoder in (None, "lite"):
        pipe = sana_model.load("sana-tiny-random", decoder=decoder, precision="fp32")
        pictures[decoder] = pipe("a fox", steps=1, width=64, height=32)
    assert pipe.config.autoencoder == lite(sana_model.load("sana-tiny-random").config.autoencoder)
    assert torch.equal(pictures[None].latents, pictures["lite"].latents)
    assert pictures["lite"].images[0].size == (64, 32)
    assert pictures["lite"].images[0].tobytes() != pictures[None].images[0].tobytes()
    with pytest.raises(
        UserError, match=r"than those of sana-tiny-random.*: its .* latent channels 128, and that one 32;"
    ):
        sana_model.load("sana-tiny-random", decoder="dc-ae-1.5-f32c128")
    with pytest.raises(UserError, match="knows SANA's latents, and sana-tiny has an autoencoder of its own"):
        sana_model.load("sana-tiny", decoder="lite")


@pytest.mark.parametrize(
    ("model", "decoder", "difference"),
    [
        ("sana-tiny", "dc-ae-lite-f32c32-sana-1.1", "widths"),
        ("sana-0.6b", "dc-ae-f32c32-in-1.0", "encoder layers"),
        ("sana-0.6b", "dc-ae-lite-f32c32-sana-1.1", None),
        ("sana-0.6b", "dc-ae-f32c32-sana-1.1", None),
    ],
)
def test_the_same_latents_are_those_of_the_same_encoder(model, decoder, difference):
    """Channels and compression are alike in all of these; a decoder of its own is not what tells them apart."""
    source = find(model)
    if difference is None:
        assert with_decoder(source, decoder).config.autoencoder == FAMILY[decoder]
    else:
        with pytest.raises(UserError, match=rf"than those of {model}.*: its autoencoder has {difference} \("):
            with_decoder(source, decoder)
