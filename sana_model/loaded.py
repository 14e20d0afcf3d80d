"""A model in memory: its configuration and its four parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sana_model.autoencoder import Autoencoder
from sana_model.config import ModelConfig
from sana_model.dit import DiT
from sana_model.text_encoder import TextEncoder
from sana_model.tokenizer import Tokenizer


@dataclass
class LoadedModel:
    """What `load_model` and `random_model` return. A part that was not asked for is None."""

    config: ModelConfig
    dit: DiT | None
    text_encoder: TextEncoder | None
    tokenizer: Tokenizer | None
    autoencoder: Autoencoder | None
    source: str  # where the weights are from: a path, a hub id, or "sana-tiny (random weights, seed 0)"
    random: bool  # some of the weights are random: the pictures mean nothing
    tokenizer_folder: Path | None = None  # None: the byte tokenizer of the random models
    load_text_encoder: Callable[[], TextEncoder] | None = None

    def reload_text_encoder(self) -> "LoadedModel":
        """The same model with the text encoder read again, after it was let go to save memory."""
        encoder = self.load_text_encoder()
        if self.dit is not None:
            encoder.to(self.dit.patch_embed.weight.device)
        return replace(self, text_encoder=encoder)
