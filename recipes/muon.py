"""Muon: momentum, with every update of a weight matrix made orthogonal (Keller Jordan et al., 2024).

A gradient's few large singular values drown the many small ones. Muon replaces all of them by about 1, so that every
direction of a matrix learns at one speed; on both networks of `sana-tiny` that takes about half the steps of AdamW.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SMALLEST = 16  # rows or columns; what is narrower than this (depthwise kernels, RGB, tables) is no matrix to speak of
MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.7750, 2.0315)  # pushes singular values towards 1 fast; they end between 0.7 and 1.2


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon is for it: a linear layer's weight, or a convolution's, taken as (out, in · kernel)."""
    return parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) >= SMALLEST


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """U·Vᵀ of the singular value decomposition of (rows, columns), roughly: Newton-Schulz iterations in bf16."""
    a, b, c = _QUINTIC
    tall = len(matrix) > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices only. The RMS of an update is 0.2 · lr, about AdamW's: one rate serves both (arXiv 2502.16982)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                update = p.grad.lerp(momentum, MOMENTUM)  # Nesterov's
                matrix = update.flatten(1)
                scale = 0.2 * math.sqrt(max(matrix.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(matrix).view(p.shape), alpha=-group["lr"] * scale)
