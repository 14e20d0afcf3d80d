"""What the decoder's bands free stays with the process, until it is wanted elsewhere."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_model import heap, memory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

BANDS = """
import ctypes, resource, torch
from sana_model import heap
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # pages of 4 KB alone
heap.keep_freed()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bands = [torch.ones(2 << 20) for _ in range(20)]  # of 8 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
heap.give_back()
print(faults())
"""


@pytest.mark.parametrize("setting", [{}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}], ids=str)
def test_what_bands_free_is_kept(setting):
    """Unless the environment says otherwise."""
    ours = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"PYTHONPATH": str(Path(heap.__file__).parents[1])} | setting
    done = subprocess.run([sys.executable, "-c", BANDS], env=environment, capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert (kept > 20000) == bool(setting) and given_back > 20000


def test_a_refusal_comes_after_it_was_given_back(monkeypatch):
    rooms = []
    monkeypatch.setattr(memory, "available", lambda _device: rooms[-1])
    monkeypatch.setattr(heap, "give_back", lambda: rooms.append(10))
    for room, needed, expected in ((6, 5, 6), (6, 8, 10), (6, 20, 10)):
        rooms[:] = [room]
        assert memory._room(memory.torch.device("cpu"), needed) == expected
