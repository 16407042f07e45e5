// reduce and update on the CPU. Compiled once per instruction set (FUSEDOPT_SIMD names it): plain
// loops that the compiler vectorises, so every build rounds at the same places and gives the same
// bits. No templates or inline functions of the standard library in here: the linker would share
// them between instruction sets.
#include "kernels.h"

#include "../dtypes.h"
#include "../rules.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define FUSEDOPT_JOIN_(a, b) a##b
#define FUSEDOPT_JOIN(a, b) FUSEDOPT_JOIN_(a, b)
#define FUSEDOPT_STRING_(a) #a
#define FUSEDOPT_STRING(a) FUSEDOPT_STRING_(a)

namespace fusedopt {
namespace {

constexpr int64_t kBlock = 512;               // elements converted at a time; stays in L1
constexpr int64_t kSerialElements = 1 << 15;  // below this a second thread costs more than it does

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- conversions: any dtype in memory, fp32 in the loops ---------------------------------------

void widen_float16(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) out[j] = float16_to_float(in[j]);
}

void narrow_float16(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) out[j] = float_to_float16(in[j]);
}

void widen_bfloat16(const uint16_t* in, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_to_float(in[i]);
}

void narrow_bfloat16(const float* in, int64_t n, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat16(in[i]);
}

// fp32 data is used where it lies; anything else is widened into buffer.
const float* as_float(const void* data, DType dtype, int64_t begin, int64_t n, float* buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data) + begin;
  const uint16_t* half = static_cast<const uint16_t*>(data) + begin;
  if (dtype == DType::kFloat16) {
    widen_float16(half, n, buffer);
  } else {
    widen_bfloat16(half, n, buffer);
  }
  return buffer;
}

void narrow(const float* in, DType dtype, int64_t n, uint16_t* out) {
  if (dtype == DType::kFloat16) {
    narrow_float16(in, n, out);
  } else {
    narrow_bfloat16(in, n, out);
  }
}

// ---- reduce ------------------------------------------------------------------------------------

// Adjacent pairs, level by level: ((a0+a1)+(a2+a3))+... width is a power of two.
float tree_sum(float* lanes, int width) {
  float level[kLanes / 2];
  float* in = lanes;
  float* out = level;
  for (int w = width / 2; w >= 1; w /= 2) {
#pragma omp simd
    for (int l = 0; l < w; ++l) out[l] = in[2 * l] + in[2 * l + 1];
    float* spent = in;
    in = out;
    out = spent;
  }
  return in[0];
}

void add_squares(const float* grad, int64_t n, float mult1, float mult2, float* lanes) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const float x = grad[i + l] * mult1 * mult2;
      lanes[l] = fma(x, x, lanes[l]);
    }
  }
#pragma omp simd
  for (int64_t l = 0; l < n - i; ++l) {
    const float x = grad[i + l] * mult1 * mult2;
    lanes[l] = fma(x, x, lanes[l]);
  }
}

// Sum over the chunk of (grad * mult1 * mult2)^2. Lanes past the last element hold zero, and adding
// zero is exact, so a short chunk needs only the lanes it has.
float sum_squares(const Grad& grad, int64_t begin, int64_t n, float mult1, float mult2) {
  alignas(64) float lanes[kLanes];
  alignas(64) float buffer[kBlock];
  int width = 1;
  while (width < kLanes && width < n) width *= 2;
  for (int l = 0; l < width; ++l) lanes[l] = 0.0f;
  if (grad.dtype == DType::kFloat32) {
    add_squares(static_cast<const float*>(grad.data) + begin, n, mult1, mult2, lanes);
  } else {
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = min(kBlock, n - i);
      add_squares(as_float(grad.data, grad.dtype, begin + i, m, buffer), m, mult1, mult2, lanes);
    }
  }
  return tree_sum(lanes, width);
}

