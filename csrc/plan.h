// The tables of a plan as Python lays them out. Non-owning: every pointer belongs to a tensor that
// Python keeps alive, and nothing below Python allocates.
#pragma once

#include "platform.h"

namespace fusedopt {

// Part of the numeric contract: the norm of a tensor depends on both constants, and on nothing
// else.
constexpr int64_t kChunk = 8192;  // elements handled together: one partial each
constexpr int kLanes = 256;       // fp32 accumulators of a chunk, by element index modulo kLanes
static_assert(kChunk / kLanes <= 256, "the accuracy of a lane rests on at most 256 adds");

constexpr int kMaxStates = 3;

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// One tensor; changes only when the plan is rebuilt.
struct Row {
  void* param;    // dense, in memory order
  float* master;  // null: param is its own master
  float* state[kMaxStates];
  float* step;  // applied steps; null: the rule does not count (SGD without momentum)
  int64_t numel;
  int32_t group;  // line in the options table
  DType dtype;    // of param
};
static_assert(sizeof(Row) == 64, "mirrored by fusedopt/plan.py");

// The live half of a row, refreshed before every step.
struct Grad {
  const void* data;
  DType dtype;
  int32_t present;  // 0: .grad is None, this tensor takes no part in the step
};
static_assert(sizeof(Grad) == 16, "mirrored by fusedopt/plan.py");

struct Chunk {
  int32_t row;
  int32_t index;     // elements [index * kChunk, (index + 1) * kChunk) of the row
  int64_t position;  // elements before this chunk in the whole plan; balances threads
};
static_assert(sizeof(Chunk) == 16, "mirrored by fusedopt/plan.py");

struct PlanView {
  const Row* rows;
  const Grad* grads;
  void* row_scalars;  // of each row: the rule's RowScalars (CPU) or RowStep (CUDA)
  int64_t n_rows;
  const Chunk* chunks;
  int64_t n_chunks;
  int64_t n_elements;
  double* partials;  // one per chunk
};

}  // namespace fusedopt
