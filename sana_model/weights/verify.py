"""Is this checkpoint read and computed as diffusers does? One table, one verdict.

Each stage is compared by itself, on the same input, so that a failure points at its stage; the picture comes last,
from the prompt. Weights are compared with what diffusers reads from the same files, one part at a time; the
computations then share one copy of them, so a model needs little more memory than to run it.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sana_model.config import ModelConfig
from sana_model.dit import FP16_MAX
from sana_model.pipeline import Pipeline, load
from sana_model.scheduler import timesteps
from sana_model.weights import interop
from sana_model.weights.checkpoint import variant_of
from sana_model.weights.checkpoint_config import text_encoder_class
from sana_model.weights.keys import to_diffusers
from sana_model.weights.models import FOLDERS, find

PROMPTS = ("a red fox in the snow, oil painting", 'Straße, "naïve" café; 東京 🦊')
ERROR = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}
"""Largest error of a stage: RMS of the difference over RMS of diffusers' result. fp32 leaves room for 60 blocks."""
PSNR = {"fp32": 50.0, "bf16": 20.0, "fp16": 30.0}
"""Smallest peak signal-to-noise ratio of the two pictures, in dB; guidance multiplies what a step loses."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    stage: str
    found: str
    limit: str
    passed: bool


@dataclass(frozen=True)
class Report:
    """What `verify`, or `sana export check`, found. Printing it prints the table."""

    title: str
    rows: tuple[Row, ...]
    against: str = "diffusers"

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        cells = [
            ("stage", "difference", "allowed", ""),
            *((r.stage, r.found, r.limit, _word(r.passed)) for r in self.rows),
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        failed = ", ".join(row.stage for row in self.rows if not row.passed)
        verdict = f"differs in: {failed}" if failed else f"agrees with {self.against}"
        return "\n".join([self.title, *lines, f"{_word(self.passed)}: {verdict}"])


def verify(model: str | Path, precision: str = "fp32", *, base: str | None = None, steps: int = 2) -> Report:
    """Compare a model with the installed diffusers: weights, tokens, states, velocity, decoder, a picture of `steps`.

    `model` and `base` as in `load_model`; `precision` (fp32 | bf16 | fp16) is that of all parts, and fp32 is the one
    that tells most. Raises UserError for a model that cannot be read, MissingError without diffusers and
    transformers.
    """
    all_parts = {"precision": precision, "text_precision": precision, "decoder_precision": precision}
    source = find(model, base)
    source.refuse_quantized("comparing with diffusers")
    pipe = load(str(model), backend="reference", device="cpu", base=base, **all_parts)
    folder = source.folder
    rows = [_weights(pipe, folder, part) for part in FOLDERS] if folder else []
    theirs = interop.diffusers_pipeline(pipe.model)
    theirs.set_progress_bar_config(disable=True)
    if pipe.config.dit.clamp:  # diffusers has this clamp in fp16 only, where it needs no telling
        for block in theirs.transformer.transformer_blocks:
            block.attn1.to_out[0].register_forward_hook(lambda _m, _i, y: y.clamp(-FP16_MAX, FP16_MAX))
    with torch.inference_mode():
        rows += [*_text(pipe, theirs, precision), _velocity(pipe, theirs, precision), _decoder(pipe, theirs, precision)]
        rows.append(_picture(pipe, theirs, precision, steps))
    diffusers, transformers = (interop.package(name).__version__ for name in ("diffusers", "transformers"))
    return Report(
        f"{pipe.model.source} in {precision}, against diffusers {diffusers}, transformers {transformers}", tuple(rows)
    )


def _weights(pipe: Pipeline, folder: Path, part: str) -> Row:
    """Every tensor of a part, bit by bit."""
    place = folder / FOLDERS[part]
    library, name, module = {
        "dit": ("diffusers", "SanaTransformer2DModel", pipe.dit),
        "text": ("transformers", text_encoder_class(pipe.config.text), pipe.model.text_encoder),
        "autoencoder": ("diffusers", "AutoencoderDC", pipe.autoencoder),
    }[part]
    dtype = next(module.parameters()).dtype
    variant = variant_of([file.name for file in place.iterdir()], dtype, str(place))
    theirs = getattr(interop.package(library), name).from_pretrained(place, dtype=dtype, variant=variant).state_dict()
    ours = to_diffusers(module.state_dict(), pipe.config.dit) if part == "dit" else module.state_dict()
    different = [key for key in theirs.keys() | ours.keys() if not _equal(ours.get(key), theirs.get(key))]
    first = f", the first {min(different)}" if different else ""
    return Row(f"weights: {FOLDERS[part]}", f"{len(different)} of {len(theirs)} tensors{first}", "0", not different)


def _text(pipe: Pipeline, theirs, precision: str) -> list[Row]:
    """Which tokens of instruction and prompt are kept, and their states."""
    config, tokenizer = pipe.config, pipe.model.tokenizer
    limit = config.max_text_tokens
    lines = _instruction(config, theirs)
    instruction = "\n".join(lines or [])
    wrong, worst = 0, 0.0
    for prompt in PROMPTS:
        states, mask = theirs._get_gemma_prompt_embeds(
            [prompt], torch.device("cpu"), theirs.text_encoder.dtype,
            max_sequence_length=limit, complex_human_instruction=lines,
        )  # fmt: skip
        kept = [0, *range(mask.shape[1] - limit + 1, mask.shape[1])]
        kept = [i for i in kept if mask[0, i]]
        text = instruction + prompt.lower().strip()
        their_ids = theirs.tokenizer(text).input_ids
        ids = tokenizer.encode(text)
        first = len(tokenizer.encode(instruction)) - 1 if instruction else 1
        our_ids = [ids[0], *ids[first : first + limit - 1]]
        wrong += our_ids != [their_ids[i] for i in kept]
        caption = pipe.encode(pipe.settings(prompt, guidance=1.0))[1].states[0]
        expected = states[0, kept]
        same_length = len(caption) == len(expected)
        worst = max(worst, _error(caption, expected) if same_length else float("inf"))
    tokens = Row("kept tokens", f"{wrong} of {len(PROMPTS)} prompts", "0", wrong == 0)
    return [tokens, _row("text states", worst, precision)]


def _velocity(pipe: Pipeline, theirs, precision: str) -> Row:
    """One evaluation of the DiT on noise and our caption states, at the first time of the schedule."""
    config = pipe.config.dit
    side = _side(pipe.config)
    latents = _noise(config.in_channels, side)
    caption = pipe.encode(pipe.settings(PROMPTS[0], guidance=1.0))[1]
    time = timesteps(pipe.config.scheduler, 2).model_times[:1]
    scale = torch.tensor([pipe.config.guidance]) if config.guidance_embeds else None
    ours = pipe.dit(latents, time, caption.states, caption.lengths, scale)
    dtype = theirs.transformer.dtype
    expected = theirs.transformer(
        latents.to(dtype),
        encoder_hidden_states=caption.states.to(dtype),
        timestep=time * config.timestep_scale,
        guidance=None if scale is None else scale * config.guidance_embeds_scale,
        encoder_attention_mask=torch.ones(caption.states.shape[:2], dtype=dtype),
    ).sample
    return _row("velocity", _error(ours, expected), precision)


def _decoder(pipe: Pipeline, theirs, precision: str) -> Row:
    config = pipe.config.autoencoder
    latents = (_noise(config.latent_channels, _side(pipe.config)) / config.scaling_factor).to(theirs.vae.dtype)
    return _row("decoder", _error(pipe.autoencoder.decode(latents), theirs.vae.decode(latents).sample), precision)


def _picture(pipe: Pipeline, theirs, precision: str, steps: int) -> Row:
    """From the prompt to 8-bit pixels, the same seed."""
    size = _side(pipe.config) * pipe.config.autoencoder.spatial_compression
    ours = pipe(PROMPTS[0], seed=0, steps=steps, width=size, height=size).images[0]
    arguments = {
        "guidance_scale": pipe.config.guidance,
        "complex_human_instruction": _instruction(pipe.config, theirs),
        "max_sequence_length": pipe.config.max_text_tokens,
    }
    if pipe.config.dit.guidance_embeds:
        arguments["intermediate_timesteps"] = 1.3 if steps == 2 else None
    expected = theirs(
        PROMPTS[0], num_inference_steps=steps, width=size, height=size, use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0), **arguments,
    ).images[0]  # fmt: skip
    ratio = _psnr(ours, expected)
    return Row(f"picture, {steps} steps", f"{ratio:.1f} dB", f">= {PSNR[precision]:.0f} dB", ratio >= PSNR[precision])


def _instruction(config: ModelConfig, theirs) -> list[str] | None:
    """The instruction as diffusers takes it: by default, its own."""
    if config.instruction == "none":
        return None
    if config.instruction == "default":
        return inspect.signature(theirs.__call__).parameters["complex_human_instruction"].default
    return config.instruction.split("\n")


def _side(config: ModelConfig) -> int:
    """Of the latents: the native size, but not so large that the fp32 decoder fills the memory."""
    return min(config.dit.sample_size, 16)


def _noise(channels: int, side: int) -> Tensor:
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))


def _error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()


def _psnr(ours: Image.Image, theirs: Image.Image) -> float:
    a, b = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double() for image in (ours, theirs))
    error = (a - b).square().mean().item()
    return float("inf") if error == 0 else 10 * torch.log10(torch.tensor(255.0**2 / error)).item()


def _row(stage: str, error: float, precision: str) -> Row:
    return Row(stage, f"{error:.1e}", f"<= {ERROR[precision]:.0e}", error <= ERROR[precision])  # NaN fails


def _equal(ours: Tensor | None, theirs: Tensor | None) -> bool:
    return ours is not None and theirs is not None and torch.equal(ours, theirs)


def _word(passed: bool) -> str:
    return "PASS" if passed else "FAIL"
