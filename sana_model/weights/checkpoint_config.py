"""What the parts of a checkpoint say about themselves: diffusers' config.json files ↔ our dataclasses.

Reading is strict: a setting that changes the computation and that we do not compute is a UserError that names it,
never a wrong picture.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sana_model.config import BUILT_IN, AutoencoderConfig, DiTConfig, SchedulerConfig, TextEncoderConfig
from sana_model.errors import UserError

QK_NORM = "rms_norm_across_heads"
PIPELINES = ("SanaPipeline", "SanaPAGPipeline", "SanaSprintPipeline")


class Fields:
    """A config.json being read: takes fields one by one and can say, naming file and field, what is not supported."""

    def __init__(self, values: Mapping, file: str | Path):
        self.values, self.file = values, file
        self._taken: set[str] = set()

    def get(self, key: str, default):
        """The field, of the type of its default (or null) if that is a number or a flag; a whole number is positive."""
        self._taken.add(key)
        value, kind = self.values.get(key, default), type(default)
        kinds = {bool: (bool,), int: (int,), float: (int, float)}.get(kind)
        if value is None or kinds is None or (type(value) in kinds and (kind is not int or value > 0)):
            return value
        wanted = {bool: "true or false", int: "a positive whole number", float: "a number"}[kind]
        raise UserError(f"{self.file}: {key} is {json.dumps(value)}; it must be {wanted}")

    def require(self, key: str, *allowed, default=None) -> None:
        """The field is one of the `allowed` values (or absent, where `default` is allowed)."""
        self._taken.add(key)
        value = self.values.get(key, allowed[0] if default is None else default)
        if value not in allowed:
            supported = " or ".join(json.dumps(a) for a in allowed)
            raise UserError(f"{self.file}: {key} is {json.dumps(value)}; supported is {supported}")

    def no_others(self) -> None:
        """Nothing else is set: it would be a setting of a newer diffusers, which changes the computation."""
        for key, value in self.values.items():
            if key not in self._taken and not key.startswith("_") and value not in (None, False):
                raise UserError(f"{self.file}: {key} is {json.dumps(value)}; this setting is not known here")


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; the folder is not a complete diffusers model") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); the download may be incomplete") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, not the fields of a configuration")
    return values


# ---------------------------------------------------------------------------------------------- the DiT


def read_dit(values: Mapping, file: str | Path) -> DiTConfig:
    """transformer/config.json → DiTConfig. Absent fields have diffusers' defaults (the 1.6B model)."""
    f = Fields(values, file)
    f.require("_class_name", "SanaTransformer2DModel")
    f.require("patch_size", 1)
    f.require("attention_bias", False)
    f.require("norm_elementwise_affine", False)
    heads, head_dim = f.get("num_attention_heads", 70), f.get("attention_head_dim", 32)
    cross_heads = f.get("num_cross_attention_heads", 20)
    C = heads * head_dim
    f.require("cross_attention_dim", C, default=2240)
    f.require("cross_attention_head_dim", C // cross_heads, default=112)
    f.require("qk_norm", None, QK_NORM)
    f.get("dropout", 0.0)  # training only
    in_channels = f.get("in_channels", 32)
    config = DiTConfig(
        hidden=C,
        layers=f.get("num_layers", 20),
        head_dim=head_dim,
        cross_heads=cross_heads,
        mlp_ratio=f.get("mlp_ratio", 2.5),
        in_channels=in_channels,
        out_channels=f.get("out_channels", 32) or in_channels,
        caption_channels=f.get("caption_channels", 2304),
        sample_size=f.get("sample_size", 32),
        qk_norm=f.get("qk_norm", None) is not None,
        pos_embed_scale=f.get("interpolation_scale", None),
        guidance_embeds=f.get("guidance_embeds", False),
        guidance_embeds_scale=f.get("guidance_embeds_scale", 0.1),
        timestep_scale=f.get("timestep_scale", 1.0),
        norm_eps=f.get("norm_eps", 1e-6),
    )
    f.no_others()
    return config


def write_dit(config: DiTConfig) -> dict:
    """DiTConfig → transformer/config.json."""
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.layers,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.cross_head_dim,
        "cross_attention_dim": config.hidden,
        "caption_channels": config.caption_channels,
        "mlp_ratio": config.mlp_ratio,
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": config.sample_size,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": config.norm_eps,
        "interpolation_scale": config.pos_embed_scale,
        "guidance_embeds": config.guidance_embeds,
        "guidance_embeds_scale": config.guidance_embeds_scale,
        "qk_norm": QK_NORM if config.qk_norm else None,
        "timestep_scale": config.timestep_scale,
    }


