"""What has to be true before the first test module is imported, and what is reset before every test."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Triton decides at import whether kernels are compiled or interpreted; set later, it is ignored.
    os.environ["TRITON_INTERPRET"] = "1"
# The default of this Triton setting changes between releases, and with it the last bits of every kernel.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


HERE = Path(__file__).parent
ORACLES = ("diffusers", "transformers")  # code that others wrote, which whole files of tests compare ours with


def _importing(names: list[str]) -> list[str]:
    """The files of tests that import one of these modules before any test runs."""
    imports = re.compile(rf"^(from|import) ({'|'.join(names)})\b", re.MULTILINE)
    return [path.name for path in HERE.glob("test_*.py") if names and imports.search(path.read_text())]


missing = [name for name in ORACLES if importlib.util.find_spec(name) is None]
collect_ignore = _importing(missing + [name.removesuffix(".py") for name in _importing(missing)])
"""Files that cannot be imported here, such as on a GPU machine that has PyTorch and little else."""


def pytest_report_header() -> list[str]:
    return [f"without {', '.join(missing)}, left out: {', '.join(sorted(collect_ignore))}"] if missing else []


def load_extension(path: str, name: str):
    """A compiled module from a file, under another name than its own."""
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


if instrumented := os.environ.get("SANA_CPU_MODULE"):  # `make asan`
    sys.modules["sana_kernels._cpu"] = load_extension(instrumented, "sana_kernels._cpu")


def pytest_configure(config):
    if importlib.util.find_spec("sana_kernels._cpu") is None:
        raise pytest.UsageError(
            "sana_kernels on the import path has no built C++ module, so its CPU kernels would go untested;"
            " run `make test`, or first: pip install -c constraints.txt -e '.[test]'"
        )


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))


@pytest.fixture(autouse=True)
def _same_start():
    """Every test draws the same numbers whatever ran before it, and leaves the thread count as it found it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """For tests of nothing large enough for two threads, which wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    """A small random model (`models.SMALL`). Imported here: the settings above come before any import of ours."""
    from models import SMALL

    from sana_model.weights.random_weights import random_model

    return random_model(SMALL, seed=2)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """That model as a diffusers folder, not to be changed."""
    from sana_model.weights.saving import save_diffusers

    folder = tmp_path_factory.mktemp("saved") / "small"
    save_diffusers(folder, model)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
