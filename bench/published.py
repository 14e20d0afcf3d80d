"""The figures that papers print, LPIPS, CLIP score and Inception features for FID, where torchmetrics finds their weights.

Nothing here downloads: a network counts as found when its weights lie in the cache of torch.hub or of the hub already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

CLIP, CLIP_FILES = "openai/clip-vit-large-patch14", ("model.safetensors", "pytorch_model.bin")
ALEXNET, INCEPTION = "alexnet-owt-7be5be79.pth", "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Published:
    """Functions of pictures (B, 3, H, W) uint8; None where the weights are not here."""

    lpips: Callable[[Tensor, Tensor], list[float]] | None = None  # (pictures, originals): AlexNet, version 0.1
    clip: Callable[[Tensor, Sequence[str]], list[float]] | None = None  # (pictures, prompts): 100 × cosine, ViT-L/14
    inception: Callable[[Tensor], Tensor] | None = None  # pictures → (B, 2048)


def find(device: torch.device) -> Published:
    """What can be had without a download."""
    if find_spec("torchmetrics") is None:
        return Published()
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    lpips = clip = inception = None
    if find_spec("torchvision") and (checkpoints / ALEXNET).is_file():
        lpips = _lpips(device)
    if find_spec("transformers") and any(isinstance(try_to_load_from_cache(CLIP, file), str) for file in CLIP_FILES):
        clip = _clip(device)
    if find_spec("torch_fidelity") and (checkpoints / INCEPTION).is_file():
        inception = _inception(device)
    return Published(lpips, clip, inception)


def _lpips(device: torch.device) -> Callable[[Tensor, Tensor], list[float]]:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    def lpips(pictures: Tensor, originals: Tensor) -> list[float]:
        pairs = zip((pictures / 255).split(1), (originals / 255).split(1), strict=True)
        return [metric(picture, original).item() for picture, original in pairs]

    return lpips


def _clip(device: torch.device) -> Callable[[Tensor, Sequence[str]], list[float]]:
    from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore(CLIP).to(device)
    return lambda pictures, prompts: [metric(*pair).item() for pair in zip(pictures, prompts, strict=True)]


def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return lambda pictures: network(pictures).float()
