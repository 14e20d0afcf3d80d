"""Result files to Markdown tables: `python -m sana_bench.report README.md [--check]`.

In the Markdown file, a table stands between two markers and is written anew each time:

    <!-- table:image -->                         pictures, of the newest file in bench/results that has some
    <!-- table:step -->                          one step of the DiT, op by op
    <!-- table:kernels bench/results/x.json -->  ops, of that file
    <!-- table:quality -->                       what precisions cost in pictures, likewise
    <!-- table:decode bench/results/x.json -->   the decoder alone, of that file
    <!-- table:ops -->                           op × backend, from the registry
    <!-- /table -->                              the end of either

`--check` changes nothing and exits with status 1 where a table is not what the files say.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sana_bench import schema
from sana_kernels import diagnostics
from sana_model.errors import UserError
from sana_model.files import write_text

PARITY = {"dit_sqnr_db": "DiT", "latents_sqnr_db": "latents", "image_sqnr_db": "image", "text_sqnr_db": "text"}
"""What is compared with fp32 → its name in a table's heading; a row has one number of each, of text up to two."""

MARKED = re.compile(r"(<!-- table:(\w+) *(\S*) -->\n).*?(<!-- /table -->)", re.DOTALL)


def image_table(document: dict) -> str:
    """A row per run, and below it the conditions; ms of one picture. A run that failed has no time and no speed-up."""
    out = []
    for group in _groups(document, "image"):
        w = group[0]["workload"]
        baselines = list(dict.fromkeys(name for row in group for name in row.get("speedup", ())))
        columns = [
            "text ms",
            "step ms",
            "decode ms",
            "**ms/image** p50 [p10–p90]",
            "first s",
            "+ GiB",
            "% peak: DiT, decoder",
        ]
        parts = {part["metric"] for row in group for part in row.get("check", {}).get("parts", ())}
        columns.append("dB: " + ", ".join(name for metric, name in PARITY.items() if metric in parts))
        columns += [f"× {name}" for name in baselines]
        title = f"{group[0]['name']}, {w['steps']} steps, guidance {w['guidance']:g}, batch {w['batch']}"
        if w.get("instruction_tokens"):
            title += f", {w['instruction_tokens']} + {w['text_tokens']} text tokens"
        rows = [_image_row(row, document, baselines) for row in group]
        out += [_markdown([title, *columns], rows), "", _conditions(document, group), ""]
    return "\n".join(out).strip()


def _image_row(row: dict, document: dict, baselines: list[str]) -> list[str]:
    name = _run_name(row)
    if row["status"] not in schema.MEASURED:
        return [name, "", "", "", row["status"], *[""] * (4 + len(baselines))]
    first = next(
        (
            f
            for f in document["results"]
            if f["kind"] == "first_image" and _run_name(f) == name and f["workload"] == row["workload"]
        ),
        None,
    )
    stages, percent = row["stages_ms"], row["work"]["pct_of_peak"]
    batch = row["workload"]["batch"]
    in_order = sorted(row["check"]["parts"], key=lambda part: list(PARITY).index(part["metric"]))
    decibels = ", ".join(f"{part['value']:.0f}" for part in in_order)
    cells = [f"{stages[key] / batch:.0f}" for key in ("text_encode", "per_step", "decode")]
    cells.append(
        _range(row["timing"]["ms"], 1 / batch) if row["status"] == "ok" else f"**FAIL** ({_why(row['check'])})"
    )
    cells.append(f"{first['timing']['ms']['median'] / 1e3:.1f}" if first else "")
    cells += [_added(row), ", ".join(map(_percent, (percent["denoise"], percent["decode"]))), decibels]
    speedups = row.get("speedup", {})
    return [name, *cells, *(f"{speedups[b]:.2f}" if b in speedups else "" for b in baselines)]


def _added(row: dict) -> str:
    """GiB that a run took beside the weights that it shares with the others."""
    added = row["memory_mib"].get("added")
    return "" if added is None else f"{added / 1024:.1f}"


