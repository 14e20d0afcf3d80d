"""Quantised checkpoints (sana_kernels/quant/checkpoint.py) as networks: found, checked and read block by block."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sana_kernels.quant.checkpoint import FILE, Checkpoint, CheckpointError, Header, load, read_header
from sana_model.errors import UserError
from sana_model.quantize import awq
from sana_model.quantize.layers import QuantizedLinear, replace_layer
from sana_model.weights.checkpoint import Prepare, aligned, block_of


def header_in(folder: Path) -> Header | None:
    """The header of the quantised part in a folder; None where the part is not quantised. UserError for a damaged one."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            return read_header(file, handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or no safetensors file ({error}); make it again") from error
    except CheckpointError as error:
        raise UserError(str(error)) from error


def open_quantized(
    folder: Path, part: str, empty: Callable[[], nn.Module], dtype: torch.dtype | None
) -> Callable[[Prepare | None], nn.Module]:
    """Check the quantised `part` ("dit" or "text_encoder") in a folder; what is returned reads it.

    `empty` makes the network on the meta device. Parameters that are not quantised are cast to `dtype` (None: as stored);
    norms that AWQ scaled stay in fp32.
    Raises UserError for a file that is damaged or of another network.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in empty().state_dict().items()}
    try:
        checkpoint = load(folder / FILE, part, shapes)
    except CheckpointError as error:
        raise UserError(str(error)) from error

    def read(prepare: Prepare | None = None) -> nn.Module:
        try:
            return _fill(empty(), checkpoint, dtype, prepare)
        except CheckpointError as error:
            raise UserError(str(error)) from error

    return read


def _fill(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None, prepare: Prepare | None) -> nn.Module:
    """As `sana_model.weights.checkpoint.fill`: no more than one block is ever held twice."""
    quantized = checkpoint.header.layers
    wide = awq.NORMS if checkpoint.header.method == "awq" else ()
    for block, group in itertools.groupby(list(module.state_dict()), key=block_of):
        names = list(group)
        layers = [name.removesuffix(".weight") for name in names if name.removesuffix(".weight") in quantized]
        plain = {name: checkpoint.tensor(name) for name in names if name.removesuffix(".weight") not in quantized}
        plain = {
            name: aligned(tensor if dtype is None or name.endswith(wide) else tensor.to(dtype))
            for name, tensor in plain.items()
        }
        module.load_state_dict(plain, strict=False, assign=True)
        for name in layers:
            bias = module.get_submodule(name).bias
            replace_layer(module, name, QuantizedLinear(checkpoint.layer(name), bias))
        module.requires_grad_(False)
        if block and prepare is not None:
            prepare(module.get_submodule(block))
    return module.eval()