def infer_dit(shapes: Mapping[str, tuple[int, ...]], dialect: str, file: Path, base: DiTConfig | None) -> DiTConfig:
    """The model of a lone checkpoint file, from the shapes of its tensors and its name.

    The number of cross-attention heads leaves no trace in the shapes; it and all other settings that are not shapes
    come from `base`, or else from the published model of the same width.
    """
    block, linear, norm, guidance = {
        "diffusers": (
            "transformer_blocks",
            "caption_projection.linear_1.weight",
            "attn1.norm_q.weight",
            "guidance_embedder",
        ),
        "original": ("blocks", "y_embedder.y_proj.fc1.weight", "attn.q_norm.weight", "cfg_embedder"),
    }[dialect]
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{block}\.(\d+)\.", name))]
    if linear not in shapes or not numbers:
        raise UserError(f"{file}: no key {linear if linear not in shapes else block + '.0'}; not a complete SANA DiT")
    C, caption = shapes[linear]
    known = [base] if base is not None else []
    twin = next((c for c in [*known, *(m.dit for m in BUILT_IN.values())] if c.hidden == C), None)
    if twin is None:
        raise UserError(
            f"{file}: a DiT of width {C} is not a published one; pass the folder of its configuration as base"
        )
    config = replace(
        twin, layers=max(numbers) + 1, caption_channels=caption, qk_norm=f"{block}.0.{norm}" in shapes,
        guidance_embeds=any(guidance in name for name in shapes),
    )  # fmt: skip
    if twin is base:
        return config
    # Published sizes, by the original's position table (present, though unused, up to 1024 px) or the name of the file.
    side = {256: 16, 1024: 32, 4096: 64, 16384: 128}.get(shapes.get("pos_embed", (0, 0))[1])
    named = re.search(r"(512|1024|2K|4K)px", file.name)
    side = side or ({"512": 16, "1024": 32, "2K": 64, "4K": 128}[named[1]] if named else config.sample_size)
    return replace(config, sample_size=side, pos_embed_scale={64: 1.0, 128: 2.0}.get(side))


# ---------------------------------------------------------------------------------------------- the other parts


GEMMA3 = TextEncoderConfig(
    attn_softcap=None, full_every=6, rope_theta=1e4, full_rope_theta=1e6, qk_norm=True, vocab=262208
)
"""transformers' defaults of Gemma-3."""


