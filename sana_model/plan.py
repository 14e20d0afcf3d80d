"""Which kernel computes which op, decided before the first step and open to inspection.

A pipeline backend is an ordered list: `cuda` means "CUDA C++ where it can, else Triton, else plain PyTorch". `resolve` asks
the registry of `sana_kernels` for every op with this model's shapes and dtype, and says for each op that did not get the
first choice why not. Nothing falls back later: an op that was planned on a kernel runs on it or raises.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from torch import nn

import sana_kernels
from sana_kernels.backend import CAP, OPS, backend_status, extension, kernels, why_not
from sana_kernels.conv2d import WINOGRAD_CHANNELS, winograd_integers
from sana_kernels.mix_ffn import taps_first
from sana_model.autoencoder.bands import BAND_BYTES
from sana_model.autoencoder.packed import pack_autoencoder
from sana_model.config import BUILT_IN, ModelConfig
from sana_model.errors import MissingError, UserError
from sana_model.example_calls import NATIVE, WIDE, autoencoder_examples, dit_examples, text_examples
from sana_model.graph import why_eager
from sana_model.ops import REFERENCE_OPS, Ops
from sana_model.packed import pack_linear_layers, pack_quantized_layers
from sana_model.quantize.layers import KEPT, SCHEMES, QuantizedLinear, quantize_linear_layers
from sana_model.settings import DTYPES, FOUR_BIT, PRECISIONS, QUANTIZED

PIPELINES = {
    "reference": ("reference",),
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "library", "reference"),
    "triton": ("triton", "library", "reference"),
}

EXECUTED = {"w4a8": "w8a8", "w4a4": "w8a8", "w4a16": "bf16"}  # what takes their place where no backend has a kernel
EXACT = "quantized_linear"  # the row of layers that compute what is stored, to the letter
PRODUCTS = ("gemm", "mix_ffn")  # what is computed in another precision
ON_GPU = ("cuda", "triton")


@dataclass(frozen=True)
class Row:
    """One line of the plan."""

    part: str  # text_encoder | dit | autoencoder
    op: str
    backend: str  # a kernel's backend, or "library" for what PyTorch does in any case
    precision: str  # what is executed
    reason: str  # why the backends before it in the list were passed over
    stored: str = ""  # the precision of the weights where that is another


class OpClock:
    """Seconds spent inside each (part, op), so that a result can say how much of its time the named backend had.

    `running`: on a GPU two events around every op cost time of their own, which a benchmark cannot have.
    """

    def __init__(self, cuda: bool):
        self.cuda, self.running = cuda, True
        self.reset()

    def reset(self) -> None:
        self._seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._events: list[tuple[tuple[str, str], torch.cuda.Event, torch.cuda.Event]] = []

    def wrap(self, key: tuple[str, str], run: Callable) -> Callable:
        def on_cpu(*args, **kwargs):
            if torch.compiler.is_compiling():  # what is compiled cannot read the clock
                return run(*args, **kwargs)
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self._seconds[key] += time.perf_counter() - start

        def on_gpu(*args, **kwargs):
            # What is compiled or replayed cannot read the clock either.
            if torch.compiler.is_compiling() or not self.running or torch.cuda.is_current_stream_capturing():
                return run(*args, **kwargs)
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            result = run(*args, **kwargs)
            events[1].record()
            self._events.append((key, *events))
            return result

        return on_gpu if self.cuda else on_cpu

    def seconds(self) -> dict[tuple[str, str], float]:
        if self._events:
            torch.cuda.synchronize()
        total = defaultdict(float, self._seconds)
        for key, start, end in self._events:
            total[key] += start.elapsed_time(end) / 1e3
        return total


class Plan:
    """The rows, and the `Ops` that carry them out.

    `eager`: why the steps of a picture run launch by launch; None: as one CUDA graph. `exact`: see `resolve`.
    """

    def __init__(
        self, backend: str, precisions: dict[str, str], rows: list[Row], clock: OpClock,
        eager: str | None = "the caller walks the steps", exact: bool = False,
    ):  # fmt: skip
        self.backend, self.precisions, self.rows, self.clock, self.eager = backend, precisions, rows, clock, eager
        self.exact, self._outside_share = exact, 1.0

    @property
    def executed(self) -> dict[str, str]:
        """By part, what most of its matrix products run in; "exact" where that is the letter of what is stored."""
        found = dict(self.precisions)
        for row in reversed(self.rows):  # the first row of a part counts
            if row.op in ("gemm", EXACT, *NATIVE.values()):
                found[row.part] = "exact" if row.op == EXACT else row.precision
        return found

    def described(self, part: str) -> str:
        """The precision of a part, and what is executed where that is another."""
        stored, executed = self.precisions[part], self.executed[part]
        if executed == "exact":
            return f"{stored} executed exactly"
        return stored if stored == executed else f"{stored} executed as {executed}"

    def ops(self, part: str, *, timed: bool = True) -> Ops:
        """The ops of "dit" or "autoencoder", each bound to its kernel and timed by the plan's clock."""
        bound = {}
        for op in (f.name for f in fields(Ops)):
            if op == "linear_attention_from" and not self._has(part, op):
                continue
            backend, wide = self._backend(part, op), self._backend(part, op, wide=True)
            run = _on(op, backend)
            if op in ("gemm", "conv2d") and wide != backend:
                run = _by_weight(run, _on(op, wide))
            bound[op] = self.clock.wrap((part, op), run) if timed else run
            if (in_one := f"{op}_quantized") in OPS and not _has_kernel(in_one, backend):
                bound[op] = _then_quantize(bound[op], bound["quantize"])
        return Ops(**bound)

    def prepare(self, part: str, module: nn.Module) -> None:
        """Bring a block of the DiT, a layer of the text encoder, or the autoencoder, in place, into its kernels' form."""
        precision = self.precisions[part]
        if part == "autoencoder":
            module.band_bytes = BAND_BYTES if self.in_bands else None
            pack_autoencoder(module, QUANTIZED.get(precision), partial(self._backend, part))
            return
        stored = any(isinstance(layer, QuantizedLinear) for layer in module.modules())
        if precision in FOUR_BIT and not stored:
            quantize_linear_layers(module, precision)

        def backend(layer: str) -> str:
            if layer.rpartition(".")[2] in KEPT:
                return self.wide_backend(part)
            return self._backend(part, "mix_ffn" if layer.startswith("mix_ffn.") else "gemm")

        if not self._has(part, EXACT):
            pack_quantized_layers(module, partial(self._execution, part), self.wide_backend(part))
        # Of a quantised checkpoint, whatever is not quantised is meant to stay so.
        dtype = torch.bfloat16 if stored else QUANTIZED.get(precision, PRECISIONS[precision])
        pack_linear_layers(module, dtype, backend)
        if (
            part == "dit"
            and self._backend(part, "mix_ffn" if self._has(part, "mix_ffn") else "depthwise_glu") in ON_GPU
        ):
            depthwise = module.mix_ffn.depthwise
            depthwise.weight = nn.Parameter(taps_first(depthwise.weight.detach()), requires_grad=False)

    def _execution(self, part: str, layer: QuantizedLinear) -> tuple[str, str]:
        """The precision in which a layer is executed, and the backend."""
        stored = layer.stored
        for precision, op in NATIVE.items():
            if (stored.format, stored.activations) == SCHEMES[precision] and self._has(part, op):
                return precision, self._backend(part, op)
        if stored.activations == "16bit":
            return "bf16", self.wide_backend(part)
        return "w8a8", self._backend(part, "gemm")

    @property
    def in_bands(self) -> bool:
        """Does the autoencoder run band by band? Where its kernels then make the very same pixels."""
        return self._backend("autoencoder", "conv2d") == "cpu"

    def _has(self, part: str, op: str) -> bool:
        return any((row.part, row.op) == (part, op) for row in self.rows)

    def wide_backend(self, part: str) -> str:
        """The backend of matrix products that stay in 16 bits or more, such as those of low-rank branches."""
        return self._backend(part, "gemm", wide=True)

    def _backend(self, part: str, op: str, wide: bool = False) -> str:
        """`wide`: of the form with 16-bit operands, where there are two."""
        rows = [row for row in self.rows if (row.part, row.op) == (part, op)]
        chosen = [row for row in rows if row.precision in DTYPES] if wide else rows
        return next((row.backend for row in chosen), "reference")

    @property
    def transformed(self) -> str:
        """The integers, "int8" or "int16", of the decoder's kernels from WINOGRAD_CHANNELS on; "" if they are direct."""
        precisions = {
            row.precision for row in self.rows if (row.part, row.op, row.backend) == ("autoencoder", "conv2d", "cpu")
        }
        eight_bit = "w8a8" in precisions
        integers = winograd_integers(eight_bit) if eight_bit or "bf16" in precisions else None
        return "" if integers is None else str(integers).removeprefix("torch.")

    def outside_share(self, denoise_seconds: float) -> float:
        """Fraction of the denoising time since the clock's reset that was spent outside the named backend's kernels.

        The replay of a CUDA graph shows no ops: its fraction is that of the last loop that ran launch by launch.
        """
        named = {("dit", row.op) for row in self.rows if row.part == "dit" and row.backend == self.backend}
        seconds = {op: spent for (part, op), spent in self.clock.seconds().items() if part == "dit"}
        if "modulate" in seconds and denoise_seconds > 0:  # every step has it, and nothing outside the loop
            inside = sum(spent for op, spent in seconds.items() if ("dit", op) in named)
            self._outside_share = max(0.0, 1 - inside / denoise_seconds)
        return self._outside_share

    def as_json(self) -> dict:
        return {
            "backend": self.backend,
            "executed": self.executed,
            "rows": [asdict(row) for row in self.rows],
            "eager": self.eager,
            "transformed": self.transformed,
        }

    def __str__(self) -> str:
        lines = [f"plan for backend {self.backend!r}: " + " → ".join(PIPELINES[self.backend])]
        for row in self.rows:
            stored = f"stored as {row.stored}" if row.stored else ""
            why = "; ".join(filter(None, (stored, row.reason)))
            lines.append(
                f"  {row.part:<13} {row.op:<17} {row.backend:<10} {row.precision:<5}" + f"   ({why})" * bool(why)
            )
        if self.transformed:
            lines.append(
                f"  decoder       from {WINOGRAD_CHANNELS} channels on in {self.transformed}: Winograd's F(4 × 4, 3 × 3),"
                " and after an upsampling 9 products instead of 16"
            )
        if self.clock.cuda:
            lines.append("  denoising loop: " + (f"eager ({self.eager})" if self.eager else "one CUDA graph per shape"))
        return "\n".join(lines)


