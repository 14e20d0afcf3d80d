"""What does a picture show? Concept, style and background, and what a caption had asked for.

Concept and style come from two linear classifiers on the features of EfficientNet-Lite1, the background from pixels.
`recipes/fit_scorer.py` fits the classifiers on the real renders and writes both files that are read here:

    quality_scorer.safetensors    weights in fp16, names of concepts, styles and colours; features of some real pictures
    quality_prompts.json          captions with what they ask for; every second pair was held out of the training
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sana_bench import metrics

HERE = Path(__file__).parent
WEIGHTS, PROMPTS = HERE / "quality_scorer.safetensors", HERE / "quality_prompts.json"


@dataclass(frozen=True)
class Asked:
    """What a caption asks for."""

    prompt: str
    concept: str
    style: str
    colour: str
    held_out: bool  # this concept was never seen in this style


@dataclass(frozen=True)
class Verdict:
    """Which of it a picture shows."""

    held_out: bool
    concept: bool
    style: bool
    background: bool


def prompts_of_concepts() -> list[Asked]:
    """The fixed list, seen and held-out pairs in turn."""
    return [Asked(**entry) for entry in json.loads(PROMPTS.read_text(encoding="utf-8"))]


class Scorer:
    """The classifiers. `ceilings` says how often they are right about real pictures: {pixels: {factor: fraction}}."""

    def __init__(self, file: str | Path = WEIGHTS):
        with safe_open(file, "pt") as opened:
            names = opened.metadata()
            self.concepts, self.styles = (json.loads(names[key]) for key in ("concepts", "styles"))
            colours = json.loads(names["colours"])
            self.ceilings = {int(size): values for size, values in json.loads(names["ceilings"]).items()}
            self._concept, self._style = (
                (opened.get_tensor(f"{factor}.weight").float(), opened.get_tensor(f"{factor}.bias"))
                for factor in ("concept", "style")
            )
        self.colours, self._palette = list(colours), torch.tensor(list(colours.values()))

    def concept(self, features: Tensor) -> Tensor:
        """Pooled features (B, 1280) → indices into `concepts`, (B,)."""
        return _most_likely(features, *self._concept)

    def style(self, features: Tensor) -> Tensor:
        """Pooled features (B, 1280) → indices into `styles`, (B,)."""
        return _most_likely(features, *self._style)

    def background(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 → indices into `colours`, (B,)."""
        return metrics.background(pictures, self._palette)

    def judge(self, asked: Iterable[Asked | None], pictures: Tensor, features: Tensor) -> list[Verdict]:
        """One verdict per picture whose caption asks for something."""
        found = zip(
            asked, self.concept(features).tolist(), self.style(features).tolist(), self.background(pictures).tolist(),
            strict=True,
        )  # fmt: skip
        return [
            Verdict(
                wanted.held_out, self.concepts[concept] == wanted.concept, self.styles[style] == wanted.style,
                self.colours[colour] == wanted.colour,
            )
            for wanted, concept, style, colour in found
            if wanted is not None
        ]  # fmt: skip

    def ceiling(self, pixels: int) -> dict[str, float]:
        """The accuracies on real pictures of about that size."""
        return self.ceilings[min(self.ceilings, key=lambda size: abs(size - pixels))]


def _most_likely(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (features.float().cpu() @ weight.T + bias).argmax(-1)