// max |grad * mult|. As integers the magnitudes of floats are ordered, with NaN above infinity.
float max_magnitude(const Grad& grad, int64_t begin, int64_t n, float mult) {
  alignas(64) float buffer[kBlock];
  int32_t largest = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = min(kBlock, n - i);
    const float* g = as_float(grad.data, grad.dtype, begin + i, m, buffer);
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < m; ++j) {
      const int32_t magnitude = static_cast<int32_t>(bits_of(g[j] * mult) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return float_of(static_cast<uint32_t>(largest));
}

// Squares that over- or underflowed fp32: once more, scaled by a power of two to around one. Finite
// elements thus have a finite sum; an inf or NaN element is the only way to a non-finite partial.
__attribute__((noinline)) double sum_squares_rescaled(const Grad& grad, int64_t begin, int64_t n,
                                                      float inv_scale) {
  const float largest = max_magnitude(grad, begin, n, inv_scale);
  if (largest == 0.0f || largest - largest != 0.0f) return largest;
  int exponent = static_cast<int>(bits_of(largest) >> 23) - 127;
  exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
  const float scale = float_of(static_cast<uint32_t>(127 - exponent) << 23);
  const double unscale = 1.0 / static_cast<double>(scale);
  return static_cast<double>(sum_squares(grad, begin, n, inv_scale, scale)) * unscale * unscale;
}

double reduce_chunk(const PlanView& plan, const Chunk& chunk, NormType norm_type, float inv_scale) {
  const Grad& grad = plan.grads[chunk.row];
  if (!grad.present) return 0.0;
  const int64_t begin = chunk.index * kChunk;
  const int64_t n = min(kChunk, plan.rows[chunk.row].numel - begin);
  if (norm_type == NormType::kInf) return max_magnitude(grad, begin, n, inv_scale);
  const float sum = sum_squares(grad, begin, n, inv_scale, 1.0f);
  const bool in_range = sum >= 0x1p-80f && sum <= 0x1.fffffep127f;  // false for NaN
  return in_range ? sum : sum_squares_rescaled(grad, begin, n, inv_scale);
}

// ---- update ------------------------------------------------------------------------------------

// One contiguous run of a tensor as the rule sees it: fp32, in memory or in an L1 buffer.
struct Run {
  int64_t n;
  const float* grad;
  float* param;
  float* state[kMaxStates];
};

FUSEDOPT_FN float clipped(float grad, float grad_mult, float max_grad_value) {
  float g = grad * grad_mult;
  g = g > max_grad_value ? max_grad_value : g;  // NaN passes both comparisons
  return g < -max_grad_value ? -max_grad_value : g;
}

template <class R>
using RunFn = void (*)(const typename R::Hyper&, const Run&, float grad_mult, float max_grad_value);

template <Decay kDecay, bool kAmsgrad>
void run_adamw(const AdamW::Hyper& hyper, const Run& run, float grad_mult, float max_grad_value) {
  const AdamW::Hyper h = hyper;
  const float* __restrict grad = run.grad;
  float* __restrict param = run.param;
  float* __restrict exp_avg = run.state[0];
  float* __restrict exp_avg_sq = run.state[1];
  float* __restrict max_exp_avg_sq = run.state[2];
  const int64_t n = run.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = clipped(grad[i], grad_mult, max_grad_value);
    float p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    float v_max = kAmsgrad ? max_exp_avg_sq[i] : 0.0f;
    AdamW::update<kDecay, kAmsgrad>(h, g, p, m, v, v_max);
    param[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (kAmsgrad) max_exp_avg_sq[i] = v_max;
  }
}

template <Decay kDecay, bool kMomentum, bool kNesterov>
void run_sgd(const SGD::Hyper& hyper, const Run& run, float grad_mult, float max_grad_value) {
  const SGD::Hyper h = hyper;
  const float* __restrict grad = run.grad;
  float* __restrict param = run.param;
  float* __restrict momentum_buffer = run.state[0];
  const int64_t n = run.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = clipped(grad[i], grad_mult, max_grad_value);
    float p = param[i];
    float buffer = kMomentum ? momentum_buffer[i] : 0.0f;
    SGD::update<kDecay, kMomentum, kNesterov>(h, g, p, buffer);
    param[i] = p;
    if (kMomentum) momentum_buffer[i] = buffer;
  }
}

template <Decay kDecay>
RunFn<AdamW> choose(const AdamW::Options& o) {
  return o.amsgrad ? run_adamw<kDecay, true> : run_adamw<kDecay, false>;
}

template <Decay kDecay>
RunFn<SGD> choose(const SGD::Options& o) {
  if (o.momentum == 0.0) return run_sgd<kDecay, false, false>;
  return o.nesterov ? run_sgd<kDecay, true, true> : run_sgd<kDecay, true, false>;
}

template <class Options>
auto choose_run(const Options& o, Decay decay) {
  switch (decay) {
    case Decay::kCoupled:
      return choose<Decay::kCoupled>(o);
    case Decay::kDecoupled:
      return choose<Decay::kDecoupled>(o);
    default:
      return choose<Decay::kNone>(o);
  }
}

// The param is the truth wherever it is not the rounding of its master: someone wrote to it since
// the last step. The lines are fetched for the write anyway, so on a CPU looking costs no
// bandwidth.
void follow_external_writes(const uint16_t* param, DType dtype, int64_t n, float* master) {
  if (n <= 0) __builtin_unreachable();
  alignas(64) uint16_t expected[kBlock];
  alignas(64) float written[kBlock];
  narrow(master, dtype, n, expected);
  if (__builtin_memcmp(expected, param, static_cast<size_t>(n) * sizeof *param) == 0) return;
  as_float(param, dtype, 0, n, written);
  for (int64_t i = 0; i < n; ++i) {
    if (expected[i] != param[i]) master[i] = written[i];
  }
}

