"""The CUDA sources through nvcc, for every target: registers, spills, PTX. tests/test_cuda_*.py run them on the emulator."""

import re

import pytest

from sana_bench import resources
from tests import emulated


@pytest.fixture(scope="module")
def nvcc():
    found = resources.find_nvcc()
    if found is None:
        pytest.skip("needs nvcc: install the CUDA toolkit or set NVCC")
    return found


@pytest.mark.slow
def test_no_kernel_spills_on_any_target(nvcc):
    usages = resources.measure(nvcc, resources.sources())
    assert {usage.target for usage in usages} == set(resources.TARGETS)
    assert [usage for usage in usages if usage.local] == []
    notes = resources.NOTES.read_text()
    missing = {usage.kernel for usage in usages if f"`{usage.kernel}`" not in notes}
    assert not missing, f"{resources.NOTES.name} lacks {sorted(missing)}; write it again: {resources.COMMAND}"


def test_expectations_stand_in_the_notes():
    assert resources.expectations() in resources.NOTES.read_text(), f"write them again: {resources.COMMAND}"


@pytest.mark.slow
def test_every_ptx_instruction_assembles_for_every_target(nvcc):
    usages = resources.measure(nvcc, [emulated.ROOT / "tests" / "emulator_kernels.cu"])
    kernels = {usage.kernel for usage in usages if usage.target == "80"}
    assert all({u.kernel for u in usages if u.target == target} == kernels for target in resources.TARGETS)
    assert sum("mma_kernel" in kernel for kernel in kernels) == 4


SPILLING = """
__global__ void __launch_bounds__(1024) spilling(const float* in, float* out) {
  float x[96];
  for (int i = 0; i < 96; ++i) x[i] = in[i * 1024 + threadIdx.x];
  for (int round = 0; round < 9; ++round) {
    for (int i = 0; i < 96; ++i) x[i] = x[i] * x[(i + 1) % 96] + x[(i + 7) % 96];
  }
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = x[i];
}
__global__ void indexed(const int* at, int* out) {
  int x[32];
  for (int i = 0; i < 32; ++i) x[i] = i;
  for (int i = 0; i < 99; ++i) x[at[i] & 31] = i;
  out[threadIdx.x] = x[at[threadIdx.x] & 31];
}
__global__ void clean(float* out) { out[threadIdx.x] = 1; }
"""


def test_the_table_knows_spills_and_local_arrays(nvcc, tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    usages = resources.parse(resources.compile_log(nvcc, source, "80"), source.name, "80")
    names = resources.readable(usage.kernel for usage in usages)
    local = {names[usage.kernel]: usage.local for usage in usages}
    assert local["spilling"] > 0
    assert local["indexed"] == 128
    assert local["clean"] == 0
    assert "B local" in resources.table(usages)


def test_sources_that_do_not_compile_are_named(nvcc, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { missing(); }")
    with pytest.raises(RuntimeError, match=r"broken.cu does not compile for sm_80(.|\n)*missing"):
        resources.compile_log(nvcc, source, "80")


def test_targets_are_those_of_the_build():
    archs = re.search(r"ALL_ARCHS = \[(.*)\]", (emulated.ROOT / "setup.py").read_text())[1]
    assert set(re.findall(r'"(\w+)"', archs)) == {*resources.TARGETS, "compute_80"}
