// The host's side of a plan on one device: what its launches get, and when its table is written
// anew.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "step.h"

namespace fusedopt {

// Addresses on the device unless said; all memory is Python's.
struct DeviceTables {
  int device;
  int32_t n_groups;
  int64_t n_rows, n_chunks, n_elements;
  const void* host_inputs;  // on the host: options, device numbers and grads of the coming step
  void* inputs;             // where they are written to
  const Row* rows;
  const Chunk* chunks;
  double* partials;
  void* row_steps;
  double* totals;
  int32_t n_totals, own_total;
  uint32_t* ticket;
};

// What changes from step to step and travels by value.
struct StepArguments {
  StepOptions options;
  float max_grad_value;
  const float* grad_scale;
  const float* found_inf;
  float* inf_flag;
  StepScalars* scalars;
  int32_t n_device_numbers;
};

class DevicePlan {
 public:
  // amsgrad: some group uses it. Throws std::runtime_error with CUDA's words, as every method does;
  // an error leaves the plan usable.
  DevicePlan(const DeviceTables& tables, Rule rule, bool amsgrad);

  // Comes before the launches of a step. Writes the pages of the table that have changed, and all
  // of them into a graph that is being captured.
  void begin(const StepArguments& arguments, cudaStream_t stream, bool capturing);

  void reduce(bool finalizes);
  void finalize();
  void update();

  // Launches of update that did not fail, so far.
  int64_t updates() const { return updates_; }

 private:
  void write_inputs(size_t bytes);

  DeviceTables tables_;
  Rule rule_;
  bool amsgrad_;
  int reduce_blocks_ = 0, update_blocks_ = 0;
  DeviceStep step_ = {};
  cudaStream_t stream_ = nullptr;
  int64_t updates_ = 0;
  // What the device holds, by pages of kPayloadBytes, where that is known.
  std::vector<char> written_;
  std::vector<bool> known_;
  bool captured_ = false;  // replays write the table too, so what it holds is never known
};

// Devices that CUDA offers. Throws where there is no driver, or one too old for this build.
int device_count();

}  // namespace fusedopt