def step_table(document: dict) -> str:
    """A row per run: the step, its ops, and how far it is from its matrix products alone."""
    out = []
    for group in _groups(document, "step"):
        baselines = list(dict.fromkeys(name for row in group for name in row.get("speedup", ())))
        ops = list(dict.fromkeys(op for row in group for op, ms in row.get("ops_ms", {}).items() if ms >= 0.05))
        w = group[0]["workload"]
        title = f"{group[0]['name']}, batch {w['rows']}, {w['text_tokens']} text tokens"
        header = [
            title,
            "**ms/step** p50 [p10–p90]",
            "dB",
            "% of peak",
            *ops,
            "rest",
            "products alone",
            "step / products",
        ]
        rows = [_step_row(row, ops, baselines) for row in group]
        out += [_markdown([*header, *(f"× {b}" for b in baselines)], rows), ""]
        out += [_conditions(document, group), ""]
    return "\n".join(out).strip()


def _step_row(row: dict, ops: list[str], baselines: list[str]) -> list[str]:
    name = _run_name(row)
    if row["status"] != "ok":
        why = f"**FAIL** ({_why(row['check'])})" if row["status"] == "FAIL" else row["status"]
        return [name, why, *[""] * (5 + len(ops) + len(baselines))]
    ms, spent = row["timing"]["ms"], row.get("ops_ms")
    cells = [name, _range(ms, 1), f"{row['check']['value']:.0f}", _percent(row["work"]["pct_of_peak"])]
    if spent is None:
        cells += [""] * (len(ops) + 3)
    else:
        cells += [f"{spent.get(op, 0):.1f}" for op in ops]
        cells.append(f"{ms['median'] - sum(spent.values()):.1f}")
        alone = row.get("gemms_alone_ms", {}).get("median")
        cells += ["", ""] if alone is None else [f"{alone:.1f}", f"{ms['median'] / alone:.2f}"]
    return [*cells, *(f"{row['speedup'][b]:.2f}" if b in row["speedup"] else "" for b in baselines)]


def decode_table(document: dict) -> str:
    """A row per run and size of the decoder alone."""
    rows = [row for row in document["results"] if row["kind"] == "decode"]
    baselines = list(dict.fromkeys(name for row in rows for name in row.get("speedup", ())))
    header = ["decoder", "run", "**ms** p50 [p10–p90]", "+ GiB", "% of peak", "SQNR, PSNR dB"]
    body = [_decode_row(row, baselines) for row in rows]
    return f"{_markdown([*header, *(f'× {name}' for name in baselines)], body)}\n\n{_conditions(document, rows)}"


def _decode_row(row: dict, baselines: list[str]) -> list[str]:
    title = [row["name"], _run_name(row)]
    if row["status"] not in schema.MEASURED:
        return [*title, row["status"], *[""] * (3 + len(baselines))]
    check = row["check"]
    time = _range(row["timing"]["ms"], 1) if row["status"] == "ok" else f"**FAIL** ({_why(check)})"
    decibels = f"{check['value']:.1f}" + (f", {check['psnr_db']:.1f}" if "psnr_db" in check else "")
    cells = [time, _added(row), _percent(row["work"]["pct_of_peak"]["decode"]), decibels]
    speedups = row.get("speedup", {})
    return [*title, *cells, *(f"{speedups[b]:.2f}" if b in speedups else "" for b in baselines)]


def kernel_table(document: dict) -> str:
    """A row per op, shape and dtype; a pair of columns per backend."""
    rows = [row for row in document["results"] if row["kind"] == "kernel"]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["name"], row["precision"]), {})[row["backend"]] = row
    header = ["op, shape", "dtype", *(f"{backend} µs p50 [p10–p90]" for backend in backends)]
    header += ["best: GB/s", "% of copy", "% of peak", "error / PyTorch's", "× reference"]
    body = [[name, dtype, *_kernel_cells(by_backend, backends)] for (name, dtype), by_backend in cells.items()]
    return f"{_markdown(header, body)}\n\n{_conditions(document, rows)}"


