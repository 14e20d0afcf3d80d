"""`sana tune [op]`: measures the tiles of the Triton kernels on this GPU and proposes another sana_kernels/tiles.json.

For a matrix product the table wants speeds, not a winner per shape: each tile of a grid is timed on a product that keeps the
whole chip busy, and of each tile's settings (k, warps, stages) the fastest stays. For `linear_attention_from` the fastest
tile on SANA's shape stays. Every op in every dtype is a part of its own, of at most 60 kernels to compile, a second or two
each. Nothing is applied: whoever has looked at the proposals merges them (`--merge`), copies the result over the table, and
has `python -m sana_bench.resources_triton` check that no kernel spills in it.
"""

import importlib
import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from sana_bench.harness import gpu_times
from sana_kernels import tiles
from sana_kernels.tiles import Tile
from sana_model.errors import MissingError, UserError

OPS = {"gemm": "gemm", "gemm_residual": "gemm with residual", "linear_attention_from": "attention"}
"""What can be tuned, and its name in the table."""

DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
Seconds = Callable[[str, torch.dtype, Tile], float | None]  # (kind of the table, operands, tile); None: it cannot run


def space(kind: str, dtype: torch.dtype, shared: int) -> list[Tile]:
    """The tiles that are tried: those whose loads fit into `shared` bytes, in the numbers of warps that suit their size."""
    steps = [64, 128] if dtype.itemsize == 1 else [32, 64]
    columns = (64, 128) if kind == "attention" else (64, 128, 256)
    tiles = (Tile(*one) for one in itertools.product((64, 128), columns, steps, (4, 8), (2, 3, 4)))

    def fits(tile: Tile) -> bool:
        width = 2 * tile.n if kind == "attention" else tile.n  # k and v
        results = tile.m * width // (32 * tile.warps)  # of a thread
        loads = tile.stages * (tile.m + width) * tile.k * dtype.itemsize
        return loads <= shared and 32 <= results <= 128

    return list(filter(fits, tiles))


def propose(
    ops: list[str],
    dtypes: list[str],
    arch: int,
    processors: int,
    shared: int,
    seconds: Seconds,
    say: Callable = print,
    keep: Callable[[dict], object] = lambda table: None,
) -> dict:
    """The table with this architecture's entries as measured by `seconds`; fp16 is taken to be like bf16.

    `processors`, `shared`: the GPU's multiprocessors, and bytes of shared memory that a block can have. `keep` gets the
    table as it is after each dtype of each op.
    """
    table = {str(name): entry for name, entry in tiles.TABLE.items()}
    entry = json.loads(json.dumps(tiles.TABLE[tiles.known(arch)])) | {"processors": processors}
    for kind, dtype in itertools.product([OPS[op] for op in ops], [DTYPES[name] for name in dtypes]):
        name = str(dtype).removeprefix("torch.")
        if name not in entry[kind]:  # fp8 on Ampere
            continue
        best: dict[tuple[int, int], tuple[float, Tile]] = {}  # (m, n) → time of a multiply-add, and in what settings
        for tile in space(kind, dtype, shared):
            time = seconds(kind, dtype, tile)
            if time is not None and (time, tile) < best.get((tile.m, tile.n), (float("inf"), tile)):
                best[tile.m, tile.n] = time, tile
        if not best:
            say(f"{kind}, {dtype}: no tile can run here")
            continue
        found = sorted(best.values())
        rows = [[*tile, round(found[0][0] / time, 2)] for time, tile in found]
        for row in rows:
            say(f"{kind}, {dtype}: {row}")
        entry[kind][name] = rows[0][:5] if kind == "attention" else rows
        if dtype == torch.bfloat16:
            entry[kind]["float16"] = entry[kind][name]
        keep(table | {str(arch): entry})
    return table | {str(arch): entry}


def read(file: Path) -> dict:
    """A proposal. Raises UserError for another file."""
    try:
        proposal = json.loads(file.read_text(encoding="utf-8"))
        if any(set(entry) != {"processors", *OPS.values()} for entry in proposal.values()):
            raise ValueError("an entry lacks something")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no proposal of `sana tune`: {error}") from error
    except (AttributeError, TypeError) as error:
        raise UserError(f"{file} is no proposal of `sana tune`: it has another form") from error
    if not proposal:
        raise UserError(f"{file} proposes nothing")
    return proposal


