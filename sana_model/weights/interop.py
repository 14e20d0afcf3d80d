"""Our networks as the classes of diffusers and transformers, in the same memory, for parity tests and benchmarks.

The parameters of what is returned are views of ours: two implementations, one copy of the weights, whatever their size.
"""

import tempfile
from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor, nn

from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.dit import DiT
from sana_model.errors import MissingError
from sana_model.text_encoder import TextEncoder
from sana_model.tokenizer import ByteTokenizer
from sana_model.weights import checkpoint_config as configs
from sana_model.weights.keys import to_diffusers


def package(name: str):
    """An optional package. Raises MissingError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingError(f"this needs {name}: pip install 'sana-kernels[hf]'") from error


def _share(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, assign=True)
    on_meta = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    assert not on_meta, f"{type(module).__name__} has tensors of its own: {on_meta}"
    return module.requires_grad_(False).eval()


def diffusers_transformer(dit: DiT) -> nn.Module:
    """diffusers' `SanaTransformer2DModel` on the parameters of `dit`.

    It clips the self-attention output to fp16's range only in fp16, and takes guidance already multiplied by
    `guidance_embeds_scale` and times already multiplied by `timestep_scale`. Raises MissingError without diffusers.
    """
    diffusers = package("diffusers")
    fields = {key: value for key, value in configs.write_dit(dit.config).items() if not key.startswith("_")}
    with torch.device("meta"):
        model = diffusers.SanaTransformer2DModel(**fields)
    if dit.config.pos_embed_scale is not None:
        embed, weight = model.patch_embed, dit.patch_embed.weight
        own = type(embed)(
            embed.height, embed.width, 1, dit.config.in_channels, dit.config.hidden,
            interpolation_scale=dit.config.pos_embed_scale,
        )  # fmt: skip
        embed.pos_embed = own.pos_embed.to(weight.device, weight.dtype)
    return _share(model, to_diffusers(dit.state_dict(), dit.config))


def diffusers_autoencoder(autoencoder: Autoencoder) -> nn.Module:
    """diffusers' `AutoencoderDC` on the parameters of `autoencoder`. Raises MissingError without diffusers."""
    fields = configs.write_autoencoder(autoencoder.config)
    with torch.device("meta"):
        model = package("diffusers").AutoencoderDC(**{k: v for k, v in fields.items() if not k.startswith("_")})
    return _share(model, autoencoder.state_dict())


def transformers_text_encoder(encoder: TextEncoder) -> nn.Module:
    """transformers' Gemma2Model or Gemma3TextModel on the parameters of `encoder`; MissingError without transformers."""
    transformers = package("transformers")
    weight = encoder.embed_tokens.weight
    kind = getattr(transformers, configs.text_encoder_class(encoder.config))
    config = kind.config_class(**configs.write_text_encoder(encoder.config, str(weight.dtype).split(".")[1]))
    config._attn_implementation = "eager"  # the others leave the soft-cap out
    with torch.device("meta"):
        model = kind(config)
    model.rotary_emb = type(model.rotary_emb)(config).to(weight.device)
    model.embed_tokens.embed_scale = torch.tensor(encoder.config.hidden**0.5, device=weight.device)
    return _share(model, encoder.state_dict())


def transformers_tokenizer(model) -> object:
    """transformers' tokenizer for a LoadedModel or Pipeline.model, giving the same ids."""
    transformers = package("transformers")
    if model.tokenizer_folder is not None:
        return transformers.AutoTokenizer.from_pretrained(model.tokenizer_folder)
    with tempfile.TemporaryDirectory() as folder:
        ByteTokenizer().save(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


def diffusers_pipeline(model) -> object:
    """diffusers' SanaPipeline or SanaSprintPipeline on the parameters of a LoadedModel, or a Pipeline's `model`."""
    diffusers = package("diffusers")
    schedule = configs.write_scheduler(model.config.scheduler)
    scheduler = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
    kind = diffusers.SanaSprintPipeline if model.config.dit.guidance_embeds else diffusers.SanaPipeline
    return kind(
        tokenizer=transformers_tokenizer(model),
        text_encoder=transformers_text_encoder(model.text_encoder),
        vae=diffusers_autoencoder(model.autoencoder),
        transformer=diffusers_transformer(model.dit),
        scheduler=scheduler,
    )