template <class R>
void update_half(const Row& row, int64_t begin, Run run, RunFn<R> fn,
                 const typename R::Hyper& hyper, const UpdateArgs& args, float mult) {
  alignas(64) float buffer[kBlock];
  uint16_t* param = static_cast<uint16_t*>(row.param) + begin;
  if (row.master) {
    run.param = row.master + begin;
    follow_external_writes(param, row.dtype, run.n, run.param);
  } else {
    as_float(param, row.dtype, 0, run.n, buffer);
    run.param = buffer;
  }
  fn(hyper, run, mult, args.max_grad_value);
  narrow(run.param, row.dtype, run.n, param);
}

template <class R>
void update_chunk(const PlanView& plan, const Chunk& chunk, const UpdateArgs& args) {
  const Row& row = plan.rows[chunk.row];
  const Grad& grad = plan.grads[chunk.row];
  if (!grad.present) return;
  const auto& options = static_cast<const typename R::Options*>(args.options)[row.group];
  const auto hyper =
      R::hyper(options, static_cast<const typename R::RowScalars*>(plan.row_scalars)[chunk.row]);
  const RunFn<R> fn = choose_run(options, R::decay(options));
  const float mult = options.maximize ? -args.grad_mult : args.grad_mult;

  alignas(64) float buffer[kBlock];
  const bool direct = row.dtype == DType::kFloat32 && grad.dtype == DType::kFloat32;
  const int64_t first = chunk.index * kChunk;
  const int64_t last = first + min(kChunk, row.numel - first);
  const int64_t stride = direct ? kChunk : kBlock;
  for (int64_t begin = first; begin < last; begin += stride) {
    Run run;
    run.n = min(stride, last - begin);
    run.grad = as_float(grad.data, grad.dtype, begin, run.n, buffer);
    for (int s = 0; s < R::kStates; ++s) {
      run.state[s] = row.state[s] ? row.state[s] + begin : nullptr;
    }
    if (row.dtype == DType::kFloat32) {
      run.param = static_cast<float*>(row.param) + begin;
      fn(hyper, run, mult, args.max_grad_value);
    } else {
      update_half<R>(row, begin, run, fn, hyper, args, mult);
    }
  }
}

// ---- threads -----------------------------------------------------------------------------------

// First chunk whose position is at or past the given share of the plan's elements.
int64_t chunk_at(const PlanView& plan, int64_t element) {
  int64_t low = 0;
  int64_t high = plan.n_chunks;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (plan.chunks[middle].position < element) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// body(first, last) for each thread's run of chunks. Both verbs cut the plan at the same places, so
// a thread finds the gradients it has just reduced in its own cache.
template <class Body>
void for_chunk_ranges(const PlanView& plan, int num_threads, const Body& body) {
#if defined(_OPENMP)
  if (num_threads > 1 && plan.n_elements >= kSerialElements) {
#pragma omp parallel num_threads(num_threads)
    {
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      const int64_t first = chunk_at(plan, plan.n_elements / threads * thread);
      const bool is_last = thread + 1 == threads;
      body(first,
           is_last ? plan.n_chunks : chunk_at(plan, plan.n_elements / threads * (thread + 1)));
    }
    return;
  }
#endif
  body(static_cast<int64_t>(0), plan.n_chunks);
}

void reduce(const PlanView& plan, NormType norm_type, float inv_scale, int num_threads) {
  for_chunk_ranges(plan, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      plan.partials[c] = reduce_chunk(plan, plan.chunks[c], norm_type, inv_scale);
    }
  });
}

void update(const PlanView& plan, const UpdateArgs& args, int num_threads) {
  for_chunk_ranges(plan, num_threads, [&](int64_t first, int64_t last) {
    // Backwards: the last gradients reduced are the likeliest to be in cache still.
    for (int64_t c = last; c-- > first;) {
      if (args.rule == Rule::kAdamW) {
        update_chunk<AdamW>(plan, plan.chunks[c], args);
      } else {
        update_chunk<SGD>(plan, plan.chunks[c], args);
      }
    }
  });
}

}  // namespace

extern const Kernels FUSEDOPT_JOIN(kernels_, FUSEDOPT_SIMD) = {FUSEDOPT_STRING(FUSEDOPT_SIMD),
                                                               reduce, update};

}  // namespace fusedopt
