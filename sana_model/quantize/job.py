"""What a model is quantised to: the table of layers, a job, and a line of its plan."""

import hashlib
from dataclasses import dataclass, replace

from sana_kernels.quant.svdquant import Recipe
from sana_model.errors import UserError
from sana_model.scheduler import MAX_STEPS

_W8A8, _W4A8 = Recipe("int8", "int8"), Recipe("int4", "int8")
_SVDQUANT = Recipe("int4", "int4", smooth=True, rank=32, grid=10)
_ONCE = Recipe("int8", "16bit")  # W8A16: runs once per prompt, so its time does not count and its size does

MAIN = {"w8a8": _W8A8, "w4a8": _W4A8, "w4a4": _SVDQUANT}
DIT_LAYERS = {
    # of every block; the products over image tokens, and the keys and values of the caption
    "attention.qkv": MAIN,
    "attention.out": MAIN,
    "cross_attention.q": MAIN,
    "cross_attention.kv": dict.fromkeys(MAIN, _ONCE),
    "cross_attention.out": MAIN,
    "mix_ffn.expand": MAIN,
    "mix_ffn.project": MAIN,
    # and in 16 bits: mix_ffn.depthwise, norms, modulation tables, patch, time and caption embeddings, head
}
TEXT_LAYERS = {"w8a8": _W8A8, "w4a16": Recipe("int4", "16bit")}  # all linear layers; embedding and norms in 16 bits


@dataclass(frozen=True)
class Job:
    """All that the bytes of the result depend on."""

    model: str
    precision: str  # of the DiT: w8a8 | w4a8 | w4a4
    prompts: tuple[str, ...]  # of the calibration
    samples: int = 16  # pictures painted; 0: none, for what needs no inputs
    steps: int | None = None  # of each; None: the model's
    text_precision: str | None = None  # w8a8 | w4a16; None: as it is
    rank: int | None = None  # None: the precision's own; 0: no low-rank branch
    smooth: bool | None = None
    gptq: bool = False
    base: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.precision not in MAIN:
            raise UserError(f"models are quantised to {', '.join(MAIN)}, not to {self.precision!r}")
        if self.text_precision not in (None, *TEXT_LAYERS):
            raise UserError(f"text encoders are quantised to {', '.join(TEXT_LAYERS)}, not to {self.text_precision!r}")
        if self.rank is not None and self.rank < 0:
            raise UserError(f"the rank must be 0 (none) or positive, not {self.rank}")
        if self.samples < 0 or (self.steps is not None and not 1 <= self.steps <= MAX_STEPS):
            raise UserError(f"calibration takes at least one step, {MAX_STEPS} at most, and 0 (none) or more samples")
        main = self.recipe("dit", "attention.qkv")
        if main.format != "int4" and (main.gptq or main.rank):
            raise UserError("GPTQ and low-rank branches are for 4-bit weights: --precision w4a8 or w4a4")
        if self.samples == 0 and main.needs_inputs:
            raise UserError(f"{main.method} needs calibration: --samples must be positive")

    def recipe(self, part: str, layer: str) -> Recipe | None:
        """How a layer of a block is quantised; None: not at all."""
        if part == "text":
            return None if self.text_precision is None else TEXT_LAYERS[self.text_precision]
        recipe = DIT_LAYERS[layer][self.precision] if layer in DIT_LAYERS else None
        if recipe is None or recipe is _ONCE:
            return recipe
        chosen = {"rank": self.rank, "smooth": self.smooth, "gptq": self.gptq}
        return replace(recipe, **{name: value for name, value in chosen.items() if value is not None})

    @property
    def parts(self) -> tuple[str, ...]:
        return ("dit",) if self.text_precision is None else ("dit", "text")

    def method(self, part: str) -> str:
        """For a checkpoint's header. The text encoder's 4-bit weights are scaled by AWQ where their inputs are known."""
        if part == "text" and self.text_precision == "w4a16" and self.samples:
            return "awq"
        return self.recipe(part, "attention.qkv").method

    def precision_of(self, part: str) -> str:
        return self.precision if part == "dit" else self.text_precision

    def calibration(self) -> dict | None:
        """For a checkpoint's header."""
        if not self.samples:
            return None
        listed = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {"prompts": listed, "samples": self.samples, "steps": self.steps, "seed": self.seed}


@dataclass(frozen=True)
class Planned:
    """One line of the plan: a layer, and what became of it."""

    part: str  # dit | text
    layer: str
    format: str
    activations: str
    rank: int
    weights: int  # how many
    bytes: int
    # Of its output, on inputs that it was not fitted to. None: there are none, or the output is zero.
    sqnr_db: float | None
    kernel: str  # what runs it on this machine

    @property
    def kind(self) -> str:
        """The layer without the number of its block."""
        return self.layer.split(".", 2)[2]

    def __str__(self) -> str:
        beside = f", rank {self.rank}" if self.rank else ""
        sqnr = "-" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        size = f"{self.bytes / 1e6:.2f} MB"
        return f"{self.layer}  {self.format} × {self.activations}{beside}  {sqnr}  {size}  {self.kernel}"
