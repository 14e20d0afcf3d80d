"""Linear layers whose weights lie as a backend's kernels read them: what is executed.

    pack_linear_layers(module, dtype, backend)           nn.Linear layers, in 16 bits or rounded to 8 per channel
    pack_quantized_layers(module, precision, backend)    `QuantizedLinear` layers, in the precision that the plan names

W8A8 follows SANA's paper (arXiv 2410.10629, section 3.3): the products over image tokens and of the text encoder run in
int8; norms, the core of the linear attention, the keys and values of the caption, embeddings and the output layer do not.

4-bit weights that no kernel multiplies as such are unpacked to int8 rows, with one scale per output channel instead of one
per group, and activations then stay in int8. That second rounding is 42 dB below a typical product. It is not where one
group of a row has weights so large that the others get too few of the 127 steps: such rows (SPREAD) are given a second
row of int8, of what the first leaves over, which brings them to 15 bits. A low-rank branch runs beside the product in 16
bits, as the product's residual.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sana_kernels
from sana_kernels import Quantized
from sana_kernels.gemm import PACKED, pack, unpack
from sana_kernels.gemm.int4_reference import finish
from sana_kernels.gemm.reference import STEP
from sana_kernels.quant.formats import EIGHT_BITS, Int4
from sana_kernels.quant.layer import QuantizedLayer
from sana_model.ops import Ops, ops_on
from sana_model.quantize.layers import KEPT, LowRank, QuantizedLinear, replace_layer

SPREAD = 4.0
"""How many times the median of a row's group scales the largest may be. At 4, a median group keeps 32 of the 127 steps of
int8, which is 33 dB; rows beyond get a second one."""


class PackedLinear(nn.Module):
    """y = Q(x / smooth) Wᵀ + b, and + branch(x), computed by the kernels of one backend.

    weight: rows (N, K) in 16 bits, `Quantized` in 8 or `Int4`; `four_bit` says whether int4 weights meet int4 activations
    (gemm_w4a4) or 16 bits (gemm_w4a16). `fine`: (indices (n,), `Quantized` rows) to be added to outputs of those numbers.

    All are buffers that keep their dtypes (`.to(dtype)` changes nothing) and are not part of a state_dict: the layout is
    this machine's business, and checkpoints have their own.
    """

    def __init__(
        self,
        weight: Tensor | Quantized | Int4,
        bias: Tensor | None,
        inputs: int,
        backend: str,
        *,
        smooth: Tensor | None = None,
        branch: LowRank | None = None,
        fine: tuple[Tensor, Quantized] | None = None,
        four_bit: bool = False,
    ):
        super().__init__()
        values, scale = (weight, None) if isinstance(weight, Tensor) else weight
        # Where activations are not int4, a product in 16 bits, good for 54 dB, takes a fraction of a division's time.
        factor = None if smooth is None or four_bit else (1 / smooth).bfloat16()
        self.in_features, self.out_features = inputs, values.shape[0]
        self.backend, self.four_bit = backend, four_bit
        indices, fine_rows = fine or (None, (None, None))
        buffers = {
            "values": values if isinstance(weight, Int4) else pack(values, backend), "scale": scale,
            "bias": None if bias is None else bias.detach().float(), "smooth": smooth if four_bit else None,
            "factor": factor, "fine_indices": indices,
            "fine_values": None if fine is None else pack(fine_rows[0], backend), "fine_scale": fine_rows[1],
        }  # fmt: skip
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.branch = branch

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype | None, backend: str) -> "PackedLinear":
        """A 16-bit layer, rounded to 8 bits per output channel where a dtype is given."""
        weight, branch = layer.weight.detach(), getattr(layer, "branch", None)
        weight = weight if dtype is None else sana_kernels.quantize(weight, dtype)
        return cls(
            weight, layer.bias, layer.in_features, backend, branch=None if branch is None else branch.packed(backend)
        )

    @classmethod
    def executing(cls, layer: QuantizedLinear, precision: str, backend: str, wide: str) -> "PackedLinear":
        """A quantised layer, executed in w8a8, w4a4 or w4a16; its low-rank branch on the backend `wide`."""
        stored = layer.stored
        weight, fine = eight_bit_rows(stored) if precision == "w8a8" else (stored.int4(), None)
        branch = None if layer.branch is None else layer.branch.packed(wide)
        return cls(
            weight, layer.bias, layer.in_features, backend, smooth=stored.smooth, branch=branch, fine=fine,
            four_bit=precision == "w4a4",
        )  # fmt: skip

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(fn(buffer[:0]).device)
        if self.branch is not None:
            self.branch._apply(fn)
        return self

    @property
    def weight(self) -> Tensor | Quantized | Int4:
        if self.scale is None:
            return self.values
        return (Int4 if self.values.dtype == torch.uint8 else Quantized)(self.values, self.scale)

    @property
    def fine(self) -> tuple[Tensor, Quantized] | None:
        return None if self.fine_indices is None else (self.fine_indices, Quantized(self.fine_values, self.fine_scale))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features), in x's dtype."""
        y = linear(ops_on(self.backend), x.reshape(1, -1, self.in_features), self)
        return y.view(*x.shape[:-1], self.out_features)

    def unpacked(self) -> nn.Linear:
        """The layer that it was made of, in 16 bits. Not for quantised ones, whose original is gone."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(unpack(self.values, self.backend), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.to(self.values.dtype), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.values.dtype}, {self.backend}"


# ------------------------------------------------------------------------------------------------ computing


def linear(
    ops: Ops,
    x: Tensor | Quantized,
    layer: nn.Linear | PackedLinear | QuantizedLinear,
    *,
    silu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gate · SiLU(layer(x)), each part where asked for: x (B, M, K), the rest as `sana_kernels.gemm`.

    x may be `Quantized` already, for layers that `rows_for` says so of.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.exact(x, silu, gate, residual)
    weight, bias = layer.weight, layer.bias
    branch, factor, fine = (getattr(layer, name, None) for name in ("branch", "factor", "fine"))
    epilogue = {"silu": silu, "gate": gate, "residual": residual}
    if isinstance(weight, Int4) and layer.four_bit:
        low = {} if branch is None else {"low": ops.gemm(x, branch.down), "up": branch.up}
        return ops.gemm_w4a4(ops.quantize_int4(x, layer.smooth), weight, bias, **low, **epilogue, dtype=x.dtype)
    if silu and (branch is not None or fine is not None):  # which are added before it
        return finish(F.silu(linear(ops, x, layer), inplace=True), None, False, gate, residual, x.dtype)
    if branch is not None:
        epilogue["residual"] = ops.gemm(ops.gemm(x, branch.down), branch.up, gate=gate, residual=residual)
    dtype = None
    if isinstance(x, Tensor):
        dtype, x = x.dtype, x if factor is None else x * factor.to(x.dtype)
        x = ops.quantize(x, weight.values.dtype) if isinstance(weight, Quantized) else x
    product = ops.gemm_w4a16 if isinstance(weight, Int4) else ops.gemm
    y = product(x, weight, bias, **epilogue, dtype=dtype)
    if fine is not None:
        indices, rows = fine
        more = ops.gemm(x, rows, dtype=y.dtype)[..., : len(indices)]
        y.index_add_(-1, indices, more if gate is None else more * gate[:, None, indices])
    return y


def is_plain(layer: nn.Module) -> bool:
    """Is a layer nothing but a weight, in 16 or 8 bits, and a bias? Ops that fuse several layers take only those."""
    if isinstance(layer, QuantizedLinear):
        return False
    extras = (getattr(layer, name, None) for name in ("branch", "factor", "fine"))
    return all(extra is None for extra in extras) and not isinstance(layer.weight, Int4)


def rows_for(layer: nn.Module) -> torch.dtype | None:
    """What an op before this layer should quantise its result to; None: nothing."""
    return layer.weight.values.dtype if is_plain(layer) and isinstance(layer.weight, Quantized) else None


# ------------------------------------------------------------------------------------------------ packing


def eight_bit_rows(stored: QuantizedLayer) -> tuple[Quantized, tuple[Tensor, Quantized] | None]:
    """int8 rows (N, K rounded up to a multiple of 64) of a stored weight, and second ones for rows that need them."""
    if stored.format == "int8":
        return Quantized(stored.values, stored.scale), None
    exact = stored.dequantized(padded=True).float()[:, : -(-stored.inputs // STEP) * STEP]
    first = sana_kernels.quantize(exact)
    indices = (spread(stored) > SPREAD).nonzero().flatten()
    if not len(indices):
        return first, None
    rest = exact[indices] - first.values[indices].float() * first.scale[indices, None]
    rest = F.pad(rest, (0, 0, 0, -len(indices) % 16))  # `gemm` takes whole panels of 16 columns
    return first, (indices, sana_kernels.quantize(rest))


def spread(stored: QuantizedLayer) -> Tensor:
    """(N,): the largest of a row's group scales over their median, of groups that are not zero; 1 without groups."""
    if stored.format in EIGHT_BITS:
        return torch.ones(stored.outputs, device=stored.values.device)
    scale = stored.scale.float()
    median = scale.where(scale > 0, torch.nan).nanmedian(1).values
    return (scale.amax(1) / median).nan_to_num(1.0)


