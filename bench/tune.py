"""`sana tune [op]`: measures the tiles of the Triton kernels on this GPU and proposes another sana_kernels/tiles.json.

For a matrix product the table wants speeds, not a winner per shape: each tile of a grid is timed on a product that keeps the
whole chip busy, and of each tile's settings (k, warps, stages) the fastest stays. For `linear_attention_from` the fastest
tile on SANA's shape stays. Nothing is applied: whoever has looked at the proposal copies it over the table, and has
`python -m sana_bench.resources_triton` check that no kernel spills in it.
"""

import importlib
import itertools
import json
from collections.abc import Callable
from unittest import mock

import torch

from sana_kernels import tiles
from sana_kernels.tiles import Tile
from sana_model.errors import MissingError, UserError

OPS = {"gemm": ("gemm", "gemm with residual"), "linear_attention_from": ("attention",)}
DTYPES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
Seconds = Callable[[str, torch.dtype, Tile], float | None]  # (kind of the table, operands, tile); None: it cannot run


def space(kind: str, dtype: torch.dtype) -> list[Tile]:
    """The tiles that are tried."""
    steps = [64, 128] if dtype.itemsize == 1 else [32, 64]
    columns = (64, 128) if kind == "attention" else (64, 128, 256)
    return [Tile(*one) for one in itertools.product((64, 128), columns, steps, (4, 8), (2, 3, 4))]


def propose(ops: list[str], arch: int, processors: int, seconds: Seconds, say: Callable = print) -> dict:
    """The table with this architecture's entries as measured by `seconds`; fp16 is taken to be like bf16."""
    table = {str(name): entry for name, entry in tiles.TABLE.items()}
    entry = json.loads(json.dumps(tiles.TABLE[tiles.known(arch)])) | {"processors": processors}
    for kind, dtype in itertools.product(itertools.chain.from_iterable(OPS[op] for op in ops), DTYPES):
        name = str(dtype).removeprefix("torch.")
        if name not in entry[kind]:  # fp8 on Ampere
            continue
        best: dict[tuple[int, int], tuple[float, Tile]] = {}  # (m, n) → time of a multiply-add, and in what settings
        for tile in space(kind, dtype):
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
    return table | {str(arch): entry}


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


def wanted(op: str | None) -> list[str]:
    """The ops that a command asks for. Raises UserError, or MissingError where they cannot be measured."""
    if op is not None and op not in OPS:
        raise UserError(f"op {op!r} has no tiles to tune; choose one of {', '.join(OPS)}")
    if not torch.cuda.is_available():
        raise MissingError("tiles are measured on an NVIDIA GPU, and torch sees none here; see `sana doctor`")
    return list(OPS) if op is None else [op]


def measure(kind: str, dtype: torch.dtype, tile: Tile) -> float | None:
    """Seconds per multiply-add on this GPU, the median of 20 calls; None where the tile cannot run."""
    from triton.runtime.errors import OutOfResources

    call, macs = _attention(dtype, tile) if kind == "attention" else _product(dtype, tile, "residual" in kind)
    try:
        for _ in range(3):
            call()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(20)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    except (OutOfResources, RuntimeError) as error:  # Triton's compiler gives up with a RuntimeError
        if isinstance(error, torch.AcceleratorError):
            raise
        return None
    return sorted(start.elapsed_time(end) for start, end in events)[10] / 1e3 / macs


def _operands(dtype: torch.dtype, rows: int, inner: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if dtype.itemsize > 1:
        return torch.randn(rows, inner, device="cuda").to(dtype), None
    from sana_kernels.gemm.reference import quantize

    return quantize(torch.randn(rows, inner, device="cuda"), dtype)


def _product(dtype: torch.dtype, tile: Tile, residual: bool) -> tuple[Callable, int]:
    """A product of SANA-1.6B's inner size with four tiles for every multiprocessor."""
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

    def call() -> None:
        with mock.patch.object(module, "gemm_tile", lambda *shape: tile):
            module.gemm(*args)

    return call, rows * columns * inner


def _attention(dtype: torch.dtype, tile: Tile) -> tuple[Callable, int]:
    """SANA-1.6B at 1024 px."""
    module = importlib.import_module("sana_kernels.linear_attention.triton")
    (x, x_scale), (weight, weight_scale) = _operands(dtype, 2048, 2240), _operands(dtype, 3 * 2240, 2240)
    args = x.view(2, 1024, -1), None if x_scale is None else x_scale.view(2, 1024), weight, weight_scale, 32, 1e-15

    def call() -> None:
        with mock.patch.object(module, "attention_tile", lambda *shape: tile):
            module.linear_attention_from(*args)

    return call, 2048 * 2240 * 3 * 2240