def read_text_encoder(values: Mapping, file: str | Path) -> TextEncoderConfig:
    """text_encoder/config.json of Gemma-2 or Gemma-3 → TextEncoderConfig."""
    f = Fields(values, file)
    f.require("model_type", "gemma2", "gemma3_text")
    f.require("attention_bias", False)
    f.require("hidden_activation", "gelu_pytorch_tanh")
    f.require("use_bidirectional_attention", None, False)
    third = f.get("model_type", "gemma2") == "gemma3_text"
    ours = GEMMA3 if third else TextEncoderConfig()
    layers = f.get("num_hidden_layers", ours.layers)
    full_every = f.get("sliding_window_pattern", ours.full_every)
    pattern = ["sliding_attention"] * (full_every - 1) + ["full_attention"]
    f.require("layer_types", None, [pattern[i % full_every] for i in range(layers)])
    rope = f.get("rope_parameters", None) or {}
    sliding, full = (rope.get(f"{kind}_attention", rope) for kind in ("sliding", "full"))
    for parameters in (sliding, full, f.get("rope_scaling", None) or {}):
        if parameters.get("rope_type", "default") != "default":
            raise UserError(f"{file}: rope_type is {parameters['rope_type']!r}; supported is 'default'")
    # What Gemma-2 calls rope_theta is, in Gemma-3, the base of the layers that see everything.
    theta = f.get("rope_local_base_freq" if third else "rope_theta", ours.rope_theta)
    full_theta = f.get("rope_theta", ours.full_rope_theta) if third else None
    window = f.get("sliding_window", ours.sliding_window)
    return TextEncoderConfig(
        vocab=f.get("vocab_size", ours.vocab),
        hidden=f.get("hidden_size", ours.hidden),
        layers=layers,
        heads=f.get("num_attention_heads", ours.heads),
        kv_heads=f.get("num_key_value_heads", ours.kv_heads),
        head_dim=f.get("head_dim", ours.head_dim),
        ffn=f.get("intermediate_size", ours.ffn),
        query_pre_attn_scalar=float(f.get("query_pre_attn_scalar", ours.query_pre_attn_scalar)),
        attn_softcap=f.get("attn_logit_softcapping", ours.attn_softcap),
        sliding_window=f.get("max_position_embeddings", 8192) if window is None else window,
        full_every=full_every,
        rope_theta=float(sliding.get("rope_theta", theta)),
        full_rope_theta=float(full.get("rope_theta", full_theta)) if third else None,
        qk_norm=third,
        norm_eps=f.get("rms_norm_eps", ours.norm_eps),
    )


def text_encoder_class(config: TextEncoderConfig) -> str:
    """The name that the text encoder's class has in transformers."""
    return "Gemma3TextModel" if config.qk_norm else "Gemma2Model"


def write_text_encoder(config: TextEncoderConfig, dtype: str) -> dict:
    """TextEncoderConfig → text_encoder/config.json; `dtype` as in "bfloat16"."""
    scalar = config.query_pre_attn_scalar
    if config.qk_norm:
        kind = {"model_type": "gemma3_text", "sliding_window_pattern": config.full_every}
        kind |= {"rope_local_base_freq": config.rope_theta, "rope_theta": config.full_rope_theta}
    else:
        kind = {"model_type": "gemma2", "rope_theta": config.rope_theta}
    return {
        "architectures": [text_encoder_class(config)],
        **kind,
        "torch_dtype": dtype,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attn_softcap,
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": False,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


_PER_STAGE = ("block_types", "qkv_multiscales")  # of encoder and decoder each
_NAMES = {"encoder_layers": "encoder_layers_per_block", "decoder_layers": "decoder_layers_per_block"}
_NAMES |= {"decoder_norms": "decoder_norm_types", "decoder_activations": "decoder_act_fns"}
_NAMES |= {f"{side}_{key}": f"{side}_{key}" for side in ("encoder", "decoder") for key in _PER_STAGE}
"""What is told per stage: field of AutoencoderConfig → diffusers' name."""


def read_autoencoder(values: Mapping, file: str | Path) -> AutoencoderConfig:
    """vae/config.json → AutoencoderConfig. Absent fields have diffusers' defaults."""
    f, ours = Fields(values, file), AutoencoderConfig()
    f.require("_class_name", "AutoencoderDC")
    f.require("in_channels", 3)
    widths = {side: tuple(f.get(f"{side}_block_out_channels", ours.widths)) for side in ("encoder", "decoder")}
    if widths["encoder"] != widths["decoder"]:
        raise UserError(
            f"{file}: encoder_block_out_channels and decoder_block_out_channels differ; supported are equal ones"
        )
    widths = widths["decoder"]
    defaults = {field: getattr(ours, field) for field in _NAMES}
    defaults |= dict.fromkeys(("encoder_block_types", "decoder_block_types"), "ResBlock")

    def per_stage(field: str) -> tuple:
        value = f.get(_NAMES[field], defaults[field])
        value = (value,) * len(widths) if isinstance(value, str) else tuple(value)
        if len(value) != len(widths):
            raise UserError(f"{file}: {_NAMES[field]} has {len(value)} stages, but there are {len(widths)} widths")
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)

    stages = {field: per_stage(field) for field in _NAMES}
    choices = {
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_norms": ("rms_norm", "batch_norm"), "decoder_activations": ("silu", "relu"),
    }  # fmt: skip
    for field, known in choices.items():
        if unknown := set(stages[field]) - set(known):
            raise UserError(
                f"{file}: {_NAMES[field]} has {json.dumps(unknown.pop())}; supported are {' and '.join(known)}"
            )
    f.require("upsample_block_type", "interpolate", "pixel_shuffle", default="pixel_shuffle")
    f.require("downsample_block_type", "Conv", "conv", "pixel_unshuffle", default="pixel_unshuffle")
    f.require("decoder_conv_act_fn", "relu", "silu", default="relu")
    config = AutoencoderConfig(
        latent_channels=f.get("latent_channels", ours.latent_channels),
        head_dim=f.get("attention_head_dim", ours.head_dim),
        widths=widths,
        **stages,
        downsample=f.get("downsample_block_type", "pixel_unshuffle").lower(),
        upsample=f.get("upsample_block_type", "pixel_shuffle"),
        encoder_out_shortcut=f.get("encoder_out_shortcut", True),
        decoder_in_shortcut=f.get("decoder_in_shortcut", True),
        out_activation=f.get("decoder_conv_act_fn", "relu"),
        scaling_factor=f.get("scaling_factor", 1.0),
    )
    f.no_others()
    return config


