"""What has to be true before the first test module is imported, and what is reset before every test."""

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Triton decides at import whether kernels are compiled or interpreted; set later, it is ignored.
    os.environ["TRITON_INTERPRET"] = "1"
# The default of this Triton setting changes between releases, and with it the last bits of every kernel.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


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
