"""One line for users of diffusers: their pipeline, our kernels.

    pipe = SanaPipeline.from_pretrained(...)
    sana_kernels.optimize(pipe, precision="w8a8")      # prints the plan, and returns it
    pipe("a fox").images[0]
    sana_kernels.restore(pipe)                          # as it was

The transformer stays where it is, with its configuration and its place in the pipeline; only its `forward` is exchanged for
a `DiT` of ours on the same weights. Linear layers are copied into the layout, and the precision, that our kernels read, so
what happens to the transformer afterwards (a LoRA, other weights, another device) asks for another `optimize`, and a call
without it is refused. A `Pipeline` of ours is given another plan in the same way.
"""

import copy
import itertools
from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor, nn

from sana_model.config import BUILT_IN
from sana_model.dit import DiT, TextContext
from sana_model.errors import MissingError, UserError
from sana_model.packed import unpack_linear_layers
from sana_model.pipeline import Pipeline
from sana_model.plan import Plan, dtype_name, resolve
from sana_model.settings import DTYPES, PRECISIONS, precisions_for
from sana_model.weights import keys
from sana_model.weights.checkpoint import check, fill, stored
from sana_model.weights.checkpoint_config import read_dit
from sana_model.weights.defaults import clamps
from sana_model.weights.lora import Loras

SELF_ATTENTION, CROSS_ATTENTION = "SanaLinearAttnProcessor2_0", "SanaAttnProcessor2_0"
"""diffusers' processors, which the DiT computes."""

NOT_OPTIMISED = "this pipeline was not optimised: there is nothing to restore"

PERTURBED = {"PAGCFGSanaLinearAttnProcessor2_0": 3, "PAGIdentitySanaLinearAttnProcessor2_0": 2}
"""diffusers' processors of perturbed-attention guidance; into how many parts they cut the batch, the last one perturbed."""

SAMPLED = 16
"""Values of each matrix that are compared from call to call: what a LoRA adds is hardly lost in the rounding of them all."""


def optimize(pipe, precision: str | None = None, backend: str = "auto") -> Plan:
    """Turn the DiT of a loaded pipeline over to the kernels of `backend`, in place; prints the plan and returns it.

    `pipe`: diffusers' SanaPipeline, SanaPAGPipeline or SanaSprintPipeline, or a `Pipeline` of ours. `precision`: bf16, w8a8,
    w4a8, w4a4, fp32 or fp16; by default that of the transformer. Text encoder and decoder are left alone. A second call
    replaces the first. Raises UserError for what is no such pipeline, and MissingError where no kernel of this machine can
    do any of it.
    """
    if isinstance(pipe, Pipeline):
        with pipe._alone():
            plan = _optimize_ours(pipe, precision, backend)
    else:
        plan = _optimize(pipe, precision, backend)
    print(plan)
    return plan


def restore(pipe) -> None:
    """Undo `optimize`. Raises UserError where there is nothing to undo."""
    if isinstance(pipe, Pipeline):
        with pipe._alone():
            _restore_ours(pipe)
        return
    transformer = _transformer(pipe)
    if (forward := _installed(transformer)) is not None:
        forward.undo()
    elif _is_replaced(transformer):
        raise UserError(
            "the transformer's forward has been replaced, by a hook perhaps; remove that first, then restore"
        )
    else:
        raise UserError(NOT_OPTIMISED)


def _plan(config, backend: str, device: torch.device, precisions: dict[str, str]) -> Plan:
    """The plan of the DiT alone. Raises MissingError where it is plain PyTorch throughout."""
    plan = resolve(config, backend, device, precisions)
    rows = [row for row in plan.rows if row.part == "dit"]
    if all(row.backend in ("reference", "library") for row in rows):
        reasons = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason))
        raise MissingError(f"no kernel of backend {plan.backend!r} can run any of this DiT: {reasons or 'it has none'}")
    return Plan(plan.backend, {"dit": precisions["dit"]}, rows, plan.clock)


# ------------------------------------------------------------------------------------------- pipelines of our own


