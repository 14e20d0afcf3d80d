"""`sana bench compare A.json B.json`: what became faster, what slower, and what can't be told apart."""

from sana_bench.schema import MEASURED

FEWEST = 3  # repetitions, below which a range p10–p90 says nothing of how far a time varies


def key(row: dict) -> tuple:
    """What makes two rows measurements of the same thing."""
    workload = tuple(sorted((row.get("workload") or {}).items()))
    return row["kind"], row["name"], f"{row['backend']}:{row['precision']}", workload


def compare(old: dict, new: dict) -> list[dict]:
    """One entry per row of either document: key, verdict, the two medians in ms, and their ratio old / new.

    Rows about quality and perplexity have no times, and no entry.

    Verdicts: faster, slower; same, where the ranges p10–p90 overlap; "too few", where either row has fewer than 3
    repetitions, as first pictures have; FAIL, where the new row failed its check; and the status, or "only in A", "only in
    B", for rows that can't be compared.
    """
    before, after = (
        {key(row): row for row in document["results"] if row["kind"] not in ("quality", "text")}
        for document in (old, new)
    )
    return [_entry(k, before.get(k), after.get(k)) for k in dict.fromkeys((*before, *after))]


def _entry(k: tuple, a: dict | None, b: dict | None) -> dict:
    entry = {"kind": k[0], "name": k[1], "run": k[2], "verdict": "", "old_ms": None, "new_ms": None, "ratio": None}
    if a is None or b is None:
        return entry | {"verdict": "only in B" if a is None else "only in A"}
    for row, which in ((a, "old_ms"), (b, "new_ms")):
        if row["status"] in MEASURED:
            entry[which] = row["timing"]["ms"]["median"]
    for row in (b, a):
        if row["status"] != "ok":
            return entry | {"verdict": row["status"] if row is b else f"was {row['status']}"}
    x, y = a["timing"]["ms"], b["timing"]["ms"]
    return entry | {"verdict": _verdict(a["timing"], b["timing"]), "ratio": x["median"] / y["median"]}


def _verdict(old: dict, new: dict) -> str:
    if min(old.get("n", 0), new.get("n", 0)) < FEWEST:
        return "too few"
    x, y = old["ms"], new["ms"]
    if x["p10"] <= y["p90"] and y["p10"] <= x["p90"]:
        return "same"
    return "faster" if y["median"] < x["median"] else "slower"


def render(entries: list[dict], old: dict, new: dict) -> str:
    """The entries as text, under what speaks against comparing the two files at all."""
    lines = [f"note: {note}" for note in _differences(old, new)]
    lines.append(f"{'':<52}{'A ms':>12}{'B ms':>12}{'A / B':>8}  verdict")
    for entry in entries:
        label = f"{entry['kind']} {entry['name']} {entry['run']}"
        ms = "".join(
            f"{'-' if entry[which] is None else format(entry[which], '.3f'):>12}" for which in ("old_ms", "new_ms")
        )
        ratio = "" if entry["ratio"] is None else f"{entry['ratio']:.2f}×"
        lines.append(f"{label:<52}{ms}{ratio:>8}  {entry['verdict']}")
    return "\n".join(lines)


def _differences(old: dict, new: dict) -> list[str]:
    notes = []
    for what in ("cpu", "isa", "threads_used", "gpus"):
        a, b = old["machine"].get(what), new["machine"].get(what)
        if a != b:
            notes.append(f"{what}: A {a}, B {b}")
    peaks = old["machine"].get("measured_peak") or {}, new["machine"].get("measured_peak") or {}
    for kind in peaks[0].keys() & peaks[1].keys():
        a, b = peaks[0][kind], peaks[1][kind]
        if abs(a - b) > 0.1 * max(a, b):
            notes.append(f"the peak {kind} was {a:.3g} in A and is {b:.3g} in B: the machine's speed changed")
    return sorted(notes)
