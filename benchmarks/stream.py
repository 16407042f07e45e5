"""The ceiling: the memory traffic of a clipped AdamW step and nothing else.

Reads the gradients once (the norm), then reads gradients, params and two states and writes the
last three: 32 bytes per fp32 param. The gradients are new every step and lie, like the params,
where torch puts them; the states lie in 2 MB pages (`stream_huge`, as fusedopt's do) or in 4 KB
pages (`stream_4k`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.clocks import HostClock

BYTES_PER_PARAM = 32
CEILING_NUMEL = 64_000_000  # 1 GB of arrays: well above any cache
QUICK = 16_000_000, 3  # elements and rounds of a first look
_HUGE_PAGE = 2 << 20
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

_SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <omp.h>

constexpr std::int64_t kBlock = 8192, kLine = 16, kAhead = 512;  // elements; 64 and 2048 bytes

static float read_block(const float* __restrict grad, std::int64_t count) {
  constexpr std::int64_t kStep = 4 * kLine;  // as many sums, so that none waits for the last one
  float sums[kStep] = {};
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (std::int64_t j = 0; j < kStep; j += kLine) __builtin_prefetch(grad + i + kAhead + j);
#pragma omp simd
    for (std::int64_t j = 0; j < kStep; ++j) sums[j] += grad[i + j] * grad[i + j];
  }
  float sum = 0.0f;
  for (; i < count; ++i) sum += grad[i] * grad[i];
  for (const float part : sums) sum += part;
  return sum;
}

static void update_block(const float* __restrict grad, float* __restrict param,
                         float* __restrict exp_avg, float* __restrict exp_avg_sq,
                         std::int64_t count) {
  const auto update = [&](std::int64_t i) {
    param[i] = 0.5f * param[i] + grad[i];
    exp_avg[i] = 0.5f * exp_avg[i] + grad[i];
    exp_avg_sq[i] = 0.5f * exp_avg_sq[i] + grad[i];
  };
  std::int64_t i = 0;
  for (; i + kLine <= count; i += kLine) {
    __builtin_prefetch(grad + i + kAhead);
    __builtin_prefetch(param + i + kAhead, 1);
    __builtin_prefetch(exp_avg + i + kAhead, 1);
    __builtin_prefetch(exp_avg_sq + i + kAhead, 1);
#pragma omp simd
    for (std::int64_t j = 0; j < kLine; ++j) update(i + j);
  }
  for (; i < count; ++i) update(i);
}

// Each thread has one contiguous share and walks it forwards twice. Walking back over blocks of
// this length, to meet what is still in the cache, was slower: the prefetchers lose their streams.
extern "C" float adam_stream(const float* grad, float* param, float* exp_avg, float* exp_avg_sq,
                             std::int64_t numel, int threads) {
  const std::int64_t blocks = (numel + kBlock - 1) / kBlock;
  float total = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const std::int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    const std::int64_t begin = blocks * thread / count, end = blocks * (thread + 1) / count;
    for (std::int64_t b = begin; b < end; ++b)
      total += read_block(grad + b * kBlock, std::min(kBlock, numel - b * kBlock));
#pragma omp barrier
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t at = b * kBlock;
      update_block(grad + at, param + at, exp_avg + at, exp_avg_sq + at,
                   std::min(kBlock, numel - at));
    }
  }
  return total;
}
"""


@cache
def _compiled() -> Callable[..., float] | None:
    """The stream in C++, or None without a working compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stream.cpp"), Path(folder, "stream.so")
        source.write_text(_SOURCE)
        command = [*compiler.split(), *_FLAGS, str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
        function = ctypes.CDLL(str(library)).adam_stream
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_int]
    function.restype = ctypes.c_float
    return function


def _state_array(numel: int, huge: bool) -> Tensor:
    """Zeros in a private mapping, aligned to huge pages and advised for or against them."""
    # Python's default is a shared mapping, and those get no transparent huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, 4 * numel + _HUGE_PAGE, flags=flags)
    advice = "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE"
    if hasattr(mmap, advice):
        buffer.madvise(getattr(mmap, advice))
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    array = torch.frombuffer(buffer, dtype=torch.float32, count=numel, offset=-address % _HUGE_PAGE)
    return array.zero_()


def _huge_page_bytes() -> int:
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


class Stream:
    """Has the interface of a pipeline as far as timing needs it; it computes no optimizer step."""

    def __init__(self, numel: int, *, huge: bool, threads: int | None = None) -> None:
        self._threads = threads  # None: as many as torch uses
        self._param = torch.zeros(numel)
        self._grad = torch.ones(numel)
        before = _huge_page_bytes()
        self._states = [_state_array(numel, huge) for _ in range(2)]
        share = min(1.0, (_huge_page_bytes() - before) / (8 * numel))
        self._function = _compiled()
        how = "C++" if self._function else "torch ops, no compiler: not a ceiling"
        self._description = f"stream in {how}, {share:.0%} of its states in huge pages"

    def describe(self) -> str:
        return self._description

    def prepare(self) -> None:
        del self._grad
        self._grad = torch.full((self._param.numel(),), 1e-3)

    def step(self) -> None:
        if self._function is None:
            self._step_in_torch()
            return
        arrays = (self._grad, self._param, *self._states)
        pointers = [array.data_ptr() for array in arrays]
        threads = self._threads or torch.get_num_threads()
        self._function(*pointers, self._param.numel(), threads)

    def _step_in_torch(self) -> None:
        """The same bytes in four sweeps."""
        self._grad.sum()
        self._param.add_(self._grad)
        for state in self._states:
            state.neg_()


STREAMS: dict[str, Callable[[int], Stream]] = {
    "stream_huge": partial(Stream, huge=True),
    "stream_4k": partial(Stream, huge=False),
}


def ceiling_gb_s(numel: int = CEILING_NUMEL, rounds: int = 5) -> float | None:
    """Bytes/s, in GB, that memory gives to a step's accesses: the denominator of a prediction.

    The median of ``rounds`` passes of `stream_huge` on as many threads as torch uses, disturbed
    ones left out while others remain. None without a compiler: torch operations are no ceiling.
    """
    if _compiled() is None:
        return None
    take = HostClock().sampler(Stream(numel, huge=True))
    samples = [take() for _ in range(rounds)]
    clean = [sample for sample in samples if not sample.disturbed]
    ms = statistics.median(sample.times[0] for sample in clean or samples)
    return BYTES_PER_PARAM * numel / ms / 1e6
