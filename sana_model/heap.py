"""The C library's heap: whether what is freed stays with the process or goes back to the system.

Of glibc; elsewhere nothing happens.
"""

import ctypes
import os
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed() -> None:
    """Keep up to half a GB at the heap's end, and have tensors of less than 32 MB lie in the heap.

    The decoder's bands come and go by the hundred megabytes; by default they go back to the system and are asked for again,
    page by page, which was a tenth of a decode. Settings of the environment stay as they are.
    """
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if own or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 512 << 20)


def give_back() -> None:
    """What is free goes back to the system."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
