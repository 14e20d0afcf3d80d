"""Quantised folders made by hand, without calibration: what the tests of loading and running them need."""

import shutil
from pathlib import Path

import torch
from torch import nn

from sana_kernels.quant import checkpoint
from sana_kernels.quant.checkpoint import FILE, Header, LayerInfo
from sana_kernels.quant.layer import QuantizedLayer, round_to_nearest
from sana_model.quantize.layers import KEPT, SCHEMES
from sana_model.weights.models import load_model


def quantized_layer(layer: nn.Linear, precision: str, rank: int, smooth: bool) -> QuantizedLayer:
    """A layer's weight, smoothed by its own columns, less its first singular vectors, rounded to nearest."""
    weight = layer.weight.detach().float()
    factor = weight.abs().amax(0).clamp_min(1e-3).rsqrt() if smooth else torch.ones(weight.shape[1])
    smoothed, extra = weight * factor, {"smooth": factor} if smooth else {}
    if rank:
        U, S, V = torch.linalg.svd(smoothed, full_matrices=False)
        up, down = (U[:, :rank] * S[:rank]).bfloat16(), V[:rank]
        extra |= {"down": (down / factor).bfloat16(), "up": up}
        smoothed = smoothed - up.float() @ down
    rounded = round_to_nearest(smoothed, *SCHEMES[precision])
    return QuantizedLayer(rounded.format, rounded.activations, rounded.inputs, **rounded.tensors() | extra)


def quantized_folder(saved: Path, folder: Path, precision: str, rank: int = 0, smooth: bool = False) -> Path:
    """A copy of a diffusers folder whose DiT is quantised; the keys and values of the caption are W8A16."""
    shutil.copytree(saved, folder)
    dit = load_model(saved, parts=("dit",)).dit
    layers, tensors = {}, dict(dit.state_dict())
    for name, layer in dit.named_modules():
        if not isinstance(layer, nn.Linear) or not name.startswith("blocks."):
            continue
        if name.rpartition(".")[2] in KEPT:
            layers[name] = round_to_nearest(layer.weight, "int8", "16bit")
        else:
            layers[name] = quantized_layer(layer, precision, rank, smooth)
        del tensors[f"{name}.weight"]
        tensors |= checkpoint.parts(name, layers[name])
    header = Header(
        "dit", "small", precision, "rtn", "0" * 64, None, {name: LayerInfo.of(layer) for name, layer in layers.items()}
    )
    shutil.rmtree(folder / "transformer")
    shutil.copytree(saved / "transformer", folder / "transformer", ignore=shutil.ignore_patterns("*.safetensors"))
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    checkpoint.save(folder / "transformer" / FILE, header, shapes, tensors.__getitem__)
    return folder
