"""The package as a stranger gets it: a wheel built without CUDA, installed elsewhere, free of torch's symbols.

The builds run in a copy of the checkout, so that they share nothing with the installation under test but the sources.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from variants import isa_cap

import sana_kernels
from sana_kernels import backend
from sana_kernels.diagnostics import describe, render

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NVCC = shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")
LIBRARIES = re.compile(r"(libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+")


def run(*command, check=True, cwd=None, **environment) -> str:
    """stdout and stderr of a command, which has to succeed unless `check` is off (then it has to fail)."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == check, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the repository holds, without anything built."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


def build_wheel(checkout: Path, **environment) -> Path:
    out = checkout / "dist"
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, checkout, **environment)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    return build_wheel(checkout, SANA_CUDA="0")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with nothing but the wheel and a view of this one's packages."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    # A path in a .pth file is searched last, and the .pth files there are not read: an editable install stays hidden.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    return home / "bin"


USE = """
import pathlib, sys, torch
import sana_kernels, sana_model, sana_export, sana_bench
assert pathlib.Path(sana_kernels.__file__).is_relative_to(sys.prefix), sana_kernels.__file__
q, k, v = torch.randn(3, 2, 37, 3, 32).unbind()
fast = sana_kernels.linear_attention(q, k, v, backend="cpu")
slow = sana_kernels.linear_attention(q, k, v, backend="reference")
torch.testing.assert_close(fast, slow)
"""


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(installed, tmp_path):
    run(installed / "python", "-c", USE, cwd=tmp_path)
    shown = run(installed / "python", "-m", "sana_kernels", cwd=tmp_path)
    assert "cuda is off: " in shown and "SANA_CUDA=0" in shown
    assert "linear_attention" in run(installed / "sana", "doctor", cwd=tmp_path)