def choose_backend(backend: str, device: torch.device) -> str:
    """Turn "auto" into the fastest pipeline backend of this machine; refuse one that cannot run here at all."""
    if backend == "auto":
        if device.type == "cpu" and CAP in (why := backend_status("cpu") or ""):
            raise UserError(why)
        candidates = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
        return next((name for name in candidates if backend_status(name) is None), "reference")
    if backend not in PIPELINES:
        raise UserError(f"backend {backend!r} is not known; choose one of auto, {', '.join(PIPELINES)}")
    if backend == "cpu" and device.type != "cpu":
        raise UserError(
            f"backend 'cpu' computes on the CPU, and the model is meant to be on {device}; put it on the CPU, or choose"
            " another backend: auto, cuda, triton or reference"
        )
    reason = backend_status(backend)
    if reason is None and backend in ("cuda", "triton") and device.type != "cuda":
        reason = f"the model is on {device.type}, and {backend} needs an NVIDIA GPU"
    if reason is not None:
        raise MissingError(
            f"backend {backend!r} cannot run here: {reason}. `sana doctor` tells what this machine can do"
        )
    return backend


def resolve(
    config: ModelConfig,
    backend: str,
    device: torch.device,
    precisions: dict[str, str],
    *,
    exact: bool = False,
    low_memory: bool = False,
    cuda_graph: bool = True,
) -> Plan:
    """Choose a kernel for every op of the model. `precisions`: by part, as `settings.precisions_for` gives them.

    `exact`: quantised products are computed as they are stored, in the reference's arithmetic, whatever that costs.
    `low_memory`: the DiT is moved between pictures; `cuda_graph`: whether its loop may be one.
    Raises MissingError where the named backend cannot run at all.
    """
    backend = choose_backend(backend, device)
    rows = []
    with torch.cuda.device(device) if device.index is not None and device.type == "cuda" else nullcontext():
        for part, examples in (
            ("text_encoder", text_examples), ("dit", dit_examples), ("autoencoder", autoencoder_examples)
        ):  # fmt: skip
            rows += _rows(part, partial(examples, config), precisions[part], PIPELINES[backend], device, exact)
    eager = why_eager(backend, device, wanted=cuda_graph, low_memory=low_memory)
    return Plan(backend, precisions, rows, OpClock(device.type == "cuda"), eager, exact)