def _optimize_ours(pipe: Pipeline, precision: str | None, backend: str) -> Plan:
    _refuse_loras(pipe)
    if not isinstance(pipe.dit, DiT):
        raise UserError(
            "this pipeline runs exported graphs, whose kernels are those of their runtime; load the model itself"
        )
    as_loaded = pipe.__dict__.get("_before_optimize", (pipe.plan, pipe.dit, pipe.loras))
    before, loaded_dit, _ = as_loaded
    loaded = before.precisions["dit"]
    precision = precision or loaded
    precisions = precisions_for(precision) | {"dit": precision}
    if loaded not in DTYPES:
        raise UserError(
            f"this pipeline's DiT was loaded in {loaded}, for kernels already; optimize takes 16 bits or fp32"
        )
    if PRECISIONS[precision] != PRECISIONS[loaded]:
        raise UserError(
            f"this pipeline's DiT was loaded in {loaded}, from which {precision} cannot be made; load it with"
            f" precision={precision!r}"
        )
    plan = _plan(pipe.config, backend, pipe.device, precisions)
    others = [row for row in before.rows if row.part != "dit"]
    # The clock is that of the decoder's ops, too, which are left alone.
    plan = Plan(plan.backend, before.precisions | {"dit": precision}, others + plan.rows, before.clock, before.eager)
    tensors = itertools.chain(loaded_dit.parameters(), loaded_dit.buffers())
    dit = copy.deepcopy(loaded_dit, {id(t): t for t in tensors})  # other modules, the same memory
    for block in dit.blocks:
        unpack_linear_layers(block)
        plan.prepare("dit", block)
    dit.ops = plan.ops("dit")
    pipe._before_optimize = as_loaded
    pipe.plan, pipe.dit, pipe.model.dit = plan, dit, dit
    pipe.loras = Loras(dit, plan.wide_backend("dit"))
    return plan


def _restore_ours(pipe: Pipeline) -> None:
    if "_before_optimize" not in pipe.__dict__:
        raise UserError(NOT_OPTIMISED)
    _refuse_loras(pipe)
    pipe.plan, pipe.dit, pipe.loras = pipe.__dict__.pop("_before_optimize")
    pipe.model.dit = pipe.dit


def _refuse_loras(pipe: Pipeline) -> None:
    if pipe.loras.strengths:
        raise UserError("this pipeline wears a LoRA; take it off first: pipe.remove_lora(name)")


# ------------------------------------------------------------------------------------------- those of diffusers


