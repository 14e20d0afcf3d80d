"""SANA, prompt to picture, written in terms of the ops of `sana_kernels`.

    pipe = sana_model.load("sana-tiny", backend="auto", precision="bf16")
    result = pipe("a red fox", seed=42)
    result.images[0].save("fox.png")

Read it in the order of the data: `prompt` and `text_encoder` → `pipeline` → `dit` → `scheduler` → `autoencoder`.
"""

from sana_model.config import BUILT_IN, ModelConfig
from sana_model.errors import MissingError, UserError

__all__ = ["BUILT_IN", "MissingError", "ModelConfig", "Pipeline", "Result", "Settings", "UserError", "load"]


def __getattr__(name: str):
    """`Pipeline`, `Result`, `Settings` and `load` bring torch with them, so they are imported when first asked for."""
    if name in __all__:
        from sana_model import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
