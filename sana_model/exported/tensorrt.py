"""Runs the engines of `sana export tensorrt`. Written against the documented API; not yet run on a GPU.

    runner = Runner(folder, device)              loads an engine when it is first needed
    velocity = runner("transformer", latents=..., timestep=..., caption=..., lengths=...)

For every set of input shapes there is a `Run`: an execution context of its own, on the profile that fits, with buffers for
inputs and output, recorded as a CUDA graph at its first call and replayed from then on. (One context per graph is what
NVIDIA's guide asks for: a graph holds what its context held.) The engines run one after the other, so the contexts of all
of them work in one piece of device memory, as large as the most demanding one needs for its actual shapes.

TensorRT-RTX compiles its kernels when a context first runs; ENGINES/runtime-<gpu>-<version>.cache keeps them.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sana_export import engines, layout
from sana_export.engines import Ranges
from sana_model.errors import UserError
from sana_model.exported import tensorrt_library
from sana_model.exported.tensorrt_library import Library
from sana_model.files import atomic

MOST_RUNS = 8  # of an engine; the least recently used one goes
DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32, "INT64": torch.int64,
}  # fmt: skip
"""TensorRT's names."""


class Cuda:
    """What running engines takes from torch.cuda; tests lend another."""

    def __init__(self, device: torch.device):
        """Raises MissingError where there is no GPU."""
        self.target, self.name = tensorrt_library.gpu(device)  # sm89, NVIDIA GeForce RTX 4090
        self.device, self._stream = device, torch.cuda.Stream(device)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """The handle of a stream other than the default one, in order with the work before and after the block."""
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
        outside.wait_stream(self._stream)

    def finish(self) -> None:
        """Wait for the stream: what its work uses may go afterwards."""
        self._stream.synchronize()

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats what `launch` puts on the stream, on the same addresses."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay


class Runner:
    """The engines of one model on one GPU."""

    def __init__(self, folder: str | Path, device: torch.device, cuda: Cuda | None = None):
        """Raises UserError for a folder without engines for this GPU, and MissingError without TensorRT or a GPU."""
        self.folder, self.device = Path(folder), device
        self.manifest = layout.read(self.folder)
        self.cuda = cuda or Cuda(device)
        self.library, self.engines = _choose(self.folder, self.manifest, self.cuda)
        self.log = tensorrt_library.log(self.library)
        self.memory: Tensor | None = None
        self._loaded: dict[str, LoadedEngine] = {}
        self._compiled = None  # RTX: the kernels of all contexts
        self._compiled_file = self.folder / f"runtime-{self.cuda.target}-{self.library.version}.cache"

    def __call__(self, graph: str, **inputs: Tensor) -> Tensor:
        """The output of one graph. Raises UserError where no profile of its engine covers the shapes of the inputs."""
        if graph not in self._loaded:
            self._loaded[graph] = LoadedEngine(self, graph)
        return self._loaded[graph](inputs)

    def reserve(self, size: int) -> Tensor:
        """The memory that all contexts share, `size` bytes or more. Where it grows, its address changes: all runs go."""
        if self.memory is None or size > len(self.memory):
            self.cuda.finish()
            for loaded in self._loaded.values():
                loaded.runs.clear()
            self.memory = None  # the old one goes before the new one comes
            self.memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        return self.memory

    def context(self, engine):
        """A new execution context that works in memory which it is given."""
        api = self.library.api
        managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.library.name == "tensorrt":
            return engine.create_execution_context(managed)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        # A context has one set of shapes, and is recorded: the kernels for them are wanted at once, not some time later.
        config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._compiled is None:
            self._compiled = config.create_runtime_cache()
            if self._compiled_file.is_file() and not self._compiled.deserialize(self._compiled_file.read_bytes()):
                warnings.warn(f"{self._compiled_file} is of no use to {self.library}; it is made anew", stacklevel=2)
        config.set_runtime_cache(self._compiled)
        return engine.create_execution_context(config)

    def keep_compiled(self) -> None:
        """Write what RTX has compiled by now, for the next process."""
        if self._compiled is None:
            return
        try:
            with atomic(self._compiled_file) as temporary:
                temporary.write_bytes(self._compiled.serialize())
        except UserError as error:
            warnings.warn(f"kernels will be compiled again next time: {error}", stacklevel=2)

    def failed(self, what: str) -> UserError:
        return UserError(f"{self.library} {what}: {tensorrt_library.why(self.log.errors)}")

    def close(self) -> None:
        """Let go of engines and memory."""
        self.cuda.finish()
        self._loaded.clear()
        self.memory = None


def _choose(folder: Path, manifest: layout.Manifest, cuda: Cuda) -> tuple[Library, dict[str, engines.Engine]]:
    """The library that has an engine of every graph for this GPU, and those. Raises what the first one lacks."""
    first = None
    for library in tensorrt_library.every():
        try:
            return library, {
                graph: engines.choose(folder, manifest, graph, str(library), cuda.target, cuda.name)
                for graph in engines.GRAPHS
            }
        except UserError as error:
            first = first or error
    raise first


