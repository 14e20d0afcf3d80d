"""The Triton kernels compiled ahead of time for every target, where none may spill; and the notes that list them all."""

import ast
import os
import subprocess
import sys

import pytest

from sana_bench import resources_triton as resources
from sana_bench.resources import ROOT

# In a process of its own: this one interprets its kernels.
SCRIPT = """
from sana_bench import resources_triton as resources
from sana_kernels.tiles import Tile

cases = {case.name: case for case in resources.cases()}
wanted = [
    "modulate → int8", "gate_residual bf16", "quantize → int8", "gemm int8, project", "linear_attention bf16, qk-norm",
    "linear_attention fp32", "linear_attention_from bf16", "depthwise_glu → int8",
]
rows = []
for target in resources.TARGETS:
    for name in wanted:
        for launch in resources.launches(cases[name].call, target):
            usage = resources.compile_launch(launch, target)
            rows.append(resources.Row(name, launch.kernel.__name__, launch.tile, target, *usage))
print(*resources.problems(rows), sep="\\n")
notes = resources.NOTES.read_text()
for row in rows:
    if f"| {row.case} | `{row.kernel}` | {row.tile} |" not in notes:
        print(f"the notes lack {row.case} {row.kernel} {row.tile}; write them again: {resources.COMMAND}")
(large,) = resources.launches(cases["gemm int8, expand"].call, 80, Tile(128, 256, 128, 8, 3))
print("a control spills", resources.compile_launch(large, 80)[2], "bytes")
"""


@pytest.mark.slow
def test_no_kernel_spills_on_any_target():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    *found, control = result.stdout.strip().split("\n")
    assert not any(found), found
    assert int(control.split()[3]) > 0


def test_a_spill_and_tf32_are_problems():
    fine = resources.Row("gemm fp32, expand", "gemm_kernel", "64×64×16 w8", 90, 80, 16384, 0, False)
    assert resources.problems([fine]) == []
    spilled = resources.Row("gemm fp32, expand", "gemm_kernel", "64×64×16 w8", 90, 80, 16384, 8, True)
    assert resources.problems([spilled]) == [
        "gemm_kernel of gemm fp32, expand in 64×64×16 w8 on sm_90 keeps 8 bytes per thread in local memory",
        "gemm_kernel of gemm fp32, expand in 64×64×16 w8 on sm_90 computes in TF32",
    ]
    assert "80 + 8 B local, 16 K" in resources.table([spilled])


def test_the_notes_know_every_kernel_and_case():
    notes = resources.NOTES.read_text()
    kernels = [
        node.name
        for name in resources.MODULES
        for node in ast.walk(ast.parse((ROOT / "sana_kernels" / name / "triton.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]
    assert len(kernels) == 11
    missing = [name for name in kernels if f"`{name}`" not in notes]
    missing += [case.name for case in resources.cases() if f"| {case.name} |" not in notes]
    assert not missing, f"write the notes again: {resources.COMMAND}"
    assert "local" not in notes