def _rows(
    part: str, examples: Callable[[str], dict], stored: str, order: tuple[str, ...], device: torch.device, exact: bool
) -> list[Row]:
    """The plan of one part, whose precision is `stored`. `examples`: by precision, arguments of every op."""
    executed, rows, why = stored, [], []
    if stored in FOUR_BIT and (exact or order == ("reference",)):
        rows.append(Row(part, EXACT, "reference", stored, ""))
    elif stored in FOUR_BIT:
        executed, rows, why = _four_bit(part, examples(stored), stored, order, device)
    for name, args in examples(executed).items():
        op = name.removesuffix(WIDE)
        if op in NATIVE.values():
            continue
        precision = _precision_of(args, executed)
        only_reference = exact and op in PRODUCTS and precision in QUANTIZED
        chosen, reasons = _first_that_can(op, ("reference",) if only_reference else order, args, device)
        if op in PRODUCTS and chosen == "reference" and precision == "fp8" and not only_reference and len(order) > 1:
            raise MissingError(
                f"fp8 cannot run here ({'; '.join(reasons)}); run with --precision w8a8 or bf16, or with --backend"
                " reference, which simulates it"
            )
        if op == "linear_attention_from" and chosen == "reference":
            continue  # where no kernel fuses them, a product and `linear_attention` are faster
        if op in ("gemm", "conv2d") and chosen == "reference" and precision in DTYPES:
            chosen = "library"
        if op == "depthwise_glu" and "mix_ffn" in examples(executed):
            reasons.append("only beside low-rank branches, which mix_ffn does not take")
        of_stored = name in PRODUCTS and stored != executed
        reason = "; ".join((why if of_stored else []) + reasons)
        rows.append(Row(part, op, chosen, precision, reason, stored if of_stored else ""))
    return rows


