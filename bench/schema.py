"""The shape of a result file: what scripts may rely on. `validate` says where a file departs from it.

A file holds one run: `schema`, `run` (id, command, git_sha, seed, device), `machine` (load, steal and the peaks measured in
that run), `software`, and `results`, a list of rows. Every row has

    kind        image | first_image | step | decode | kernel | quality | text
    name        what was measured, such as sana-0.6b_1024x1024 or linear_attention/0.6b_1024
    backend     with precision, the name of the run, such as cpu:bf16
    precision   of the DiT; ending in +, of text encoder and decoder, too; ending in -eager, without a CUDA graph
    status      ok | FAIL (see check) | out of memory | not available | not measured: see reason | error: see reason

and, where it was measured (ok, FAIL),

    timing      method, warmup, n, rejected, unsteady, ms {median, p10, p90, min, mean}, raw_ms (kernels: 200 at most)
    check       against, value, limit, passed: parity with fp32 (kernels: fp64); failures: what else speaks against it
    work        gmac, gib and the percentages of the measured peaks
    workload    of pictures: batch, height, width, steps, guidance, text_tokens, and the instruction_tokens before those of
                the prompt
    stages_ms   of pictures: text_encode, denoise (with text keys and values, caption projection and tables), per_step
                (denoise / steps), decode, other, in the repetition of the median total (of an even number, the mean of
                the two in the middle), so that they sum to the median
    ops_ms      of steps of ours: median of every op; gemms_alone_ms: of the step's matrix products by themselves
    speedup     {baseline row: ratio of the medians}; only where check.passed
    plan        which kernel computes which op, in which precision
    metrics     of quality rows, instead of timing and work (docs/quality.md): step_sqnr_db, psnr_db, ssim,
                feature_distance (against fp32; the fp32 row has none of these), concept_accuracy, heldout_accuracy,
                style_accuracy, background_accuracy (fractions), ceiling (that of concept_accuracy), ceilings, trained_on
                (gpu | cpu), fid_… and kid_… (of a network's features); intervals: 95 %, by figure; of text rows: perplexity,
                states_sqnr_db (against fp32), bits (of a weight, as stored), tokens
"""

import json
import math
from pathlib import Path

from sana_model.errors import UserError

VERSION = 1
KINDS = ("image", "first_image", "step", "decode", "kernel", "quality", "text")
MEASURED = ("ok", "FAIL")
STATUSES = (*MEASURED, "out of memory", "not available", "not measured", "error")
STAGES = ("text_encode", "denoise", "decode", "other")  # these sum to the total
WORKLOAD = ("batch", "height", "width", "steps", "guidance", "text_tokens")
STAGE_SUM_TOLERANCE = 0.02


def load(path: str | Path) -> dict:
    """Read a result file. Raises UserError that names the file and the place where it departs from the schema."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    problems = validate(document)
    if problems:
        raise UserError(f"{path} is not a result file of sana bench: " + "; ".join(problems[:3]))
    return document


def validate(document: object) -> list[str]:
    """What is wrong with a result document, one sentence each; nothing for a good one."""
    if not isinstance(document, dict):
        return ["it is not a JSON object"]
    if document.get("schema") != VERSION:
        return [f"schema is {document.get('schema')!r}, and this version reads {VERSION}"]
    problems = [
        f"{key} is missing or not {'a list' if kind is list else 'an object'}"
        for key, kind in (("run", dict), ("machine", dict), ("software", dict), ("results", list))
        if not isinstance(document.get(key), kind)
    ]
    for i, row in enumerate(document.get("results") or ()):
        where = f"results[{i}]"
        problems += [f"{where}: {problem}" for problem in (_row(row) if isinstance(row, dict) else ["not an object"])]
    return problems


def _row(row: dict) -> list[str]:
    problems = [f"{key} is missing" for key in ("name", "backend", "precision") if not isinstance(row.get(key), str)]
    if row.get("kind") not in KINDS:
        problems.append(f"kind {row.get('kind')!r} is not one of {', '.join(KINDS)}")
    if row.get("status") not in STATUSES:
        problems.append(f"status {row.get('status')!r} is not one of {', '.join(STATUSES)}")
    if row.get("kind") in ("image", "first_image", "decode"):
        workload = row.get("workload") or {}
        problems += [f"workload.{key} is missing" for key in WORKLOAD if not _number(workload.get(key))]
    if row.get("status") in MEASURED and row.get("kind") not in ("quality", "text"):
        problems += _measurement(row)
    elif row.get("status") in MEASURED:
        problems += _quality(row)
    elif "speedup" in row:
        problems.append("a row without a measurement has a speedup")
    return problems


def _measurement(row: dict) -> list[str]:
    ms = (row.get("timing") or {}).get("ms") or {}
    check = row.get("check") or {}
    problems = [f"timing.ms.{key} is not a number ≥ 0" for key in ("median", "p10", "p90") if not _number(ms.get(key))]
    problems += [f"check.{key} is missing" for key in ("against", "value", "limit", "passed") if key not in check]
    if problems:
        return problems
    if not ms["p10"] <= ms["median"] <= ms["p90"]:
        problems.append("timing.ms is not ordered p10 ≤ median ≤ p90")
    if check["passed"] != (row["status"] == "ok"):
        problems.append(f"status is {row['status']!r}, but check.passed is {check['passed']}")
    if row.get("speedup") and not check["passed"]:
        problems.append("a row that failed its check has a speedup")
    if row["kind"] in ("image", "first_image"):
        stages = row.get("stages_ms") or {}
        missing = [key for key in (*STAGES, "per_step") if not _number(stages.get(key))]
        problems += [f"stages_ms.{key} is not a number ≥ 0" for key in missing]
        if not missing and check["passed"] and not stages_sum_up(stages, ms["median"]):
            problems.append("the stages do not sum to the median within 2 %")
    return problems


def _quality(row: dict) -> list[str]:
    metrics = row.get("metrics")
    if not isinstance(metrics, dict):
        return ["metrics is missing"]
    numbers = {key: value for key, value in metrics.items() if key not in ("ceilings", "trained_on")}
    problems = [f"metrics.{key} is not a number" for key, value in numbers.items() if not _finite(value)]
    fractions = [key for key in numbers if key.endswith("_accuracy") or key == "ceiling"]
    problems += [
        f"metrics.{key} is not within 0 and 1"
        for key in fractions
        if _finite(numbers[key]) and not 0 <= numbers[key] <= 1
    ]
    if metrics.get("trained_on", "cpu") not in ("gpu", "cpu"):
        problems.append(f"metrics.trained_on is {metrics['trained_on']!r}, not gpu or cpu")
    return problems


def stages_sum_up(stages: dict[str, float], total: float) -> bool:
    return abs(sum(stages[key] for key in STAGES) - total) <= STAGE_SUM_TOLERANCE * total


def _number(value: object) -> bool:
    return _finite(value) and value >= 0


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
