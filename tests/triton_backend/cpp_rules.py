"""csrc/rules.h, compiled by itself: the functions of every rule, by its name, on numpy arrays."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from cpp_library import compiled

HARNESS = """
#include <cstring>
#include <utility>
#include "rules.h"
using namespace fusedopt;

template <class Visit>
void with_rule(const char* name, const Visit& visit) {
  for (int rule = 0; rule < Rules::kCount; ++rule)
    Rules::with(rule, [&](auto tag) {
      if (!std::strcmp(name, decltype(tag)::Rule::kName)) visit(tag);
    });
}

struct Elements {
  int64_t n;
  const float* grad;
  float *param, *const *state;
};

template <class R, int kThere, size_t... k>
void update_elements(const float* h, Kind kind, Elements e, std::index_sequence<k...>) {
  typename R::Hyper hyper;
  std::memcpy(&hyper, h, sizeof hyper);
  for (int64_t i = 0; i < e.n; ++i)
    R::template update<kThere>(hyper, kind, e.grad[i], e.param[i], e.state[k][i]...);
}

template <class R, int kThere>
void update_with(int states, const float* h, Kind kind, Elements e) {
  using All = std::make_index_sequence<R::kStates>;
  if (states == kThere) update_elements<R, kThere>(h, kind, e, All());
  if constexpr (kThere < R::kStates) update_with<R, kThere + 1>(states, h, kind, e);
}

extern "C" {
void clip(int64_t n, const float* g, float mult, float most, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = clipped(g[i], mult, most);
}
void sums(int64_t n, const double* b, const int64_t* t, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = geometric_sum(b[i], t[i]);
}
// kAlways, kVariants, and then what absent states read as
void constants(int64_t n, const char* rule, float* out) {
  with_rule(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    *out++ = R::kAlways;
    *out++ = R::kVariants;
    for (int s = 0; s < R::kStates; ++s) *out++ = R::absent(s);
  });
}
void hypers(int64_t n, const char* rule, const void* options, const int64_t* t, float* out) {
  with_rule(rule, [&](auto tag) {
    using R = typename decltype(tag)::Rule;
    for (int64_t i = 0; i < n; ++i) {
      const auto& o = static_cast<const typename R::Options*>(options)[i];
      const auto h = R::prepare(o, t[i]);
      std::memcpy(out, &h, sizeof h);
      out += sizeof h / sizeof *out;
      *out++ = float(kind_of<R>(o).decay);
      *out++ = float(kind_of<R>(o).variant);
    }
  });
}
void update(int64_t n, const char* rule, int states, const float* h, int decay, int variant,
            const float* g, float* p, float* const* s) {
  with_rule(rule, [&](auto tag) {
    update_with<typename decltype(tag)::Rule, 0>(states, h, {Decay(decay), variant}, {n, g, p, s});
  });
}
}
"""
library = functools.cache(lambda: compiled(HARNESS))


def in_cpp(function: str, n: int, *arguments: Any) -> None:
    converted = {np.float32: ctypes.c_float, int: ctypes.c_int, str: lambda a: a.encode()}
    arrays = {np.ndarray: lambda a: ctypes.c_void_p(a.ctypes.data), list: _addresses}
    made = [{**converted, **arrays}[type(a)](a) for a in arguments]
    getattr(library(), function)(ctypes.c_int64(n), *made)


def _addresses(arrays: list[Any]) -> Any:
    return (ctypes.c_void_p * max(len(arrays), 1))(*(a.ctypes.data for a in arrays))
