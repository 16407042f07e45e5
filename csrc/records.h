// The records that Python lays out in memory for the kernels. They own nothing: Python keeps the
// tensor behind every pointer alive. fusedopt/backends/records.py declares the same records, and
// modules.py in that folder compares the two, field by field, when it imports a native module.
#pragma once

#include "codecs.h"
#include "fields.h"

namespace fusedopt {

// Part of the numeric contract: the norm depends on the gradients, on these two constants, and on
// nothing else.
constexpr int64_t kChunk = 8192;  // elements that are handled together and have one partial
constexpr int kLanes = 256;       // fp32 accumulators of a chunk, by element index modulo kLanes
static_assert(kChunk / kLanes <= 256, "the accuracy of a lane rests on at most 256 adds");

// The streams of a tensor: arrays of which a kernel reads or writes every element.
constexpr int kParam = 0, kMaster = 1, kStates = 2;  // the states are the last streams
constexpr int kMaxStates = 3;
constexpr int kStreams = kStates + kMaxStates;
constexpr int kCodecBits = 4;  // of one stream in Row::codecs

// One tensor; changes only when the plan is rebuilt or bound to other memory. A stream is its data,
// the codec of its elements and, for a log8 state, a scale for each block of kScaleBlock elements.
// Without a master the param takes its place. Kernels for fp32 read the first half of the record
// only.
struct Row {
  void* data[kStreams];  // dense, in memory order; null: there is no such stream
  float* step;           // applied steps; null: the rule does not count (SGD without momentum)
  int64_t numel;
  int32_t group;              // line in the options table
  uint32_t codecs;            // kCodecBits a stream, the param's lowest; zero: all are fp32
  uint8_t* scales[kStreams];  // null: the codec has none
  int64_t uncounted;          // 1: another rank counts this tensor's gradient in the norm
  int64_t first;              // place of a shard's first element in the whole tensor, for dithers
  int64_t reserved;

  FUSEDOPT_FIELDS(data, step, numel, group, codecs, scales, uncounted, first, reserved)

  FUSEDOPT_MEMBER float* as_float(int stream) const { return static_cast<float*>(data[stream]); }
  FUSEDOPT_MEMBER Codec codec(int stream) const {
    return static_cast<Codec>(codecs >> (kCodecBits * stream) & ((1u << kCodecBits) - 1));
  }
};
static_assert(sizeof(Row) == 128, "two cache lines");
static_assert(kChunk % kScaleBlock == 0, "a chunk has whole blocks");

// The gradient of a row; refreshed before every step.
struct Grad {
  const void* data;
  Codec codec;
  int32_t present;  // 0: .grad is None, this tensor takes no part in the step

  FUSEDOPT_FIELDS(data, codec, present)
};
static_assert(sizeof(Grad) == 16, "a table of them is uploaded in pieces of 16 bytes");

struct Chunk {
  int32_t row;
  int32_t index;     // elements [index * kChunk, (index + 1) * kChunk) of the row
  int64_t position;  // elements before this chunk in the whole plan; balances threads

  FUSEDOPT_FIELDS(row, index, position)
};

// An option that the user keeps in a tensor on the device, such as a learning rate under a captured
// graph. Kernels read it there, so that the host does not wait for its value.
struct DeviceNumber {
  const void* data;  // fp32 or fp64, one element
  int32_t field;     // which double of the options table
  int32_t is_double;

  FUSEDOPT_FIELDS(data, field, is_double)
};

// Lives on the device as eight floats; Python reads the fields by index.
struct StepScalars {
  float grad_norm;      // of the unscaled gradients, before clipping; NaN when not measured
  float clip_coef;      // min(1, max_grad_norm / (grad_norm + 1e-6))
  float grad_mult;      // the single factor update applies: clip_coef / grad_scale
  float inv_scale;      // 1 / grad_scale, the reciprocal taken in fp64 as GradScaler does
  float found_inf;      // 1: some gradient element is inf or NaN
  float skip;           // 1: this step updates nothing; 2: nor is it counted as skipped
  float skipped_steps;  // running count
  float reserved;

  FUSEDOPT_FIELDS(grad_norm, clip_coef, grad_mult, inv_scale, found_inf, skip, skipped_steps,
                  reserved)
};

// Everything else that a step needs from the host; packed by the verb `begin`.
struct StepRecord {
  double max_grad_norm;     // negative: no clipping
  double max_grad_value;    // infinity: no clipping
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: no scaler has checked
  float* inf_flag;          // the flag that GradScaler.update() will read; null: none
  StepScalars* scalars;
  int64_t n_device_numbers;
  uint64_t flags;
  uint64_t n_ranks;      // that share the norm; 0: this process is alone
  uint64_t fingerprint;  // of the options; the ranks compare theirs
  int32_t* refusal;  // a Refusal (scalars.h), in memory of the host; stays until Python clears it
  uint64_t reserved;

  FUSEDOPT_FIELDS(max_grad_norm, max_grad_value, grad_scale, found_inf, inf_flag, scalars,
                  n_device_numbers, flags, n_ranks, fingerprint, refusal, reserved)

  enum Flag : uint64_t {
    kNormIsTwo = 1,      // the 2-norm; otherwise the largest magnitude
    kMeasured = 2,       // reduce runs, so the words are those of this step
    kSkipNonfinite = 4,  // a scaler decides about the step, or the user asked for it
    kUncounted = 8,      // some row is not counted
    kExact = 16,         // of the 2-norm: the squares of all elements are added up exactly
  };
  FUSEDOPT_MEMBER bool has(Flag flag) const { return (flags & flag) != 0; }
  FUSEDOPT_MEMBER bool counts(const Row& row) const { return !has(kUncounted) || !row.uncounted; }
};

// The tables of a plan.
struct PlanView {
  const Row* rows;
  const Grad* grads;
  const void* options;  // the rule's Options for each group
  void* row_steps;      // the rule's RowStep for each row
  int64_t n_rows;
  const Chunk* chunks;
  int64_t n_chunks;
};

}  // namespace fusedopt