def _kernel_cells(by_backend: dict[str, dict], backends: list[str]) -> list[str]:
    def time_of(row: dict | None) -> str:
        if row is None:
            return ""
        if row["status"] == "FAIL":
            return f"**FAIL** ({_why(row['check'])})"
        return _range(row["timing"]["ms"], 1e3) if row["status"] == "ok" else row["status"]

    times = [time_of(by_backend.get(backend)) for backend in backends]
    good = [row for row in by_backend.values() if row["status"] == "ok"]
    if not good:
        return [*times, "", "", "", "", ""]
    best = min(good, key=lambda row: row["timing"]["ms"]["median"])
    work, speedup = best["work"], best.get("speedup", {}).get("reference")
    percent = work["pct_of_peak"]
    return [
        *times, f"{work['gb_s']:.1f}", _percent(percent["copy"]), _percent(percent["arithmetic"]),
        f"{best['check']['value']:.2f}", f"{speedup:.2f}" if speedup else "",
    ]  # fmt: skip


QUALITY_COLUMNS = {
    "step_sqnr_db": ("velocity SQNR dB", 1), "psnr_db": ("PSNR dB", 1), "ssim": ("SSIM", 3),
    "feature_distance": ("feature distance", 4), "lpips": ("LPIPS", 3), "clip_score": ("CLIP score", 1),
    "concept_accuracy": ("concept %", 1), "heldout_accuracy": ("held-out pair %", 1), "style_accuracy": ("style %", 1),
    "background_accuracy": ("background %", 1), "fid_inception": ("FID (Inception)", 1),
    "kid_inception": ("KID (Inception)", 4), "fid_efficientnet_lite1": ("FID on EfficientNet-Lite1", 1),
    "kid_efficientnet_lite1": ("KID on EfficientNet-Lite1", 4),
}  # fmt: skip
"""Figure → its heading and how many digits are printed."""


def quality_table(document: dict) -> str:
    """A row per run; ranges are 95 % intervals. Figures that no run has are left out."""
    out = []
    for group in _groups(document, "quality"):
        w = group[0]["workload"]
        keys = [key for key in QUALITY_COLUMNS if any(key in row.get("metrics", ()) for row in group)]
        title = f"{group[0]['name']}, {w['steps']} steps, guidance {w['guidance']:g}, {w['images']} pictures"
        header = [title, *(QUALITY_COLUMNS[key][0] for key in keys)]
        out += [_markdown(header, [_quality_row(row, keys) for row in group]), ""]
        ceilings = next((row["metrics"]["ceilings"] for row in group if "ceilings" in row.get("metrics", ())), None)
        if ceilings:
            best = ", ".join(f"{factor} {100 * value:.1f} %" for factor, value in ceilings.items())
            out += [f"The scorer's own accuracy on real pictures, the ceiling: {best}.", ""]
        out += [_conditions(document, group), ""]
    return "\n".join(out).strip()


def _quality_row(row: dict, keys: list[str]) -> list[str]:
    name = _run_name(row) + (" (noise floor)" if row.get("noise_floor") else "")
    if row["status"] not in schema.MEASURED:
        return [name, row["status"], *[""] * (len(keys) - 1)]
    if row["status"] == "FAIL":
        name += f" **FAIL** ({_why(row['check'])})"
    return [name, *(_figure(row, key) for key in keys)]


def _figure(row: dict, key: str) -> str:
    if key not in row["metrics"]:
        return ""
    scale, digits = 100 if key.endswith("_accuracy") else 1, QUALITY_COLUMNS[key][1]
    value, interval = row["metrics"][key], row["intervals"].get(key)
    text = f"{scale * value:.{digits}f}"
    return text if interval is None else f"{text} [{'–'.join(f'{scale * end:.{digits}f}' for end in interval)}]"


def ops_table() -> str:
    """Which backend has a kernel for which op; what a machine can run of it, `sana doctor` tells."""
    matrix = diagnostics.describe()["matrix"]
    backends = list(next(iter(matrix.values())))
    rows = [[f"`{op}`", *("–" if cells[b] == "none" else "✓" for b in backends)] for op, cells in matrix.items()]
    return _markdown(["op", *(f"`{backend}`" for backend in backends)], rows)


def rewrite(text: str, find: Callable[[str, str], dict]) -> str:
    """`text` with every marked table as it ought to be. `find(table, file)` gives the document for a table."""

    def table(match: re.Match) -> str:
        start, name, file, end = match.groups()
        if name == "ops":
            return f"{start}{ops_table()}\n{end}"
        if name not in _TABLES:
            raise UserError(f"there is no table {name!r}; choose {', '.join(_TABLES)} or ops")
        document = find(name, file)
        return f"{start}{_TABLES[name](document)}\n{end}" if document else match.group()

    return MARKED.sub(table, text)


