"""DC-AE checkpoints of efficientvit, the original, under the names that diffusers gave their parameters.

    encoder.stages.3.op_list.0.main.op_list.0.context_module.main.qkv.conv.weight   (3C, C, 1, 1)
    encoder.down_blocks.3.0.attn.to_q.weight, to_k, to_v                            (C, C) each

Nothing is read before it is asked for: `as_diffusers` gives a `Checkpoint` whose tensors are views of the other's.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from sana_model.weights.checkpoint import Checkpoint

# One after the other, on every name. Where the first or the last convolution changes the resolution, theirs is a `conv`
# inside of a `conv`, of which diffusers keeps one.
_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(?<=\.)(op_list|main)\.", ""),
        (r"^encoder\.stages\.", "encoder.down_blocks."),
        (r"^decoder\.stages\.", "decoder.up_blocks."),
        (r"^(encoder|decoder)\.project_in\.conv\.", r"\1.conv_in."),
        (r"^encoder\.project_out\.0\.conv\.", "encoder.conv_out."),
        (r"^decoder\.project_out\.0\.", "decoder.norm_out."),
        (r"^decoder\.project_out\.2\.conv\.", "decoder.conv_out."),
        (r"\.context_module\.", ".attn."),
        (r"\.local_module\.", ".conv_out."),
        (r"\.aggreg\.(\d+)\.0\.", r".to_qkv_multiscale.\1.proj_in."),
        (r"\.aggreg\.(\d+)\.1\.", r".to_qkv_multiscale.\1.proj_out."),
        (r"\.proj\.conv\.", ".to_out."),
        (r"\.proj\.norm\.", ".norm_out."),
        (r"\.(inverted|depth|point)_conv\.conv\.", r".conv_\1."),
        (r"\.(point_conv|conv2)\.norm\.", ".norm."),
        (r"\.(conv[12]?)\.conv\.", r".\1."),
    )
)
_QKV = ".qkv.conv.weight"


def is_original(names: Iterable[str]) -> bool:
    """Are these the names of an efficientvit DC-AE?"""
    return any(name.startswith(("encoder.stages.", "decoder.stages.")) for name in names)


def as_diffusers(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors in diffusers' names and shapes."""
    places: dict[str, tuple[str, int | None]] = {}  # diffusers' name → (theirs, which third of it)
    shapes: dict[str, tuple[int, ...]] = {}
    for theirs, shape in checkpoint.shapes.items():
        name = theirs
        for pattern, new in _NAMES:
            name = pattern.sub(new, name)
        if name.endswith(_QKV):
            for third, letter in enumerate("qkv"):
                own = f"{name.removesuffix(_QKV)}.to_{letter}.weight"
                places[own], shapes[own] = (theirs, third), (shape[0] // 3, shape[1])
        else:
            places[name] = theirs, None
            shapes[name] = shape[:2] if name.endswith(".to_out.weight") else shape

    def read(name: str) -> Tensor:
        theirs, third = places[name]
        tensor = checkpoint.read(theirs)
        if third is not None:
            tensor = tensor.chunk(3)[third]
        return tensor.reshape(shapes[name])

    return replace(checkpoint, shapes=shapes, read=read)