class LoadedEngine:
    """One engine and its runs."""

    def __init__(self, runner: Runner, graph: str):
        self.graph, self.runner = graph, runner
        api, path = runner.library.api, engines.engine_file(runner.folder, runner.engines[graph])
        with runner.log.collect(), runner.cuda.stream():
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            self._runtime = api.Runtime(runner.log)  # has to outlive its engines
            self.engine = self._runtime.deserialize_cuda_engine(content)
            if self.engine is None:
                raise runner.failed(f"cannot load {path}, so build it again")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == api.TensorIOMode.INPUT]
        (self.output,) = (name for name in names if name not in self.inputs)
        self.profiles: list[Ranges] = [
            {name: tuple(map(tuple, self.engine.get_tensor_profile_shape(name, i))) for name in self.inputs}
            for i in range(self.engine.num_optimization_profiles)
        ]
        self.runs: OrderedDict[tuple, Run] = OrderedDict()  # the most recently used last

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """The output for these inputs, whose dtypes are converted to the engine's."""
        if set(inputs) != set(self.inputs):
            raise UserError(
                f"the {self.graph} engine takes {', '.join(self.inputs)}, and was given {', '.join(inputs)}"
            )
        shapes = {name: tuple(inputs[name].shape) for name in self.inputs}
        key = tuple(shapes.values())
        if key not in self.runs:
            run = Run(self, self.fitting(shapes), shapes)
            self.runs[key] = run
            if len(self.runs) > MOST_RUNS:
                self.runner.cuda.finish()
                self.runs.popitem(last=False)
        self.runs.move_to_end(key)
        return self.runs[key](inputs)

    def fitting(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """The profile that covers these shapes; of several, the one for the smallest ranges."""
        fitting = [i for i, profile in enumerate(self.profiles) if not _outside(profile, shapes)]
        if not fitting:
            wanted = ", ".join(f"{name} {_text(shape)}" for name, shape in shapes.items())
            built = "; or ".join(
                ", ".join(f"{name} {_text(low)} to {_text(high)}" for name, (low, _, high) in profile.items())
                for profile in self.profiles
            )
            raise UserError(
                f"the {self.graph} engine cannot take {wanted}: it was built for {built}. Export with a --profile that"
                " covers this size, or ask for fewer pictures at a time"
            )
        return min(fitting, key=lambda i: sum(prod(high) for _, _, high in self.profiles[i].values()))


def _outside(profile: Ranges, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The inputs whose shapes a profile does not cover."""
    return [
        name
        for name, (low, _, high) in profile.items()
        if len(low) != len(shapes[name])
        or not all(a <= size <= b for a, size, b in zip(low, shapes[name], high, strict=True))
    ]


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


class Run:
    """One engine at one set of shapes."""

    def __init__(self, loaded: LoadedEngine, profile: int, shapes: dict[str, tuple[int, ...]]):
        self.graph, self.runner = loaded.graph, loaded.runner
        self.context = self.runner.context(loaded.engine)
        self._replay: Callable[[], None] | None = None
        with self.runner.log.collect(), self.runner.cuda.stream() as stream:
            done = [self.context.set_optimization_profile_async(profile, stream)]
            done += [self.context.set_input_shape(name, shape) for name, shape in shapes.items()]
            if not all(done) or self.context.infer_shapes():
                raise self.runner.failed(f"refuses the shapes {shapes} for its {self.graph} engine")
            self.inputs = {name: self._buffer(name) for name in shapes}
            self.output = self._buffer(loaded.output)
            self.memory = self.runner.reserve(self.context.update_device_memory_size_for_shapes())
            self.context.set_device_memory(self.memory.data_ptr(), len(self.memory))

    def _buffer(self, name: str) -> Tensor:
        dtype = DTYPES[self.context.engine.get_tensor_dtype(name).name]
        buffer = torch.zeros(tuple(self.context.get_tensor_shape(name)), dtype=dtype, device=self.runner.device)
        self.context.set_tensor_address(name, buffer.data_ptr())
        return buffer

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """The output, in memory of its own."""
        with self.runner.log.collect(), self.runner.cuda.stream() as stream:
            for name, buffer in self.inputs.items():
                buffer.copy_(inputs[name])
            if self._replay is not None:
                self._replay()
                return self.output.clone()
            # First by itself: that compiles kernels and fills caches, which nothing may do while it is recorded.
            self._launch(stream)
            output = self.output.clone()
            self._replay = self.runner.cuda.capture(lambda: self._launch(stream))
            self.runner.keep_compiled()
            return output

    def _launch(self, stream: int) -> None:
        if not self.context.execute_async_v3(stream):
            raise self.runner.failed(f"cannot run its {self.graph} engine")
