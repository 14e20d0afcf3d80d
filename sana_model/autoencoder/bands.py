"""A chain of convolutional layers over an image, in horizontal bands: the same pixels, bit for bit, in bounded memory.

    image rows   ──►  layer  ──►  layer  ──►  …  ──►  result rows
                 a few rows in flight between each two

Row r of a 3×3 convolution needs rows r − 1, r and r + 1 of its argument. So a convolution can make some rows of its result
as soon as one row more has come in, and must keep no more than the last rows that it has read. Chained, the layers of a
whole network pass bands of rows along: every row is made once, out of the very numbers that the whole image would give,
so no seam can arise. Memory is a few bands for each layer, whatever the height of the image, and bands that stay in the
cache are also faster.

Bands end at multiples of 8 rows, the height of the tiles that share a scale in W8A8 (sana_kernels/conv2d/reference.py).
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

    They stay where they came in, the last ones and, in a second piece, what is left of those before.
    """

    def __init__(self, readers: int = 1):
        self.start = self.end = 0
        self._above: Tensor | None = None
        self._rows: Tensor | None = None
        self._needed = [0] * readers

    def add(self, rows: Tensor) -> None:
        self._above = self._rows if self._above is None else in_one_piece((self._above, self._rows))
        self._rows = rows
        self.end += rows.shape[1]

    def drop(self, first: int, reader: int = 0) -> None:
        """A reader does not need rows before `first` any more."""
        self._needed[reader] = first
        start, edge = min(self._needed), self.end - self._rows.shape[1]
        if start < edge:
            self._above = self._above[:, start - self.start :]
        else:
            rest = self._rows[:, start - edge :]
            self._above, self._rows = (
                None,
                None if start == self.end else _copied(rest),
            )  # the others shall leave memory
        self.start = start

    def rows(self, first: int | None = None, last: int | None = None) -> Rows:
        """Rows `first` to `last` − 1, views; by default, all."""
        first, last = self.start if first is None else first, self.end if last is None else last
        edge = self.end - self._rows.shape[1]
        above = None if first >= edge else self._above[:, first - self.start : last - self.start]
        rows = None if last <= edge else self._rows[:, max(first - edge, 0) : last - edge]
        return rows if above is None else above if rows is None else (above, rows)


def in_one_piece(rows: Rows) -> Tensor:
    """Rows of an image in the CPU's memory, brought together on this thread alone.

    PyTorch would copy with all of its threads, which then wait actively for milliseconds, beside those of the kernels: a
    decode of 512 px took 1.5 s on two cores, and takes 1.2.
    """
    return _copied(*rows) if isinstance(rows, tuple) else rows


def _copied(*pieces: Tensor) -> Tensor:
    result = pieces[0].new_empty(1, sum(piece.shape[1] for piece in pieces), *pieces[0].shape[2:])
    to = result.data_ptr()
    for piece in map(Tensor.contiguous, pieces):
        ctypes.memmove(to, piece.data_ptr(), piece.nbytes)
        to += piece.nbytes
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


def _split(x: Bands, band_bytes: int) -> Bands:
    """The same image in pieces of at most `band_bytes`, in whole tiles."""

    def rows() -> Iterator[Tensor]:
        for piece in x.rows:
            height = max(1, band_bytes // (TILE[0] * piece[:, :1].nbytes)) * TILE[0]
            yield from piece.split(height, dim=1)

    return Bands(x.height, rows())