def can_pack(layer: nn.Linear, dtype: torch.dtype, backend: str) -> bool:
    """Has this layer a form of its own on a backend? For the CPU's: 16 columns, and rows of 64 bytes (8 bits are padded)."""
    if backend != "cpu":
        return dtype.itemsize == 1
    if dtype not in PACKED or layer.out_features % 16:
        return False
    return dtype.itemsize == 1 or (layer.weight.dtype == dtype and layer.in_features % 32 == 0)


@torch.no_grad()
def pack_linear_layers(module: nn.Module, dtype: torch.dtype, backend: Callable[[str], str]) -> None:
    """Replace, in place, the nn.Linear layers in `module` by packed or quantised ones, where they have such a form.

    dtype: torch.bfloat16, or torch.int8 for W8A8, of which layers called as in KEPT are excepted. `backend` tells from a
    layer's name which backend will run it; "library" and "reference" read 16-bit layers as they are.
    """
    for name, layer in list(module.named_modules()):
        kept = torch.bfloat16 if name.rpartition(".")[2] in KEPT else dtype
        if isinstance(layer, nn.Linear) and can_pack(layer, kept, backend(name)):
            quantized = kept if kept.itemsize == 1 else None
            where = "reference" if backend(name) == "library" else backend(name)
            replace_layer(module, name, PackedLinear.of(layer, quantized, where))


@torch.no_grad()
def pack_quantized_layers(module: nn.Module, executed: Callable[[QuantizedLinear], tuple[str, str]], wide: str) -> None:
    """Replace, in place, the `QuantizedLinear` layers in `module`; `executed` gives (precision, backend) of each.

    Precisions: "w8a8", "w4a4", "w4a16", or "bf16" for an nn.Linear, which `pack_linear_layers` may then pack. `wide`: the
    backend of 16-bit products, for low-rank branches.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, QuantizedLinear):
            precision, backend = executed(layer)
            if precision == "bf16":
                replace_layer(module, name, dequantized(layer))
            else:
                replace_layer(module, name, PackedLinear.executing(layer, precision, backend, wide))


def dequantized(layer: QuantizedLinear) -> nn.Linear:
    """What is stored as an ordinary bf16 layer, and the low-rank branch beside it."""
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(layer.stored.effective().bfloat16(), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.bfloat16(), requires_grad=False)
    made.branch = layer.branch
    return made


def unpack_linear_layers(module: nn.Module) -> None:
    """Undo `pack_linear_layers`, in place, as far as layers are in 16 bits."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, PackedLinear) and layer.scale is None:
            replace_layer(module, name, layer.unpacked())
