"""Runs of code that others wrote, over views of our weights: diffusers as it is, under torch.compile, in OpenVINO."""

import copy
import importlib.metadata
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from sana_bench import openvino
from sana_bench.weights import Moment, RunName, Weights
from sana_model.prompt import DEFAULT_INSTRUCTION
from sana_model.settings import Settings, is_guided
from sana_model.weights.interop import diffusers_autoencoder, diffusers_pipeline, diffusers_transformer

CALIBRATION_STEPS = 4  # of one picture, for OpenVINO's W8A8


class DiffusersRun:
    """The installed diffusers pipeline over views of our weights."""

    again = ("autoencoder",)  # in the faster memory format
    missing = "not available"  # the status of a row where the machine lacks what it needs

    def __init__(self, name: RunName, weights: Weights):
        self.name, self.weights = name, weights

    def prepare(self, settings: Settings) -> None:
        loaded = self.weights.reserve(self.name, settings, self.again)
        self.dtypes = self.name.dtypes
        self.pipe = diffusers_pipeline(loaded)
        self.pipe.set_progress_bar_config(disable=True)
        config = loaded.config
        self.guided = is_guided(settings.guidance, config.dit)
        instruction = {"none": None, "default": DEFAULT_INSTRUCTION}.get(config.instruction, config.instruction)
        self._text = {
            "device": self.weights.device, "max_sequence_length": config.max_text_tokens,
            "complex_human_instruction": instruction and instruction.split("\n"),
        }  # fmt: skip
        self.format, self.trial_ms = self._faster_format(settings)

    def _faster_format(self, settings: Settings) -> tuple[torch.memory_format, dict[str, float]]:
        """The memory format in which the decoder takes less time, and the ms it took (512 px at most, best of two).

        Only the decoder asks this question: the DiT permutes its tokens, so its convolutions meet channels_last tensors
        in any case.
        """
        latents = torch.randn(
            1, self.weights.config.dit.in_channels, min(settings.height // 32, 16), min(settings.width // 32, 16)
        )
        took = {}
        for memory_format in (torch.contiguous_format, torch.channels_last):
            self.format = memory_format
            self.pipe.vae.decoder.to(memory_format=memory_format)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                self.decode(latents, settings).sum().item()
                times.append(time.perf_counter() - start)
            took[memory_format] = min(times)
        fastest = min(took, key=took.get)
        self.pipe.vae.decoder.to(memory_format=fastest)
        return fastest, {str(memory_format).removeprefix("torch."): 1e3 * s for memory_format, s in took.items()}

    def text_encode(self, settings: Settings):
        prompts = list(settings.prompts)
        if self.weights.config.dit.guidance_embeds:
            states, mask = self.pipe.encode_prompt(prompts, **self._text)
            return {"prompt_embeds": states, "prompt_attention_mask": mask}
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        values = self.pipe.encode_prompt(prompts, self.guided, settings.negative_prompt, **self._text)
        return dict(zip(names, values, strict=True))

    def denoise(self, settings: Settings, captions, noise: Tensor) -> Tensor:
        sprint = self.weights.config.dit.guidance_embeds
        times = (
            {"intermediate_timesteps": 1.3 if settings.steps == 2 else None} if sprint else {"negative_prompt": None}
        )
        return self.pipe(
            **captions, **times, latents=noise, height=settings.height, width=settings.width,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance, use_resolution_binning=False,
            output_type="latent",
        ).images  # fmt: skip

    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        z = latents.to(self.weights.device, self.dtypes["autoencoder"]) / self.pipe.vae.config.scaling_factor
        z = z.contiguous(memory_format=self.format)
        return self.pipe.vae.decode(z, return_dict=False)[0].float()

    def velocity(self, moment: Moment) -> Tensor:
        dtype, length = self.dtypes["dit"], self.weights.config.max_text_tokens
        states = nn.functional.pad(moment.states, (0, 0, 0, length - moment.states.shape[1]))  # as their pipeline pads
        mask = (torch.arange(length, device=states.device) < moment.lengths[:, None]).long()
        extra = {}
        if moment.guidance is not None:
            extra["guidance"] = moment.guidance.to(dtype) * self.pipe.transformer.config.guidance_embeds_scale
        return self.pipe.transformer(
            moment.latents.to(dtype), encoder_hidden_states=states.to(dtype), encoder_attention_mask=mask,
            timestep=moment.timestep * self.weights.config.dit.timestep_scale, return_dict=False, **extra,
        )[0].float()  # fmt: skip

    @property
    def judged(self) -> dict[str, str]:
        return self.name.precisions

    def plan(self) -> dict:
        return {
            "backend": self.name.backend, "pipeline": type(self.pipe).__name__,
            "decoder_memory_format": str(self.format).removeprefix("torch."), "memory_format_trial_ms": self.trial_ms,
        }  # fmt: skip

    def close(self) -> None:
        self.__dict__ = {"name": self.name, "weights": self.weights}


class CompiledDiffusers(DiffusersRun):
    """The same with DiT and decoder compiled, as its users do; the text encoder stays as it is."""

    again = ("dit", "autoencoder")  # frozen, in the compiler's layout

    def prepare(self, settings: Settings) -> None:
        super().prepare(settings)
        self.options = compile_options(self.weights.device)
        self.pipe.transformer.compile(**self.options)
        self.pipe.vae.decoder.compile(**self.options)

    def plan(self) -> dict:
        return super().plan() | {"compiled": ["dit", "decoder"], "torch.compile": self.options}


class OpenVINO(DiffusersRun):
    """The same with DiT and decoder compiled by OpenVINO. (Its torch.compile backend fails on them.)"""

    again = ("dit", "autoencoder")  # in the compiler's layout

    def prepare(self, settings: Settings) -> None:
        for part in ("dit", "autoencoder"):
            openvino.check_installed(self.name.precisions[part])
        super().prepare(settings)
        inputs, latents = self._record(settings)
        fp32 = {part: copy.deepcopy(getattr(self.weights.loaded, part)).float() for part in ("dit", "autoencoder")}
        transformer, decoder = self.pipe.transformer, self.pipe.vae.decoder
        dit = openvino.compiled(diffusers_transformer(fp32["dit"]), inputs, self.name.precision, return_dict=False)
        decode = openvino.compiled(
            diffusers_autoencoder(fp32["autoencoder"]).decoder,
            [{"hidden_states": latents}],
            self.name.precisions["autoencoder"],
        )
        transformer.forward = lambda hidden_states, return_dict, attention_kwargs=None, **rest: (
            dit(hidden_states=hidden_states, **rest).to(self.dtypes["dit"]),
        )
        decoder.forward = lambda z: decode(hidden_states=z).to(self.dtypes["autoencoder"])

    def _record(self, settings: Settings) -> tuple[list[dict[str, Tensor]], Tensor]:
        """What the DiT is called with in the first steps of a picture, and the decoder after them."""
        calls, transformer = [], self.pipe.transformer
        hook = transformer.register_forward_pre_hook(
            lambda _module, args, inputs: calls.append({"hidden_states": args[0]} | inputs), with_kwargs=True
        )
        side = self.weights.config.autoencoder.spatial_compression
        noise = torch.randn(
            settings.count, self.weights.config.dit.in_channels, settings.height // side, settings.width // side
        )
        few = replace(settings, steps=min(settings.steps, CALIBRATION_STEPS))
        latents = self.denoise(few, self.text_encode(few), noise)
        hook.remove()
        tensors = [{name: value for name, value in call.items() if isinstance(value, Tensor)} for call in calls]
        return tensors, latents[:1] / self.pipe.vae.config.scaling_factor

    def plan(self) -> dict:
        return super().plan() | {"compiled": ["dit", "decoder"], "openvino": importlib.metadata.version("openvino")}


def compile_options(device: torch.device) -> dict:
    """torch.compile at its fastest: max-autotune, with frozen weights on a CPU and CUDA graphs on a GPU."""
    options = dict(torch._inductor.list_mode_options("max-autotune")) | {"freezing": device.type == "cpu"}
    return {"options": options, "dynamic": False}