def _four_bit(
    part: str, examples: dict[str, tuple], stored: str, order: tuple[str, ...], device: torch.device
) -> tuple[str, list[Row], list[str]]:
    """(what 4-bit weights are executed in, the rows of ops that multiply them as they are, why there are none)."""
    if stored not in NATIVE:
        return EXECUTED[stored], [], []
    reasons = []
    for name in (kernel.backend for kernel in kernels(NATIVE[stored]) if kernel.backend in order[:-1]):
        reason = why_not(NATIVE[stored], name, *examples[NATIVE[stored]], device=device)
        if reason is None:
            ops = [NATIVE[stored]] + ["quantize_int4"] * (stored == "w4a4")
            return stored, [Row(part, op, name, stored, "; ".join(reasons)) for op in ops], []
        reasons.append(f"{name}: {reason}")
    return EXECUTED[stored], [], reasons or [f"no kernel of {order[0]} multiplies {stored}"]


def _first_that_can(op: str, order: tuple[str, ...], args: tuple, device: torch.device) -> tuple[str, list[str]]:
    reasons = []
    for name in order:
        if name == "library" and not _has_kernel(op, name):
            continue
        reason = why_not(op, name, *args, device=device) or _library_is_faster(op, name, args[0].dtype)
        if reason is None:
            return name, reasons
        reasons.append(f"{name}: {reason}")
    raise MissingError(f"no backend can run {op}: " + "; ".join(reasons))


def _precision_of(args: tuple, precision: str) -> str:
    """What an op with these arguments runs in: in a quantised part, some have no 8-bit operands or results."""
    dtypes = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args]
    if precision in FOUR_BIT or (precision in QUANTIZED and QUANTIZED[precision] not in dtypes):
        return dtype_name(PRECISIONS[precision])
    return precision


def _on(op: str, backend: str) -> Callable:
    """An op on one backend; of ops without a "library" kernel that is the reference, which calls PyTorch."""
    if backend == "reference" or (backend == "library" and not _has_kernel(op, backend)):
        return getattr(REFERENCE_OPS, op)
    return partial(getattr(sana_kernels, op), backend=backend)


def _then_quantize(run: Callable, quantize_rows: Callable) -> Callable:
    """What stands for an op that can end in 8-bit rows, on a backend that has no kernel for both."""

    def both(*args, quantize: torch.dtype | None = None, **kwargs):
        y = run(*args, **kwargs)
        return y if quantize is None else quantize_rows(y.flatten(2), quantize)

    return both


def _has_kernel(op: str, backend: str) -> bool:
    return any(kernel.backend == backend for kernel in kernels(op))


def _by_weight(quantized: Callable, wide: Callable) -> Callable:
    """`gemm` or `conv2d`, which may run on another backend for 16-bit weights than for quantised ones, which have scales."""

    def run(x, weight, *args, **kwargs):
        chosen = wide if getattr(weight, "scale", None) is None else quantized
        return chosen(x, weight, *args, **kwargs)

    return run


def _library_is_faster(op: str, backend: str, dtype: torch.dtype) -> str | None:
    """Our matrix products have no tuned form for processors without vector instructions that we know."""
    if op not in ("gemm", "mix_ffn") or backend != "cpu" or dtype == torch.int8:
        return None
    return "PyTorch's product is faster than portable C++" if extension("_cpu")[0].isa() == "portable" else None


def precisions_here() -> str:
    """For every precision, what this machine executes, by the plans of a model of 1.6B parameters; a line each."""
    config, device = BUILT_IN["sana-1.6b"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for precision in PRECISIONS:
        try:
            parts = {"dit": precision, "text_encoder": precision, "autoencoder": "bf16"}
            plan = resolve(config, "auto", device, parts)
        except MissingError as error:
            lines.append(f"  {precision:<13} not here: {error}")
            continue
        row = next(row for row in plan.rows if row.part == "dit" and row.op in ("gemm", *NATIVE.values()))
        where = f"{plan.executed['dit']} by {row.backend}"
        if plan.executed["text_encoder"] != plan.executed["dit"]:
            where += f"; text encoder {plan.executed['text_encoder']}"
        lines.append(f"  {precision:<13} {where}")
    return "\n".join(lines)


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
