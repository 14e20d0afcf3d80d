"""A chain of convolutional layers over an image, in horizontal bands: the same pixels, bit for bit, in bounded memory.

    image rows   ──►  layer  ──►  layer  ──►  …  ──►  result rows
                 a few rows in flight between each two

Row r of a 3×3 convolution needs rows r − 1, r and r + 1 of its argument. So a convolution can make some rows of its result
as soon as one row more has come in, and must keep no more than the last rows that it has read. Chained, the layers of a
whole network pass bands of rows along: every row is made once, out of the very numbers that the whole image would give,
so no seam can arise. Memory is a few bands for each layer, whatever the height of the image, and bands that stay in the
cache are also faster.

Bands end at multiples of 8 rows, the height of the tiles that share a scale in W8A8 (sana_kernels/conv2d/reference.py), and
twice that of the patches that make results together (transforms.py there).
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sana_kernels.conv2d import TILE, Band, Rows

BAND_BYTES = 8 * 2**20
"""Of each layer's argument: with what else a layer holds, less than the last cache of current processors."""


class Bands(NamedTuple):
    """An image on its way: consecutive rows (1, rows, W, C) of an image of `height` rows."""

    height: int
    rows: Iterator[Tensor]


class Layer(Protocol):
    """A layer that sees a neighbourhood of each pixel."""

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, W, in) → (B, H', W', out)."""

    def bands(self, x: Bands) -> Bands:
        """The same of an image on its way."""


class Window:
    """The rows of an image that have come in and that one of its readers still needs: rows `start` to `end` − 1.

    They are in two pieces: the last rows as they came in, and what is left of those before, as they came in too unless they
    were two pieces themselves.
    """

    def __init__(self, readers: int = 1):
        self.start = self.end = 0
        self._above: Tensor | None = None
        self._rows: Tensor | None = None
        self._needed = [0] * readers

    @property
    def _edge(self) -> int:
        """The first of the last rows that came in."""
        return self.end - (0 if self._rows is None else self._rows.shape[1])

    def add(self, rows: Tensor) -> None:
        self._above = in_one_piece(self.rows()) if self.start < self.end else None
        self._rows = rows
        self.end += rows.shape[1]

    def drop(self, first: int, reader: int = 0) -> None:
        """A reader does not need rows before `first` any more."""
        self._needed[reader] = first
        self.start = min(self._needed)
        if self.start >= self._edge:
            self._above = None  # and leaves memory

    def rows(self, first: int | None = None, last: int | None = None) -> Rows:
        """Rows `first` to `last` − 1, views; by default, all."""
        first, last = self.start if first is None else first, self.end if last is None else last
        if first >= self._edge:
            return self._rows[:, first - self._edge : last - self._edge]
        top = self._edge - self._above.shape[1]
        above = self._above[:, first - top : last - top]
        return above if last <= self._edge else (above, self._rows[:, : last - self._edge])


def in_one_piece(rows: Rows) -> Tensor:
    """Rows of an image in the CPU's memory, brought together on this thread alone.

    PyTorch would copy with all of its threads, which then wait actively for milliseconds, beside those of the kernels.
    """
    if isinstance(rows, Tensor):
        return rows
    above, rest = map(Tensor.contiguous, rows)
    result = above.new_empty(1, above.shape[1] + rest.shape[1], *above.shape[2:])
    ctypes.memmove(result.data_ptr(), above.data_ptr(), above.nbytes)
    ctypes.memmove(result.data_ptr() + above.nbytes, rest.data_ptr(), rest.nbytes)
    return result


def whole(x: Tensor) -> Band:
    """The band that is the whole image (B, H, W, C)."""
    return Band(0, 0, x.shape[1], x.shape[1])


def sweep(
    compute: Callable[[Rows, Band], Tensor], x: Bands, step: int = 1, below: int = 1, window: Window | None = None
) -> Iterator[Tensor]:
    """compute(rows, band) for band after band, as soon as `rows` holds what `band` of the result sees.

    Row r of the result (2 of `upsample`'s) sees rows step · r − 1 to step · (r + 1) − 1 + below of the image. `window`: for
    rows of x, where they have another reader, too.
    """
    window, done, count = window or Window(), 0, x.height // step
    for rows in x.rows:
        window.add(rows)
        ready = count if window.end == x.height else (window.end - below) // step // TILE[0] * TILE[0]
        if ready > done:
            yield compute(window.rows(), Band(window.start, done, ready, x.height))
            done = ready
            window.drop(max(0, step * done - 1))


class Neighbourhood:
    """What layers have in common that are one `compute`: the rows of a band of the result, out of rows of the image."""

    step = 1  # each row of the image counts, or each pair of rows
    growth = 1  # rows of the result for each of these
    below = 1  # rows that the result sees below its own; above, it is always one
    compute: Callable[[Rows, Band], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, Band(0, 0, x.shape[1] // self.step, x.shape[1]))

    def bands(self, x: Bands) -> Bands:
        return Bands(x.height // self.step * self.growth, sweep(self.compute, x, self.step, self.below))


def run(layers: list[Layer], x: Tensor, band_bytes: int | None = None) -> Tensor:
    """`layers` one after the other on x (B, H, W, C): whole, or in bands of about `band_bytes`, which gives the same.

    The same bit for bit, that is, on kernels that make each row alike, however many of them are asked for: on the CPU's,
    and not on the library's.
    """
    if band_bytes is None:
        for layer in layers:
            x = layer(x)
        return x
    if len(x) > 1:
        return torch.cat([run(layers, image, band_bytes) for image in x.split(1)])
    bands = Bands(x.shape[1], iter([x]))
    for layer in layers:
        bands = layer.bands(_split(bands, band_bytes))
    return torch.cat(list(bands.rows), dim=1)


def rows_of_a_band(row_bytes: int, band_bytes: int = BAND_BYTES) -> int:
    """Whole tiles of about `band_bytes`; two at least: a ResBlock needs 16 rows again, of one piece if possible."""
    return max(2, band_bytes // (TILE[0] * row_bytes)) * TILE[0]


def _split(x: Bands, band_bytes: int) -> Bands:
    """The same image in pieces of about `band_bytes`."""

    def rows() -> Iterator[Tensor]:
        for piece in x.rows:
            yield from piece.split(rows_of_a_band(piece[:, :1].nbytes, band_bytes), dim=1)

    return Bands(x.height, rows())
