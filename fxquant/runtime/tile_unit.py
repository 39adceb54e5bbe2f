"""Permission to use the tile unit (AMX), which Linux gives a process that asks for it."""

from __future__ import annotations

import ctypes
import functools
import logging
import os

LOG = logging.getLogger("fxquant.toolchain")
# arch_prctl(2), and the number of the registers' state (Linux, Documentation/arch/x86/xstate.rst).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.lru_cache(maxsize=1)
def refusal() -> str:
    """Why this process may not use the unit of an x86-64 processor that has it, or ``""``.

    Asks once. All threads have what a process is permitted, and so have its forks.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return ""
    said = os.strerror(ctypes.get_errno())
    reason = f"the system does not permit this process to use the tile unit ({said})"
    LOG.warning("%s: kernels do without it", reason)
    return reason