_TABLES = {
    "image": image_table, "step": step_table, "kernels": kernel_table, "quality": quality_table, "decode": decode_table,
}  # fmt: skip
_ROWS = {"image": "image", "step": "step", "kernels": "kernel", "quality": "quality", "decode": "decode"}


def newest(results: Path, table: str) -> dict | None:
    """The latest complete file under bench/results that has rows for a table; None where there is none."""
    documents = [schema.load(path) for path in results.glob("*.json")]
    having = [
        d for d in documents if any(row["kind"] == _ROWS[table] for row in d["results"]) and d["run"].get("complete")
    ]
    return max(having, key=lambda d: d["run"]["id"], default=None)


def _groups(document: dict, kind: str) -> Iterator[list[dict]]:
    """Rows of a kind that belong in one table: the same model and workload."""
    groups: dict[tuple, list[dict]] = {}
    for row in document["results"]:
        if row["kind"] == kind:
            groups.setdefault((row["name"], *row["workload"].values()), []).append(row)
    yield from groups.values()


def _conditions(document: dict, rows: list[dict]) -> str:
    """What the rows of a table were measured with, and what speaks against them."""
    machine, run = document["machine"], document["run"]
    where = (
        machine["gpus"][0]["name"]
        if machine["gpus"] and run.get("device") != "cpu"
        else f"{machine['cpu']} ({machine['isa']}), {machine['threads_used']} threads"
    )
    parts = [where, f"torch {document['software']['versions']['torch']}", run["id"] + "+dirty" * bool(run.get("dirty"))]
    if rows and rows[0].get("weights"):
        parts.insert(0, rows[0]["weights"])
    load = machine.get("load", {}).get("before")
    if load:
        parts.append(f"load {load[0]:.1f} at the start")
    unsteady = sum(row.get("timing", {}).get("unsteady", 0) for row in rows)
    if unsteady:
        parts.append(f"{unsteady} unsteady repetition{'s' * (unsteady > 1)}")
    for row in rows:
        for check in row.get("check", {}).get("parts", ()):
            if check["against"].startswith("fp32, "):  # and something else (`check.dit_check`)
                parts.append(f"{_run_name(row)} against {check['against']}")
    again = f"Again: `{run['command']}`"
    return ". ".join((", ".join(parts), again)) + "."


def _run_name(row: dict) -> str:
    return f"{row['backend']}:{row['precision']}"


def _range(ms: dict[str, float], scale: float) -> str:
    digits = 0 if ms["median"] * scale >= 100 else 1
    median, p10, p90 = (f"{ms[key] * scale:.{digits}f}" for key in ("median", "p10", "p90"))
    return f"{median} [{p10}–{p90}]"


def _percent(share: float | None) -> str:
    """Of a peak; "–" where that could not be measured."""
    return "–" if share is None else f"{share:.0f}"


def _why(check: dict) -> str:
    if check["value"] < check["limit"] and check["metric"] != "error_vs_torch":
        return f"{check['metric'].split('_')[0]} {check['value']:.1f} dB, limit {check['limit']:g}"
    if check["metric"] == "error_vs_torch" and check["value"] > check["limit"]:
        return f"{check['value']:.1f} × PyTorch's error, limit {check['limit']:g}"
    return "; ".join(check["failures"])


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sana_bench.report", description="Write the tables of a Markdown file."
    )
    parser.add_argument("markdown", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a table is out of date")
    args = parser.parse_args(argv)
    try:
        return update(args.markdown, args.check)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_status


def update(markdown: Path, check: bool = False) -> int:
    """Write the tables of one file; 1 if `check` and some are out of date."""
    folder = markdown.resolve().parent

    def find(table: str, file: str) -> dict | None:
        return schema.load(folder / file) if file else newest(folder / "bench" / "results", table)

    try:
        text = markdown.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{markdown} cannot be read: {error.strerror}") from error
    new = rewrite(text, find)
    if check and new != text:
        print(
            f"{markdown} has tables that are out of date; `python -m sana_bench.report {markdown}` writes them",
            file=sys.stderr,
        )
        return 1
    if not check:
        write_text(markdown, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
