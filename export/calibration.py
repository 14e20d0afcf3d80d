"""What painting a few pictures tells of a transformer: scales of its activations for W8A8, and whether fp16 holds them."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_export import graphs
from sana_export.ops import INT8_MOST, attention_scores
from sana_kernels.quant.calibration import LayerInputs
from sana_model.dit import FP16_MAX
from sana_model.errors import UserError
from sana_model.ops import REFERENCE_OPS
from sana_model.pipeline import Pipeline
from sana_model.quantize.layers import KEPT

PROMPTS = [
    "a red fox in the snow, oil painting", "a 3d render of a teapot on a teal background", "a crowded night market, rain",
    "portrait of an old sailor, studio light", "a flat icon of an owl", "an aerial photograph of a river delta",
]  # fmt: skip
NOT_COMPUTED = {  # what is found in fresh memory is no activation
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
}  # fmt: skip
HEADROOM = 2.0  # other pictures than these may reach further


def activation_scales(inputs: dict[str, LayerInputs]) -> dict[str, float]:
    """By layer of the DiT's blocks, of its input: the largest |value| / 127."""
    return {
        name: layer.absmax.max().item() / INT8_MOST
        for name, layer in inputs.items()
        if name.startswith("blocks.") and name.rpartition(".")[2] not in KEPT
    }


def check_range(pipe: Pipeline, samples: int, steps: int) -> None:
    """Raise UserError unless every tensor of a bf16 DiT stays well within fp16's range while it paints.

    bf16 has the range of fp32 and is used where an fp16 graph uses fp16; what a graph computes in fp32 does not count.
    The DiT is brought into the graph's form, in place: a tensor that a fused op never shows, such as attention's scores or
    a product without its bias, is one that a graph has.
    """
    graphs.for_export("transformer", pipe.dit, "plain")
    pipe.dit.ops = replace(pipe.dit.ops, cross_attention=_with_scores)
    value, where = 0.0, ""
    with torch.inference_mode():
        for i in range(samples):
            settings = pipe.settings(PROMPTS[i % len(PROMPTS)], steps=steps, seed=i)
            captions = pipe.encode(settings)
            with Largest(pipe.dit) as largest:
                pipe.denoise(settings, captions)
            value, where = max((value, where), (largest.value, largest.where))
    if value * HEADROOM > FP16_MAX:
        raise UserError(
            f"the transformer's activations reach {value:.3g} ({where}), and fp16 ends at {FP16_MAX:.0f},"
            f" of which a factor of {HEADROOM:g} is kept free; export it with --precision bf16"
        )


def _with_scores(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, quantize: None = None) -> Tensor:
    """The graph's cross-attention, scores included, without the mask that is added to them: it is made of the range."""
    attention_scores(q, k)
    return REFERENCE_OPS.cross_attention(q, k, v, lengths)


class Largest(TorchDispatchMode):
    """The largest |value| (NaN: inf) of all bf16 tensors computed within the `with` block, and in which block of `dit`."""

    def __init__(self, dit: nn.Module):
        super().__init__()
        self.value, self.where, self._module, self._dit = 0.0, "", "", dit

    def __enter__(self):
        def enter(name: str):
            return lambda *_: setattr(self, "_module", name)

        self._handles = [
            block.register_forward_pre_hook(enter(f"block {i}")) for i, block in enumerate(self._dit.blocks)
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = () if func in NOT_COMPUTED else tree_leaves(result)
        for tensor in leaves:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16 and tensor.numel():
                value = tensor.float().abs().nan_to_num(math.inf).max().item()
                if value > self.value:
                    self.value, self.where = value, f"{self._module}, {func.__name__}"
        return result
