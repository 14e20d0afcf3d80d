"""The figures of `sana bench quality`, as plain functions of pictures and features.

Pictures are (B, 3, H, W) uint8, as they would be saved: that is what a person sees. Functions of pairs of pictures give a
value for each pair, (B,), so that a mean can have an interval.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CAP = 100.0  # dB, for equal pictures: JSON has no infinity; one value of 256² that is off by one gives 101
KID_SUBSETS, KID_SUBSET = 100, 1000  # as published


def to_bytes(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], up to overshoot → uint8, as the pipeline saves them."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------ two pictures


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB; 100 for equal pictures."""
    error = (pictures.double() - originals.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp_max(PSNR_CAP)


def ssim(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13): 11 × 11 Gaussian windows of σ 1.5, mean over windows and channels.

    Only windows that lie within the picture count; both sides must be at least 11.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    offsets = torch.arange(-5.0, 6.0, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).to(pictures.device)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, 1, 11)), window.view(1, 1, 11, 1))

    def of_pair(x: Tensor, y: Tensor) -> Tensor:
        x, y = x[:, None].double(), y[:, None].double()  # channels are a batch here
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * cov + c2) / (var_x + var_y + c2)
        return (luminance * structure).mean()

    return torch.stack([of_pair(x, y) for x, y in zip(pictures, originals, strict=True)])


def feature_distance(features: Sequence[Tensor], originals: Sequence[Tensor]) -> Tensor:
    """Distance of feature maps, a list of (B, C, h, w) each, as in LPIPS (arXiv 1801.03924, eq. 1) without its weights.

    The features of each pixel are brought to unit length; squared distances are averaged over pixels and maps.
    """

    def of_map(a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.normalize(x.float(), dim=1, eps=1e-6) for x in (a, b))
        return (a - b).square().sum(1).mean((1, 2))

    return torch.stack([of_map(a, b) for a, b in zip(features, originals, strict=True)]).mean(0)


# ------------------------------------------------------------------------------------------------ one picture


def background(pictures: Tensor, colours: Tensor) -> Tensor:
    """Which of `colours` (K, 3) in 0..255 is behind each picture, (B,): the one nearest to most pixels of its rim.

    The rim is a 32nd of the side wide. What is painted may reach it in places; it does not fill it.
    """
    width = max(1, min(pictures.shape[-2:]) // 32)
    inside = torch.zeros(pictures.shape[-2:], dtype=torch.bool, device=pictures.device)
    inside[width:-width, width:-width] = True
    rim = pictures[:, :, ~inside].float().transpose(1, 2)  # (B, pixels, 3)
    nearest = torch.cdist(rim, colours.to(rim)).argmin(-1)
    return F.one_hot(nearest, len(colours)).sum(1).argmax(-1)


# ------------------------------------------------------------------------------------------------ two sets of pictures


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D), (M, D) taken as normal (arXiv 1706.08500, eq. 6), squared.

    With N or M not far above D it is biased upwards.
    """
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The trace of (Σx Σy)^½ is that of (Σx^½ Σy Σx^½)^½, which is symmetric.
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def kernel_distance(x: Tensor, y: Tensor, seed: int = 0) -> float:
    """Kernel distance of two sets of features (N, D), (M, D): squared maximum mean discrepancy under (x·y / D + 1)³.

    Unbiased, so it can be slightly negative (arXiv 1801.01401, section 4); the mean of 100 random subsets of up to 1000.
    """
    x, y = x.double(), y.double()
    count = min(KID_SUBSET, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)
    rounds = 1 if count == len(x) == len(y) else KID_SUBSETS

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def one_round() -> float:
        a, b = (z[torch.randperm(len(z), generator=generator)[:count]] for z in (x, y))
        same = sum((k := kernel(z, z)).sum() - k.trace() for z in (a, b)) / (count * (count - 1))
        return (same - 2 * kernel(a, b).mean()).item()

    return sum(one_round() for _ in range(rounds)) / rounds


# ------------------------------------------------------------------------------------------------ intervals


def bootstrap_interval(values: Tensor, seed: int = 0) -> list[float]:
    """95 % interval of the mean of `values` (N,): percentiles of the means of 2000 resamples."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (2000, len(values)), generator=generator)
    means = values.double()[chosen].mean(1)
    return torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def wilson_interval(successes: int, count: int) -> list[float]:
    """95 % interval of a proportion (Wilson 1927); sensible at 0 and 1, too."""
    z = 1.959964
    centre = (successes + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(successes * (count - successes) / count + z**2 / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]
