"""What 8 and 4 bits cost a text encoder: perplexity of Gemma-3-270M on the beginning of a book, and its states beside fp32.

    python -m sana_bench.text [--json FILE] [--tokens N]

The book is Alice's Adventures in Wonderland (L. Carroll, 1865; in the public domain), text.txt. Quantised are the linear
layers of the blocks, as for SANA's Gemma-2; embedding, norms and the head that predicts words are not. AWQ looks at
prompts for pictures, not at the book.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import sana_model
from sana_bench import gemma
from sana_bench.check import sqnr
from sana_bench.harness import Results
from sana_kernels.quant import formats
from sana_model.errors import UserError
from sana_model.packed import PackedLinear, pack_linear_layers
from sana_model.quantize.awq import NORMS, scale_text_encoder
from sana_model.quantize.layers import replace_layer
from sana_model.text_encoder import TextEncoder

TEXT = Path(__file__).parent / "text.txt"
PROMPTS = Path(sana_model.__file__).parent / "calibration_prompts.txt"
RUNS = ("fp32", "bf16", "w8a8", "w4a16 rtn g64", "w4a16 rtn g128", "w4a16 awq g64", "w4a16 awq g128")


def variant(original: TextEncoder, run: str, ids: Tensor, lengths: Tensor) -> TextEncoder:
    """A copy of an fp32 network as one of RUNS says, on the CPU's kernels; ids (B, L), lengths (B,): what AWQ looks at."""
    encoder = copy.deepcopy(original)
    if run == "fp32":
        return encoder
    if run in ("bf16", "w8a8"):
        pack_linear_layers(encoder.bfloat16(), torch.int8 if run == "w8a8" else torch.bfloat16, lambda name: "cpu")
        return encoder
    _, method, group = run.split()
    size = int(group[1:])
    if method == "awq":
        scale_text_encoder(encoder, ids, lengths, rounded(size))
    for name, layer in list(encoder.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            rows = formats.quantize_int4(layer.weight, group=size, scale_dtype=torch.bfloat16)
            replace_layer(encoder.layers, name, PackedLinear(rows, None, layer.in_features, "cpu"))
    kept = {name: weight.clone() for name, weight in encoder.named_parameters() if name.endswith(NORMS)}
    encoder.bfloat16()  # in place: what it casts are the parameters themselves
    for name, weight in kept.items():
        encoder.get_parameter(name).data = weight
    return encoder


def rounded(group: int) -> Callable[[Tensor], Tensor]:
    """A weight → the values that its 4-bit rows stand for."""

    def of(weight: Tensor) -> Tensor:
        integers, scale = formats.int4_steps(weight.float(), group, torch.bfloat16)
        return (integers * scale[..., None]).flatten(-2)[..., : weight.shape[1]]

    return of


def calibration(tokenizer: gemma.SentencePieces) -> tuple[Tensor, Tensor]:
    """Prompts for pictures: ids (B, L), padded with 0, and lengths (B,)."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    rows = [tokenizer.encode(line) for line in lines if line and not line.startswith("#")]
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor([len(row) for row in rows])


def bits(encoder: TextEncoder) -> float:
    """Stored bits of a weight of the quantised layers, their 4-bit scales in bf16 as in a checkpoint."""
    layers = [m for m in encoder.layers.modules() if isinstance(m, nn.Linear | PackedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    values = [layer.weight if isinstance(layer, nn.Linear) else layer.values for layer in layers]
    scales = [s for layer in layers if (s := getattr(layer, "scale", None)) is not None]
    width = 16 if any(value.dtype == torch.uint8 for value in values) else 32
    return (8 * sum(value.nbytes for value in values) + width * sum(s.numel() for s in scales)) / weights


def table(rows: list[dict]) -> str:
    lines = ["| | bits | perplexity | states beside fp32, dB |", "|---|---|---|---|"]
    for row in rows:
        m = row["metrics"]
        states = f"{m['states_sqnr_db']:.1f}" if "states_sqnr_db" in m else "–"
        lines.append(f"| {row['precision']} | {m['bits']:.2f} | {m['perplexity']:.2f} | {states} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sana_bench.text", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the book (default: all)")
    args = parser.parse_args(argv)
    if args.tokens is not None and args.tokens < 2:
        parser.error("--tokens must be at least 2")
    results = Results(args.json, 0)
    original, tokenizer = gemma.load()
    head = original.embed_tokens.weight
    ids = torch.tensor(tokenizer.encode(TEXT.read_text(encoding="utf-8")))[None, : args.tokens]
    prompts, length = calibration(tokenizer), torch.tensor([ids.shape[1]])
    rows, exact = [], None
    for run in RUNS:
        encoder = variant(original, run, *prompts)
        with torch.inference_mode():
            states = encoder(ids, length)[0].float()
        exact = states if exact is None else exact
        metrics = {"perplexity": gemma.perplexity(states, head, ids[0]), "bits": bits(encoder), "tokens": ids.shape[1]}
        if run != "fp32":
            metrics["states_sqnr_db"] = sqnr(states, exact)
        rows.append({
            "kind": "text", "name": gemma.NAME, "backend": "cpu", "precision": run, "status": "ok", "metrics": metrics,
        })  # fmt: skip
        print(run, metrics, file=sys.stderr, flush=True)
        results.replace(rows)
    results.save(complete=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
