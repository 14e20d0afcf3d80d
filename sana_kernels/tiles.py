"""Which tile a Triton kernel works in: a pure function of op, shape and architecture, from the table in tiles.json.

Nothing is tuned while a picture is painted, so the same seed gives the same bytes; `sana tune` measures, and proposes
another table. A row of it is one tile of a matrix product, [m, n, k, warps, stages, speed]. Speed compares the tiles of a
list while every multiprocessor has one to work on, 1 for the fastest. `gemm_tile` weighs it against idle multiprocessors:
a product takes as many rounds as there are tiles per multiprocessor, and a round costs m · n / speed.

So SANA's 2048 × 2240 on 132 multiprocessors takes 2 rounds of 128 × 256 (speed 1: 65,536), 3 of 128 × 128 (0.85: 57,826)
or 5 of 128 × 64 (0.65: 63,015). It becomes 128 × 128, although 2240 is 17.5 of them.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE: dict[int, dict] = {
    int(name): rows for name, rows in json.loads(Path(__file__).with_suffix(".json").read_text()).items()
}
INTERPRETED = 90  # the architecture whose tiles Triton's interpreter takes


class Tile(NamedTuple):
    """A program's part of a matrix product, m × n in steps of k, and how it runs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # loads of k that are under way at once


@cache
def arch(device: torch.device) -> int:
    """The GPU's compute capability, 90 for 9.0."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def known(arch: int) -> int:
    """The entry of the table that a GPU uses: its own or the next older one."""
    return max((a for a in TABLE if a <= arch), default=min(TABLE))


def candidates(dtype: torch.dtype, residual: bool, arch: int) -> list[tuple[Tile, float]]:
    """The tiles to choose from, each with its speed; a tile of a residual needs registers, too, so they are smaller."""
    rows = TABLE[known(arch)]["gemm with residual" if residual else "gemm"][_name(dtype)]
    return [(Tile(*row[:5]), row[5]) for row in rows]


@cache
def gemm_tile(dtype: torch.dtype, residual: bool, images: int, rows: int, columns: int, arch: int) -> Tile:
    """The tile for `images` products of rows × columns, with operands of this dtype and with a residual or without."""
    processors = TABLE[known(arch)]["processors"]

    def cost(candidate: tuple[Tile, float]) -> float:
        tile, speed = candidate
        tiles = images * -(-rows // tile.m) * -(-columns // tile.n)
        return -(-tiles // processors) * tile.m * tile.n / speed

    return min(candidates(dtype, residual, arch), key=cost)[0]


@cache
def row_tile(width: int) -> tuple[int, int]:
    """(lanes, warps) of a program that keeps a whole row of this many channels in registers."""
    lanes = max(64, 1 << (width - 1).bit_length())
    return lanes, min(max(lanes // 512, 1), 16)


def state_chunk(tokens: int) -> int:
    """How many tokens one program of linear attention sums up: an eighth of them, and no fewer than 256."""
    return max(256, -(-tokens // (8 * 128)) * 128)


def head_tile(head_dim: int, dtype: torch.dtype, arch: int) -> tuple[int, int, int]:
    """(tokens, lanes, warps) of a program of linear attention, which takes one head: 2048 elements, or 1024 of fp32.

    From sm_120 on half of that, with which no compiler runs out of registers (Triton 3.3 did).
    """
    lanes = max(16, 1 << (head_dim - 1).bit_length())
    size = (2048 if arch >= 120 else 4096) // dtype.itemsize
    return max(16, size // lanes), lanes, 4 if lanes * dtype.itemsize <= 128 else 8


def glu_tile(channels: int, whole_rows: bool) -> tuple[int, int, int]:
    """(tokens, channels, warps) of a program of the depthwise convolution; whole rows where it must quantise them."""
    if not whole_rows:
        return 32, 64, 4
    lanes, warps = row_tile(channels)
    return max(1, min(16, 4096 // lanes)), lanes, warps


def attention_tile(dtype: torch.dtype, arch: int) -> Tile:
    """The tile of `linear_attention_from`: m tokens, n channels each of k and v or of q, in steps of k."""
    return Tile(*TABLE[known(arch)]["attention"][_name(dtype)])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
