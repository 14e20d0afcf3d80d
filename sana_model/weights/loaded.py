"""A model in memory: its configuration and its four parts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sana_model.autoencoder.dc_ae import Autoencoder
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
    load_text_encoder: Callable[[], TextEncoder] | None = None  # reads it again, after it was let go to save memory