def _transformer(pipe) -> nn.Module:
    """The SanaTransformer2DModel of a pipeline, also behind torch.compile."""
    transformer = getattr(pipe, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    if type(transformer).__name__ != "SanaTransformer2DModel":
        raise UserError(
            f"optimize takes a pipeline with a SanaTransformer2DModel, such as diffusers' SanaPipeline, not a "
            f"{type(pipe).__name__}" + (f" with a {type(transformer).__name__}" if transformer is not None else "")
        )
    return transformer


def _checkpoint(pipe, transformer: nn.Module) -> str:
    """The path or hub id from which diffusers loaded the transformer, or else the pipeline; "" where it knows of none."""
    configs = (transformer.config, getattr(pipe, "config", {}))
    return next((str(name) for config in configs if (name := config.get("_name_or_path"))), "")


def _installed(transformer: nn.Module) -> "Forward | None":
    forward = transformer.__dict__.get("forward")
    return forward if isinstance(forward, Forward) else None


def _is_replaced(transformer: nn.Module) -> bool:
    """Is `forward` not the one of its class? Hooks that were removed leave that one behind, as an attribute."""
    forward = transformer.forward
    return getattr(forward, "__func__", None) is not type(transformer).forward or forward.__self__ is not transformer


def _optimize(pipe, precision: str | None, backend: str) -> Plan:
    transformer = _transformer(pipe)
    installed = _installed(transformer)
    if "_hf_hook" in transformer.__dict__:
        raise UserError(
            "the transformer has a hook of accelerate (offloading?), which would undo this; remove it first"
        )
    if installed is None and _is_replaced(transformer):
        raise UserError(
            "the transformer's forward has been replaced (by a hook, or diffusers' offloading?), which would be lost; remove"
            " that first"
        )
    _perturbed_blocks(transformer)
    values = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    dit_config = read_dit(values | {"_class_name": "SanaTransformer2DModel"}, "the transformer's configuration")
    dit_config = replace(dit_config, clamp=clamps(_checkpoint(pipe, transformer)))
    if transformer.dtype not in DTYPES.values():
        raise UserError(
            f"the transformer is in {transformer.dtype}; move it to bf16, fp16 or fp32: pipe.to(torch.bfloat16)"
        )
    precisions = precisions_for(precision or dtype_name(transformer.dtype))
    plan = _plan(replace(BUILT_IN["sana-1.6b"], dit=dit_config), backend, transformer.device, precisions)

    state = transformer.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    checkpoint = stored(
        "the pipeline's transformer (a LoRA has to be fused first: pipe.fuse_lora(); pipe.unload_lora_weights())",
        shapes,
        state.get,
    )
    with torch.device("meta"):
        dit = DiT(dit_config)
    rules = keys.rules(dit_config)
    check(checkpoint, dit, rules, "diffusers")
    fill(dit, checkpoint, rules, "diffusers", PRECISIONS[precisions["dit"]], lambda block: plan.prepare("dit", block))
    dit.ops = plan.ops("dit", timed=False)  # nobody would ever reset the clock
    if installed is not None:
        installed.undo()
    transformer.forward = Forward(transformer, dit)
    return plan


class Forward:
    """What `SanaTransformer2DModel.forward` is replaced by: the same arguments, the same result, our DiT.

    Keys and values of the caption are kept from one step to the next, together with a copy of the caption itself: they
    are used again only for a caption with the same values, wherever those lie.
    """

    def __init__(self, transformer: nn.Module, dit: DiT):
        self.transformer, self.dit = transformer, dit
        self._weights = Fingerprint(transformer)
        self._caption: tuple[Tensor, Tensor | None, TextContext] | None = None

    def undo(self) -> None:
        del self.transformer.forward

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: dict | None = None,
        controlnet_block_samples: tuple[Tensor, ...] | None = None,
        return_dict: bool = True,
    ):
        """As documented there. Raises UserError for attention masks of the image, ControlNet and attention_kwargs."""
        given = {"attention_mask": attention_mask, "controlnet_block_samples": controlnet_block_samples}
        given["attention_kwargs"] = attention_kwargs or None
        if unsupported := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"the optimised DiT takes no {unsupported[0]}; sana_kernels.restore(pipe) brings the original back"
            )
        if not self._weights.fits(self.transformer):
            raise UserError(
                "the transformer has changed since it was optimised; call sana_kernels.optimize(pipe) again"
            )
        dit, rows = self.dit, len(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):  # the plan says what is computed in what
            time = dit.embedded_time(timestep.expand(rows), guidance)
            text = self._text(encoder_hidden_states, encoder_attention_mask)
            perturbed, layers = self._perturbed(rows)
            sample = dit.step(hidden_states, time, text, perturbed, layers).to(hidden_states.dtype)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _text(self, states: Tensor, mask: Tensor | None) -> TextContext:
        """Keys and values of a caption (B, L, channels), of which `mask` (B, L) keeps what is not 0."""
        kept = self._caption
        if kept is None or not _same(kept[0], states) or not _same(kept[1], mask):
            kept = states.clone(), None if mask is None else mask.clone(), self.dit.text(*_real_tokens(states, mask))
            self._caption = kept
        return kept[2]

    def _perturbed(self, rows: int) -> tuple[int, list[int]]:
        """Perturbed-attention guidance: how many of the rows, in which blocks, by diffusers' processors."""
        parts = _perturbed_blocks(self.transformer)
        layers = [i for i, part in enumerate(parts) if part]
        return (rows // max(parts) if layers else 0), layers


def _perturbed_blocks(transformer: nn.Module) -> list[int]:
    """By block, into how many parts its processor cuts the batch, 0 where it perturbs nothing. UserError for others."""
    parts = []
    for block in transformer.transformer_blocks:
        known = (block.attn1, (SELF_ATTENTION, *PERTURBED)), (block.attn2, (CROSS_ATTENTION,))
        for attention, names in known:
            kind = type(attention.processor)
            if kind.__name__ not in names or not kind.__module__.startswith("diffusers."):
                raise UserError(
                    f"the optimised DiT does not know the attention processor {kind.__name__} where diffusers has {names[0]}"
                )
        parts.append(PERTURBED.get(type(block.attn1.processor).__name__, 0))
    return parts


class Fingerprint:
    """Tells whether the weights of a transformer have changed: others, elsewhere, written to, or with other values.

    What PyTorch counts comes first, and costs less. PEFT fuses through `.data`, which counts no writes (nor do inference
    tensors): so a few values of every matrix are compared, too.
    """

    @torch.no_grad()
    def __init__(self, transformer: nn.Module):
        self.written = self._written(transformer)
        self.sampled = defaultdict(list)  # views of the weights, by dtype and device
        for p in transformer.parameters():
            if p.ndim > 1:
                step = max(1, (p.numel() - 1) // (SAMPLED - 1))
                self.sampled[p.dtype, p.device].append(p.as_strided((min(SAMPLED, p.numel()),), (step,)))
        self.values = self._values()

    def fits(self, transformer: nn.Module) -> bool:
        """Are these still the weights, and what they were?"""
        return self._written(transformer) == self.written and all(map(torch.equal, self._values(), self.values))

    @staticmethod
    def _written(transformer: nn.Module) -> list[tuple]:
        """Which weights, where, and how often they were written to."""
        return [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in transformer.parameters()]

    def _values(self) -> list[Tensor]:
        """Their bytes, of which NaN equals itself."""
        return [torch.cat(views).view(torch.uint8) for views in self.sampled.values()]


def _same(kept: Tensor | None, now: Tensor | None) -> bool:
    if kept is None or now is None:
        return kept is now
    return kept.shape == now.shape and kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)


def _real_tokens(states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The states with those that count in front, whose order means nothing to attention, and how many they are."""
    if mask is None:
        return states, None
    if mask.ndim != 2:
        raise UserError(f"the optimised DiT takes an encoder_attention_mask of shape (B, L), not {tuple(mask.shape)}")
    keep = mask != 0
    keep = keep | ~keep.any(1, keepdim=True)  # nothing at all: diffusers' softmax then sees every token
    order = keep.int().argsort(dim=1, descending=True, stable=True)
    return states.gather(1, order[:, :, None].expand_as(states)), keep.sum(1)
