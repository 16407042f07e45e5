// reduce and update on the CPU, over all chunks of a plan. Compiled once per instruction set
// (FUSEDOPT_SIMD names it): plain loops that the compiler vectorises, so every build rounds at the
// same places and gives the same bits. Nothing here calls templates or inline functions of the
// standard library: the linker would share them between instruction sets.
#include "kernels.h"

#include "denormals.h"
#include "exact.h"
#include "reduce.h"
#include "update.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#define FUSEDOPT_JOIN_(a, b) a##b
#define FUSEDOPT_JOIN(a, b) FUSEDOPT_JOIN_(a, b)
#define FUSEDOPT_STRING_(a) #a
#define FUSEDOPT_STRING(a) FUSEDOPT_STRING_(a)

namespace fusedopt {
namespace {

constexpr int64_t kStride = 16;               // chunks
constexpr int64_t kSerialElements = 1 << 15;  // below this a second thread costs more than it saves

int64_t n_elements(const PlanView& plan) {
  if (plan.n_chunks == 0) return 0;
  const Chunk& last = plan.chunks[plan.n_chunks - 1];
  return last.position + min(kChunk, plan.rows[last.row].numel - last.index * kChunk);
}

// The first chunk whose position is `element` or more.
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

// Calls body(first, last) for each thread's range of chunks. Both verbs divide the plan in the same
// way, so a thread finds the gradients that it has just reduced in its own cache.
template <class Body>
void for_chunk_ranges(const PlanView& plan, int num_threads, const Body& body) {
#if defined(_OPENMP)
  const int64_t elements = n_elements(plan);
  if (num_threads > 1 && elements >= kSerialElements) {
#pragma omp parallel num_threads(num_threads)
    {
      const DenormalsKept denormals_kept;
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      const int64_t first = chunk_at(plan, elements / threads * thread);
      const bool is_last = thread + 1 == threads;
      body(first, is_last ? plan.n_chunks : chunk_at(plan, elements / threads * (thread + 1)));
    }
    return;
  }
#endif
  const DenormalsKept denormals_kept;
  body(static_cast<int64_t>(0), plan.n_chunks);
}

void reduce(const PlanView& plan, const StepRecord& step, uint64_t* words, int num_threads) {
  const float inv_scale = inverse_scale(step.grad_scale);
  const auto reduce_range = !step.has(StepRecord::kNormIsTwo) ? reduce_largest
                            : step.has(StepRecord::kExact)    ? reduce_exactly
                                                              : reduce_squares;
  for_chunk_ranges(plan, num_threads, [&](int64_t first, int64_t last) {
    uint64_t own[kWords] = {};
    reduce_range(plan, step, first, last, inv_scale, own);
#pragma omp critical(fusedopt_words)
    for (int w = 0; w < kWords; ++w) words[w] = combined(w, words[w], own[w]);
  });
}

void update(const PlanView& plan, int rule, const StepRecord& step, int num_threads) {
  using UpdateChunk = void (*)(const PlanView&, const Chunk&, const StepRecord&);
  UpdateChunk update_one = nullptr;
  Rules::with(rule, [&](auto tag) { update_one = update_chunk<typename decltype(tag)::Rule>; });
  for_chunk_ranges(plan, num_threads, [&](int64_t first, int64_t last) {
    // Strides of chunks go backwards: the gradients reduced last are the likeliest to be in cache
    // still. Chunks in a stride go forwards, long enough for the hardware prefetchers.
    for (int64_t end = last; end > first; end -= kStride) {
      for (int64_t c = end - kStride > first ? end - kStride : first; c < end; ++c) {
        update_one(plan, plan.chunks[c], step);
      }
    }
  });
}

}  // namespace

extern const Kernels FUSEDOPT_JOIN(kernels_, FUSEDOPT_SIMD) = {FUSEDOPT_STRING(FUSEDOPT_SIMD),
                                                               reduce, update};

}  // namespace fusedopt
