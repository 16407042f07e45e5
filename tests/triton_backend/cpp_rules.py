"""csrc/rules.h, compiled by itself: its functions on numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CSRC = Path(__file__).parents[2] / "csrc"

HARNESS = """
#include "rules.h"
using namespace fusedopt;

extern "C" {
void clip(int64_t n, const float* g, float mult, float most, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = clipped(g[i], mult, most);
}
void sums(int64_t n, const double* b, const int64_t* t, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = geometric_sum(b[i], t[i]);
}
void adamw_hypers(int64_t n, const AdamW::Options* o, const int64_t* t, float (*out)[8]) {
  for (int64_t i = 0; i < n; ++i) {
    const AdamW::Hyper h = AdamW::hyper(o[i], AdamW::row_scalars(o[i], t[i]));
    const float all[] = {h.lerp_weight, h.beta2, h.one_minus_beta2, h.step_size, h.eps, h.decay,
                         h.lerp_from_grad ? 1.0f : 0.0f, float(AdamW::decay(o[i]))};
    for (int k = 0; k < 8; ++k) out[i][k] = all[k];
  }
}
void sgd_hypers(int64_t n, const SGD::Options* o, const int64_t* t, float (*out)[6]) {
  for (int64_t i = 0; i < n; ++i) {
    const SGD::Hyper h = SGD::hyper(o[i], SGD::row_scalars(o[i], t[i]));
    const float all[] = {h.minus_lr, h.buffer_momentum, h.grad_weight, h.momentum, h.decay,
                         float(SGD::decay(o[i]))};
    for (int k = 0; k < 6; ++k) out[i][k] = all[k];
  }
}
void adamw_update(int64_t n, const float* h, int decay, bool amsgrad, const float* g, float* p,
                  float* m, float* v, float* x) {
  const AdamW::Hyper hyper = {h[0], h[1], h[2], h[3], h[4], h[5], h[6] != 0.0f};
  for (int64_t i = 0; i < n; ++i) {
    if (amsgrad) AdamW::update<true>(hyper, Decay(decay), g[i], p[i], m[i], v[i], x[i]);
    if (!amsgrad) AdamW::update<false>(hyper, Decay(decay), g[i], p[i], m[i], v[i], x[i]);
  }
}
void sgd_update(int64_t n, const float* h, int decay, bool momentum, bool nesterov, const float* g,
                float* p, float* m) {
  const SGD::Hyper hyper = {h[0], h[1], h[2], h[3], h[4]};
  for (int64_t i = 0; i < n; ++i)
    SGD::update(hyper, Decay(decay), momentum, nesterov, g[i], p[i], m[i]);
}
}
"""
NUMERIC_FLAGS = ["-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


@functools.cache
def compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "rules.cpp"), Path(folder, "rules.so")
        source.write_text(HARNESS)
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-I", str(CSRC), *NUMERIC_FLAGS]
        subprocess.run(
            [*compiler.split(), *flags, str(source), "-o", str(library), "-lm"], check=True
        )
        return ctypes.CDLL(str(library))


def in_cpp(function: str, n: int, *arguments: Any) -> None:
    converted = {np.float32: ctypes.c_float, bool: ctypes.c_bool, int: ctypes.c_int}
    getattr(compiled(), function)(
        ctypes.c_int64(n),
        *(
            ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else converted[type(a)](a)
            for a in arguments
        ),
    )
