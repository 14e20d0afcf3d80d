"""A network compiled by OpenVINO for the CPU, as a function of keyword arguments: the strongest baseline that others ship.

It is traced in fp32 whatever it computes in, which is OpenVINO's own way: networks traced with bf16 weights fail in its
compiler or lose 25 dB. W8A8 is NNCF's post-training quantisation with the statistics of the examples.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sana_model.errors import MissingError

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "w8a8": "bf16"}  # w8a8: what is not in int8


def check_installed(precision: str) -> None:
    """Raises MissingError where a package is missing for this precision, or OpenVINO has no such precision."""
    for package in ("openvino", *(["nncf"] if precision == "w8a8" else [])):
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"the package {package} is not installed; `pip install {package}` adds it")
    if precision not in HINTS:
        raise MissingError(f"OpenVINO runs in {', '.join(HINTS)} here, not in {precision}")


class Traced(nn.Module):
    """A diffusers network with a plain tensor as its result."""

    def __init__(self, network: nn.Module, **constants):
        super().__init__()
        self.network, self.constants = network, constants

    def forward(self, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
        out = self.network(hidden_states, **inputs, **self.constants)
        return out[0] if isinstance(out, tuple) else out


def compiled(
    network: nn.Module, examples: list[dict[str, Tensor]], precision: str, **constants
) -> Callable[..., Tensor]:
    """`network` (fp32; called with an example and `constants` by keyword) at the shapes of `examples`; fp32 result."""
    import openvino

    check_installed(precision)
    examples = [_widened(example) for example in examples]
    with torch.no_grad():
        model = openvino.convert_model(torch.export.export(Traced(network, **constants), (), examples[0]))
    if precision == "w8a8":
        import nncf

        inputs = nncf.Dataset([{name: value.numpy() for name, value in example.items()} for example in examples])
        model = nncf.quantize(model, inputs, subset_size=len(examples), model_type=nncf.ModelType.TRANSFORMER)
    options = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    run = openvino.compile_model(model, "CPU", options)

    def call(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(run({name: value.numpy() for name, value in _widened(inputs).items()})[0])

    return call


def _widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (v.float() if v.is_floating_point() else v).contiguous() for name, v in inputs.items()}
