"""Runs the graphs of `sana export onnx` with ONNX Runtime, on the CPU.

runner = Runner(folder, torch.device("cpu"))
velocity = runner("transformer", latents=..., timestep=..., caption=..., lengths=...)
"""

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from sana_export import layout
from sana_model.errors import MissingError, UserError

PRECISIONS = ("fp32", "fp16")
"""Those that its CPU provider has kernels for."""


def package(name: str = "onnxruntime"):
    """An optional package. Raises MissingError with the command that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingError(f"this needs {name}: pip install 'sana-kernels[onnx]'") from error


def session(file: Path, *, optimize: bool = True):
    """An `onnxruntime.InferenceSession` with as many threads as torch has."""
    runtime = package()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run(session, inputs: dict[str, Tensor]) -> Tensor:
    """The one output of a graph."""
    (output,) = session.run(None, {name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


class Runner:
    """The graphs of one folder. A graph is loaded when it is first needed."""

    def __init__(self, folder: str | Path, device: torch.device):
        """Raises UserError for a folder without graphs or of graphs that this provider cannot compute, and MissingError
        without onnxruntime."""
        self.folder, self.device = Path(folder), device
        self.manifest = layout.read(self.folder)
        package()
        if device.type != "cpu":
            raise UserError(f"backend 'onnxruntime' runs on the CPU, not on {device}; leave out --device")
        for name, graph in self.manifest.graphs.items():
            if graph.precision not in PRECISIONS:
                raise UserError(
                    f"{layout.graph_file(self.folder, name)} is in {graph.precision}, and ONNX Runtime's CPU provider"
                    f" computes in {' and '.join(PRECISIONS)}; export with --precision fp32, or build engines of it"
                )
        if self.manifest.attention != "plain":
            raise UserError(
                f"the graphs in {self.folder} hold plugins, which only TensorRT engines have; export with --attention plain"
            )
        self._sessions: dict[str, object] = {}

    def __call__(self, graph: str, **inputs: Tensor) -> Tensor:
        """The output of one graph."""
        if graph not in self._sessions:
            self._sessions[graph] = session(layout.graph_file(self.folder, graph))
        return run(self._sessions[graph], inputs)