def write_autoencoder(config: AutoencoderConfig) -> dict:
    """AutoencoderConfig → vae/config.json."""
    return {
        "_class_name": "AutoencoderDC",
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        "encoder_block_out_channels": config.widths,
        "decoder_block_out_channels": config.widths,
        **{name: getattr(config, field) for field, name in _NAMES.items()},
        "upsample_block_type": config.upsample,
        "downsample_block_type": "Conv" if config.downsample == "conv" else config.downsample,
        "encoder_out_shortcut": config.encoder_out_shortcut,
        "decoder_in_shortcut": config.decoder_in_shortcut,
        "decoder_conv_act_fn": config.out_activation,
        "scaling_factor": config.scaling_factor,
    }


_FLOW_DPM = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
}
_KINDS = {
    "DPMSolverMultistepScheduler": "flow_dpm",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "SCMScheduler": "scm",
}
_OFF = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting",
    "thresholding", "invert_sigmas", "shift_terminal", "stochastic_sampling",
)  # fmt: skip
"""What makes diffusers' flow schedulers take other steps than ours. The rest of what they store has no part in flows:
betas, the spacing of timesteps, and `euler_at_final` where the last sigma is zero."""


def read_scheduler(values: Mapping, file: str | Path) -> SchedulerConfig:
    """scheduler/scheduler_config.json → SchedulerConfig."""
    f = Fields(values, file)
    f.require("_class_name", *_KINDS, default="absent")
    kind = _KINDS[values["_class_name"]]
    for key in _OFF:
        f.require(key, False, None)
    f.require("num_train_timesteps", _FLOW_DPM["num_train_timesteps"])
    if kind == "scm":
        f.require("prediction_type", "trigflow")
        return SchedulerConfig(kind, sigma_data=f.get("sigma_data", 0.5))
    if kind == "flow_euler":
        return SchedulerConfig(kind, flow_shift=f.get("shift", 1.0))
    f.require("prediction_type", "flow_prediction", default="epsilon")
    f.require("use_flow_sigmas", True, default=False)
    for key in ("algorithm_type", "solver_order", "solver_type", "lower_order_final", "final_sigmas_type"):
        f.require(key, _FLOW_DPM[key])
    return SchedulerConfig(kind, flow_shift=f.get("flow_shift", 1.0))


def write_scheduler(config: SchedulerConfig) -> dict:
    """SchedulerConfig → scheduler/scheduler_config.json."""
    name = next(name for name, kind in _KINDS.items() if kind == config.kind)
    if config.kind == "scm":
        return {
            "_class_name": name,
            "prediction_type": "trigflow",
            "sigma_data": config.sigma_data,
            "num_train_timesteps": 1000,
        }
    if config.kind == "flow_euler":
        return {"_class_name": name, "shift": config.flow_shift, "num_train_timesteps": 1000}
    return {"_class_name": name, **_FLOW_DPM, "flow_shift": config.flow_shift}
