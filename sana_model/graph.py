"""The denoising loop as CUDA graphs: the launches of all steps in one, for a fast GPU waits for Python otherwise.

A step of SANA-0.6B is some 400 launches of a few µs each. A graph records them once and starts them all in one call; it
repeats the *same* launches on the *same* addresses. Hence the rules of this file:

  - one graph per shape: sizes, batch, sampler, number of steps, and which steps are guided (`Loop.key`);
  - what changes from picture to picture (`Inputs`: noise, times, captions, scales) is copied into the graph's own buffers
    before each replay, all of it, so no picture sees another one's prompt. Captions are padded to one length for that;
  - a graph holds the addresses of the weights: when the DiT has others, all graphs go;
  - the first picture of a shape runs launch by launch on those buffers, which compiles kernels and fills caches, and
    nothing that a capture may do for the first time; then the same calls are captured. Their results are the same bytes;
  - a graph keeps the memory of its activations. The least recently used ones go when there are more than `most`, or when
    they hold more than `limit` bytes together; all of them go when memory runs out. A graph that does not fit even then is
    not made, and the picture is that of the launches before.

The autoencoder stays outside: its launches are long enough to hide the next ones, and its activations would be held, too.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from sana_model.denoise import Inputs, Loop, denoise
from sana_model.dit import DiT

MOST = 8  # graphs
SHARE = 1 / 4  # of a GPU's memory, for all graphs

T = TypeVar("T")
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor, int]]
"""`capture(function)` → (replay, where function's result then lies, bytes that it keeps); computes nothing by itself."""


def why_eager(backend: str, device: torch.device, *, wanted: bool = True, low_memory: bool = False) -> str | None:
    """None where the denoising loop runs as a CUDA graph, else the reason why its steps run launch by launch."""
    if device.type != "cuda":
        return "CUDA graphs need an NVIDIA GPU"
    if not wanted:
        return "CUDA graphs are turned off"
    if backend not in ("cuda", "triton"):
        return f"the backend {backend} is the one to compare with"
    if low_memory:
        return "--low-memory moves the weights, whose addresses a graph holds"
    return None


def limit(device: torch.device) -> int:
    """How many bytes the graphs of a GPU may hold together."""
    return int(torch.cuda.get_device_properties(device).total_memory * SHARE)


@cache
def _capture_stream(gpu: int) -> torch.cuda.Stream:
    """One per GPU for all captures: cuBLAS keeps a workspace, of 32 MB on Hopper, for every stream that it has seen."""
    return torch.cuda.Stream(gpu)


def capture_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor, int]:
    """A `Capture` on the current GPU. Other threads may go on using it."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = function()
    pool = tuple(graph.pool())
    segments = torch.cuda.memory_snapshot()
    return graph.replay, output, sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)


@dataclass(frozen=True)
class Captured:
    """A graph, the buffers that it reads and the one that it writes."""

    replay: Callable[[], None]
    inputs: Inputs
    output: Tensor
    bytes: int

    def __call__(self, inputs: Inputs) -> Tensor:
        for buffer, tensor in zip(tensors(self.inputs), tensors(inputs), strict=True):
            buffer.copy_(tensor)
        self.replay()
        return self.output.clone()


class Graphs:
    """Denoises with the graph of the inputs' shape, which it makes when there is none."""

    def __init__(self, limit: int, *, most: int = MOST, capture: Capture = capture_cuda):
        self.limit, self.most, self._capture = limit, most, capture
        self._graphs: OrderedDict[tuple, Captured] = OrderedDict()  # the most recently used last
        self._weights: list = []

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """What all graphs hold, in their buffers and for their activations."""
        return sum(graph.bytes for graph in self._graphs.values())

    @torch.inference_mode()
    def denoise(self, dit: DiT, loop: Loop, inputs: Inputs) -> Tensor:
        """`denoise(dit, loop, inputs)`."""
        weights = [dit, dit.ops, *(t.data_ptr() for t in chain(dit.parameters(), dit.buffers()))]
        if weights != self._weights:
            self.clear()
            self._weights = weights
        key = loop.key, *((t.shape, t.dtype) for t in tensors(inputs))
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key](inputs)
        with torch.cuda.device_of(inputs.noise):  # a capture sees the launches of the current GPU only
            return self._first(key, dit, loop, inputs)

    def _first(self, key: tuple, dit: DiT, loop: Loop, inputs: Inputs) -> Tensor:
        buffers = copied(inputs)
        latents = self.making_room(lambda: denoise(dit, loop, buffers))
        try:
            replay, output, size = self.making_room(lambda: self._capture(lambda: denoise(dit, loop, buffers)))
        except torch.OutOfMemoryError:  # room for its activations while it was painted, but not to keep them
            return latents
        size += sum(t.nbytes for t in tensors(buffers))
        self._graphs[key] = Captured(replay, buffers, output, size)
        while len(self) > 1 and (len(self) > self.most or self.bytes > self.limit):
            self._graphs.popitem(last=False)
        return latents

    def making_room(self, run: Callable[[], T]) -> T:
        """run(), and once more without any graph where memory ran out."""
        try:
            return run()
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self.clear()
        return run()

    def clear(self) -> None:
        """Let all graphs and their memory go."""
        self._graphs.clear()


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in dataclasses and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value if isinstance(value, tuple) else (getattr(value, f.name) for f in fields(value)):
            yield from tensors(part)


def copied(value: T) -> T:
    """The same dataclasses and tuples of contiguous copies."""
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    if is_dataclass(value):
        return type(value)(*(copied(getattr(value, f.name)) for f in fields(value)))
    return value
