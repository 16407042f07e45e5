"""Run a kernel of self_test.cu with the mistake that the argument names: sanitizers must see it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cuda_shim

functions = cuda_shim.Shim(cuda_shim.build("self_test", [cuda_shim.SELF_TEST])).functions
# of malloc itself, so that the sanitizer knows where they end
libc = ctypes.CDLL(None)
libc.calloc.restype = ctypes.c_void_p
data, out, ticket = (ctypes.c_void_p(libc.calloc(1024, 4)) for _ in range(3))

mistakes = {
    "overrun": lambda: functions.overrun(ctypes.c_void_p(libc.calloc(255, 4)), 255),
    "first_barrier": lambda: functions.sum(data, out, 4, 1),
    "last_barrier": lambda: functions.sum(data, out, 4, 2),
    "warp_barrier": lambda: functions.warps(data, False),
    "first_fence": lambda: functions.ticket(data, ticket, out, 4, 1),
    "second_fence": lambda: functions.ticket(data, ticket, out, 4, 2),
}
assert mistakes[sys.argv[1]]() == 0
