"""A TensorRT without a GPU: the calls of sana_export.build and sana_model.exported.tensorrt, computed by ONNX Runtime.

Its builder "builds" a file that names the graph; its contexts read and write the addresses that they were given, and refuse
what TensorRT refuses: shapes outside of the profile, missing addresses, too little memory, two things at once in a stream.
So a runner that mixes up bindings, shapes, profiles or memory paints other pictures or none. In place of torch.cuda there
is `FakeCuda`, whose graphs, like real ones, compute nothing when they are recorded and repeat the same addresses later.
"""

import ctypes
import json
from collections.abc import Callable
from contextlib import contextmanager
from enum import Enum, IntEnum
from math import prod
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import torch

__version__ = "99.1"


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 0


class BuilderFlag(Enum):
    REFIT = 0


class ProfilingVerbosity(Enum):
    DETAILED = 0


class LayerInformationFormat(Enum):
    ONELINE = 0


class TensorIOMode(Enum):
    INPUT, OUTPUT = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, USER_MANAGED = range(2)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER = range(2)


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProgressMonitor:
    pass


class LayerType(Enum):
    OTHER = 0


DTYPES = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.float32), onnx.TensorProto.INT64: ("INT64", np.int64),
}  # fmt: skip


class Network:
    """A parsed file; its inputs and outputs as (name, dtype, shape with -1)."""

    num_layers = 1

    def read(self, path: str) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self.path = path
        self.inputs, self.outputs = (
            [(value.name, value.type.tensor_type.elem_type, _shape(value)) for value in values]
            for values in (graph.input, graph.output)
        )

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, i: int):
        return SimpleNamespace(name=self.inputs[i][0])

    def get_layer(self, i: int):
        return SimpleNamespace(type=LayerType.OTHER)


def _shape(value) -> tuple[int, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, log):
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.read(path)
        return True


class OptimizationProfile(dict):
    def set_shape(self, name, least, typical, most) -> None:
        self[name] = (least, typical, most)


class Config:
    progress_monitor = None

    def __init__(self):
        self.profiles, self.flags = [], []

    def add_optimization_profile(self, profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag) -> None:
        self.flags.append(flag.name)

    def create_timing_cache(self, content: bytes):
        return SimpleNamespace(serialize=lambda: content + b"timed;")

    def set_timing_cache(self, cache, ignore_mismatch: bool) -> None:
        self.timing = cache


class HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Builder:
    stop_after = None  # steps until `interrupt` is called

    def interrupt(self) -> None:
        """What a user does who presses Ctrl-C; for tests to replace."""

    def __init__(self, log):
        self.log = log

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            if step == self.stop_after:
                self.interrupt()
            if not monitor.step_complete("Building engine", step):
                return None
        monitor.phase_finish("Building engine")
        engine = {"path": network.path, "profiles": config.profiles, "flags": config.flags}
        return HostMemory(json.dumps(engine | {"inputs": network.inputs, "outputs": network.outputs}).encode())


class Runtime:
    def __init__(self, log):
        self.log = log

    def deserialize_cuda_engine(self, content: bytes):
        try:
            return Engine(json.loads(bytes(content)), self.log)
        except ValueError:
            self.log.log(ILogger.Severity.ERROR, "the magic tag does not match")
            return None


class Engine:
    def __init__(self, values: dict, log):
        self.profiles, self.log = values["profiles"], log
        self.inputs = {name: (dtype, shape) for name, dtype, shape in values["inputs"]}
        self.outputs = {name: (dtype, shape) for name, dtype, shape in values["outputs"]}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(values["path"], options, providers=["CPUExecutionProvider"])
        self.contexts: list[Context] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, i: int) -> str:
        return (*self.inputs, *self.outputs)[i]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str):
        return SimpleNamespace(name=DTYPES[(self.inputs | self.outputs)[name][0]][0])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list:
        return self.profiles[profile][name]

    def create_engine_inspector(self):
        listing = "Layers:\nName: whole graph, LayerType: session\n"
        return SimpleNamespace(get_engine_information=lambda form: listing)

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, how):
        """`how`: an allocation strategy or, of RTX, a runtime configuration."""
        if isinstance(how, RuntimeConfig):
            assert how.dynamic_shapes_kernel_specialization_strategy == DynamicShapesKernelSpecializationStrategy.EAGER
            how.cache.content += b"compiled;"
            how = how.strategy
        assert how == ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]


class RuntimeConfig:
    def set_execution_context_allocation_strategy(self, strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    content = b""

    def deserialize(self, content: bytes) -> bool:
        mine = content.startswith(b"compiled;")
        self.content = content if mine else b""
        return mine

    def serialize(self) -> bytes:
        return self.content


class Context:
    """An execution context. `execute_async_v3` works at once, or takes note while `FakeCuda.capture` records."""

    recording: list[Callable[[], None]] | None = None

    def __init__(self, engine: Engine):
        self.engine, self.profile, self.shapes, self.addresses, self.memory = engine, None, {}, {}, (0, 0)
        self.launches = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = self.engine.profiles[profile]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.profile[name]
        fits = all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        else:
            self.engine.log.log(ILogger.Severity.ERROR, f"{name} {shape} is not within the profile")
        return fits

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        zeros = {name: np.zeros(self.shapes[name], DTYPES[dtype][1]) for name, (dtype, _) in self.engine.inputs.items()}
        return dict(zip(self.engine.outputs, self.engine.session.run(None, zeros), strict=True))[name].shape

    def update_device_memory_size_for_shapes(self) -> int:
        return 256 * sum(prod(shape) for shape in self.shapes.values())

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == FakeCuda.HANDLE, "not on the stream that the memory is used on"
        if set(self.addresses) != {*self.engine.inputs, *self.engine.outputs}:
            self.engine.log.log(ILogger.Severity.ERROR, "a tensor has no address")
            return False
        if self.memory[1] < self.update_device_memory_size_for_shapes():
            self.engine.log.log(ILogger.Severity.ERROR, "too little device memory")
            return False
        shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory  # what a graph would hold

        def compute() -> None:
            self.launches += 1
            ctypes.memset(memory[0], 0xFF, self.update_device_memory_size_for_shapes())
            inputs = {
                name: _at(addresses[name], shapes[name], DTYPES[dtype][1]).copy()
                for name, (dtype, _) in self.engine.inputs.items()
            }
            for (name, _), value in zip(
                self.engine.outputs.items(), self.engine.session.run(None, inputs), strict=True
            ):
                _at(addresses[name], value.shape, value.dtype)[...] = value

        if Context.recording is None:
            compute()
        else:
            Context.recording.append(compute)
        return True


def _at(address: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    """The array that lies at an address."""
    size = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class FakeCuda:
    """As `sana_model.exported.tensorrt.Cuda`, of a GPU called `name`."""

    HANDLE = 7

    def __init__(self, target: str = "sm89", name: str = "an RTX 4090"):
        self.device, self.target, self.name, self.graphs = torch.device("cpu"), target, name, 0

    @contextmanager
    def stream(self):
        yield self.HANDLE

    def finish(self) -> None:
        pass

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.graphs += 1
        Context.recording = recorded = []
        try:
            launch()
        finally:
            Context.recording = None
        return lambda: [compute() for compute in recorded]