def merge(proposals: list[dict]) -> dict:
    """One table of several proposals, whose changes must not be to the same entry. Raises UserError where they are."""
    table = {str(arch): json.loads(json.dumps(entry)) for arch, entry in tiles.TABLE.items()}
    changed: dict[tuple, object] = {}
    for proposal in proposals:
        for arch, entry in proposal.items():
            before = tiles.TABLE.get(int(arch)) or tiles.TABLE[tiles.known(int(arch))]
            target = table.setdefault(arch, json.loads(json.dumps(before)))
            if entry["processors"] != before["processors"]:  # of the GPU that was measured; the rest is the table's
                target["processors"] = entry["processors"]
            for kind, dtype, rows in ((k, d, rows) for k in OPS.values() for d, rows in entry[k].items()):
                if rows == before[kind].get(dtype):
                    continue
                if changed.setdefault((arch, kind, dtype), rows) != rows:
                    raise UserError(f"two proposals differ in {kind!r} of {dtype} on {arch}; leave one of them out")
                target[kind][dtype] = rows
    return table


def render(table: dict) -> str:
    """JSON as in sana_kernels/tiles.json: a line per dtype."""
    entries = []
    for arch, entry in sorted(table.items(), key=lambda item: int(item[0])):
        lines = [f'    "processors": {entry["processors"]}']
        for kind in ("gemm", "gemm with residual", "attention"):
            rows = ",\n".join(f'      "{dtype}": {json.dumps(rows)}' for dtype, rows in entry[kind].items())
            lines.append(f'    "{kind}": {{\n{rows}\n    }}')
        entries.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def wanted(op: str | None, dtypes: str) -> tuple[list[str], list[str]]:
    """The ops and dtypes that a command asks for. Raises UserError, or MissingError where they cannot be measured."""
    if op is not None and op not in OPS:
        raise UserError(f"op {op!r} has no tiles to tune; choose one of {', '.join(OPS)}")
    names = dtypes.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise UserError(f"dtype {unknown[0]!r} has no tiles to tune; choose from {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise MissingError("tiles are measured on an NVIDIA GPU, and torch sees none here; see `sana doctor`")
    return list(OPS) if op is None else [op], names


def measure(kind: str, dtype: torch.dtype, tile: Tile) -> float | None:
    """Seconds per multiply-add on this GPU, the median of 20 calls; None where the tile cannot run."""
    from triton.errors import TritonError

    chosen, call, macs = _attention(dtype, tile) if kind == "attention" else _product(dtype, tile, "residual" in kind)
    try:
        with chosen:
            times = next(gpu_times(itertools.repeat(call)))
    except (TritonError, RuntimeError) as error:  # no resources, or what Triton or LLVM cannot compile
        if isinstance(error, torch.AcceleratorError):
            raise
        return None
    return sorted(times)[10] / 1e3 / macs


def _operands(dtype: torch.dtype, rows: int, inner: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if dtype.itemsize > 1:
        return torch.randn(rows, inner, device="cuda").to(dtype), None
    from sana_kernels.gemm.reference import quantize

    return quantize(torch.randn(rows, inner, device="cuda"), dtype)


def _product(dtype: torch.dtype, tile: Tile, residual: bool) -> tuple[AbstractContextManager, Callable, int]:
    """A product of SANA-1.6B's inner size with four tiles for every multiprocessor: with what takes the tile, call, MACs."""
    module = importlib.import_module("sana_kernels.gemm.triton")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    rows, columns, inner = 4 * tile.m, processors * tile.n, 2240
    (x, x_scale), (weight, weight_scale) = _operands(dtype, rows, inner), _operands(dtype, columns, inner)
    frame = (None, None)
    if residual:
        frame = [torch.randn(*shape, columns, device="cuda").to(torch.bfloat16) for shape in ((1,), (1, rows))]
    args = (
        x[None], None if x_scale is None else x_scale[None], weight, weight_scale, None, not residual, *frame,
        torch.bfloat16,
    )  # fmt: skip

    chosen = mock.patch.object(module, "gemm_tile", lambda *shape: tile)
    return chosen, partial(module.gemm, *args), rows * columns * inner


def _attention(dtype: torch.dtype, tile: Tile) -> tuple[AbstractContextManager, Callable, int]:
    """SANA-1.6B at 1024 px, likewise."""
    module = importlib.import_module("sana_kernels.linear_attention.triton")
    (x, x_scale), (weight, weight_scale) = _operands(dtype, 2048, 2240), _operands(dtype, 3 * 2240, 2240)
    args = x.view(2, 1024, -1), None if x_scale is None else x_scale.view(2, 1024), weight, weight_scale, 32, 1e-15
    chosen = mock.patch.object(module, "attention_tile", lambda *shape: tile)
    return chosen, partial(module.linear_attention_from, *args), 2048 * 2240 * 3 * 2240
