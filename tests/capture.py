"""What stands for CUDA graphs on a machine without a GPU, and breaks where they would.

`Recorder` is a `Capture` of sana_model/graph.py that works on the CPU. Like CUDA it computes nothing while it captures:
results hold NaN, 0 or False until the replay, which repeats the calls, and only those, on the tensors that took part. So
whatever Python decided or read during the capture is as fixed as it is there. The host reading a result is an error.

`launches` watches code whose tensors are on "meta": there, too, it cannot be known what they hold, so that whatever copies
between host and GPU, or reads a result, shows.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "item")
"""Ops whose result the host has to wait for."""


def storages(*values) -> Iterator[int]:
    return (t.untyped_storage().data_ptr() for t in tree_iter(values) if isinstance(t, Tensor))


def name_of(func) -> str:
    return func.overloadpacket.__name__.rstrip("_")


class Recorder:
    """`capture(function)` → (replay, output, bytes); `external` are the tensors that it reads and did not make."""

    def __init__(self, size: int = 1):
        self.size, self.captures, self.replays = size, 0, 0
        self.external: list[Tensor] = []

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor, int]:
        recording = _Recording()
        with recording:
            output = function()
        self.captures += 1
        self.external = recording.external

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay, output, self.size


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.external: list[Tensor] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if name_of(func) in READS:
            raise RuntimeError(f"{func}: the host cannot read a result while a graph is captured")
        before = set(storages(args, kwargs))
        self.external += [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not self._knows(t)]
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs, None))
            return args[0]
        out = func(*args, **kwargs)
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not before & set(storages(t))]
        if fresh:  # else it is a view, which is no launch
            self.calls.append((func, args, kwargs, out))
            self._made |= set(storages(fresh))
            for tensor in fresh:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        return out

    def _knows(self, tensor: Tensor) -> bool:
        return next(storages(tensor)) in self._made

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            result = func(*args, **kwargs)
            if out is not None:
                for buffer, value in zip(tree_leaves(out), tree_leaves(result), strict=True):
                    if isinstance(buffer, Tensor):
                        buffer.copy_(value)


class launches(TorchDispatchMode):
    """Notes the names of ops on "meta", of which none may touch the host's memory or wait for a result.

    Tensors of no dimensions are allowed on the host: PyTorch hands their value to the kernel, as it does with a number.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if name_of(func) in READS:
            raise RuntimeError(f"{func}: the host waits for a result")
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors if t.device.type == "meta" or t.ndim}
        if len(devices) > 1:
            raise RuntimeError(f"{func}: the host and the GPU share data")
        if devices == {"meta"}:
            self.names.append(name_of(func))
        return out