@pytest.mark.slow
def test_wheel_works_without_triton_and_driver(installed, tmp_path):
    hidden = "import sys; sys.modules['triton'] = None\n"
    run(installed / "python", "-c", hidden + USE, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == [f"sana_kernels/_cpu{SUFFIX}"]
    assert not [name for name in names if name.startswith(("sana_bench/results", "sana_bench/notes", "tests", "csrc"))]
    for package in ("sana_kernels", "sana_model", "sana_export", "sana_bench"):
        assert f"{package}/__init__.py" in names
    model = {
        name.removeprefix("sana_model/checkpoints/sana-tiny/") for name in names if "checkpoints/sana-tiny" in name
    }
    assert {"model_index.json", "README.md", "LICENSE", "NOTICE", "vae/diffusion_pytorch_model.safetensors"} <= model


@pytest.mark.slow
def test_stale_modules_are_not_packed(checkout, wheel):
    """Control: the planted files lie where setuptools would take them from, as a build with CUDA would leave them."""
    packed = next((checkout / "build").glob("lib*")) / "sana_kernels"
    assert (packed / f"_cpu{SUFFIX}").exists()
    (packed / f"_cuda{SUFFIX}").write_bytes(b"stale")
    (packed / "stale.py").write_text("")
    names = zipfile.ZipFile(build_wheel(checkout, SANA_CUDA="0")).namelist()
    assert not [name for name in names if "stale" in name or "/_cuda" in name]


@pytest.mark.slow
def test_header_edit_recompiles_its_users(checkout, wheel):
    plan = [
        sys.executable,
        "-m",
        "ninja",
        "-n",
        "-f",
        next((checkout / "build").glob("*/sana_kernels._cpu/build.ninja")),
    ]
    assert "no work to do" in run(*plan, cwd=checkout)
    header = checkout / "csrc" / "peak" / "peak.h"
    header.write_text(header.read_text() + "\n")
    planned = run(*plan, "-v", cwd=checkout)
    assert "peak_portable.cpp" in planned and "linear_attention" not in planned.replace(planned.splitlines()[-1], "")


@pytest.mark.slow
def test_failing_nvcc_costs_only_cuda(checkout, wheel, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'error: no such luck' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    run(*build, cwd=checkout, SANA_CUDA="auto", NVCC=str(nvcc))
    ask = "import _cpu, json; print(json.dumps(_cpu.build_info()))"
    info = json.loads(run(sys.executable, "-c", ask, cwd=tmp_path / "lib" / "sana_kernels"))
    assert "no such luck" in info["cuda_off"]
    assert "SANA_CUDA=1, but nvcc failed" in run(*build, cwd=checkout, check=False, SANA_CUDA="1", NVCC=str(nvcc))
    missing = run(*build, cwd=checkout, check=False, SANA_CUDA="1", NVCC=str(tmp_path / "none"))
    assert "SANA_CUDA=1, but no nvcc was found" in missing


@pytest.fixture(scope="module")
def cuda_module(checkout, tmp_path_factory) -> Path:
    """The folder with a _cuda of its own, for Hopper."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    lib = tmp_path_factory.mktemp("cuda")
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", lib]
    run(*build, cwd=checkout, SANA_CUDA="1", SANA_CUDA_ARCHS="90a", NVCC=NVCC)
    return lib / "sana_kernels"


@pytest.mark.slow
def test_cuda_module_imports_without_a_driver(cuda_module):
    ask = "import _cuda, json; print(json.dumps(_cuda.build_info()))"
    info = json.loads(run(sys.executable, "-c", ask, cwd=cuda_module, CUDA_VISIBLE_DEVICES=""))
    assert info["cuda_archs"] == ["90a"] and info["nvcc"]


@pytest.mark.slow
def test_cuda_kernels_do_not_spill(checkout, cuda_module):
    logs = {path.name: path.read_text() for path in (checkout / "build").glob("*/sana_kernels._cuda/**/*.cu.o.log")}
    spills = {name: re.findall(r"(\d+) bytes spill (?:stores|loads)", log) for name, log in logs.items()}
    assert any(spills.values()), "ptxas reported no kernel at all"
    assert {name: sizes for name, sizes in spills.items() if set(sizes) - {"0"}} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_modules_are_free_of_torch(name, wheel, tmp_path, request):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    if name == "_cuda":
        module = request.getfixturevalue("cuda_module") / f"_cuda{SUFFIX}"
    else:
        module = Path(zipfile.ZipFile(wheel).extract(f"sana_kernels/_cpu{SUFFIX}", tmp_path))
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", module))
    assert needed and not [library for library in needed if not LIBRARIES.fullmatch(library)]
    undefined = re.findall(r"UND (\S+)", run("readelf", "-W", "--dyn-syms", module))
    assert any(symbol.startswith("PyObject_") for symbol in undefined)  # the control: this is where torch's would be
    assert not [symbol for symbol in undefined if re.search(r"3c10|2at\d|5torch|^torch|^aoti", symbol)]


def test_extension_is_built_from_this_tree():
    """The tests run against an editable install: the tree that they import has its modules in it."""
    module, reason = backend.extension("_cpu")
    assert module, reason
    assert Path(module.__file__).parent == Path(sana_kernels.__file__).parent


def test_describe_is_json_and_follows_the_registry():
    found = describe()
    assert json.loads(json.dumps(found)) == found
    for op, cells in found["matrix"].items():
        registered = {kernel.backend for kernel in backend.kernels(op)}
        assert {name for name, cell in cells.items() if cell != "none"} == registered
        assert cells["reference"] == "runs"
    shown = render(found)
    for name, reason in found["backends"].items():
        assert (f"{name} is off: {reason}" in shown) == (reason is not None)


def test_describe_says_why_an_extension_is_missing(monkeypatch):
    monkeypatch.setattr(backend, "extension", lambda name: (None, f"{name} was lost"))
    monkeypatch.setattr(backend, "backend_status", lambda name: None if name == "reference" else "lost")
    shown = render(describe())
    assert "_cpu was lost" in shown and "cpu is off: lost" in shown and "pip install" in shown


def test_peaks():
    module, _ = backend.extension("_cpu")
    found = {kind: module.peak(kind, 1, 0.05) for kind in module.peak_kinds()}
    rates = {kind: undisturbed for kind, (_, undisturbed) in found.items()}
    assert all(over_all > undisturbed / 20 for over_all, undisturbed in found.values()), found
    assert {"fp32_portable", "copy"} <= set(rates)
    assert all(1e8 < rate < 1e14 for rate in rates.values()), rates
    if "fp32_avx2" in rates:  # twice the width and one instruction instead of two
        assert rates["fp32_avx2"] > 1.3 * rates["fp32_portable"], rates
    with isa_cap("portable"):  # a share of the peak is of the peak that the kernels may reach
        assert set(module.peak_kinds(capped=True)) == {"fp32_portable", "copy"}
        assert set(module.peak_kinds()) == set(found)
    for wrong in (("fp128", 1, 0.1), ("copy", 0, 0.1), ("copy", 1, float("nan"))):
        with pytest.raises(ValueError, match="peak"):
            module.peak(*wrong)
