"""How the process keeps memory on a CPU; a setting to measure with, which no command turns on."""

from __future__ import annotations

import ctypes
import sys

# Names of glibc's malloc.h; other C libraries have no such switches.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0


def keep_freed_memory() -> bool:
    """Lets the process keep what it frees, for its next step; true where the C library can.

    glibc hands large freed blocks back to the system, and every step of a training on a CPU then
    touches hundreds of megabytes for the first time again: page faults, and on a virtual machine
    faults of its host below them. The process holds on to its peak instead; that of a step returns
    with the next step anyway.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, for one
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_M_MMAP_MAX, _NONE))
