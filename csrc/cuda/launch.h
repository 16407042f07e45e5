// The arguments of a launch, and one function for each kernel. The functions are asynchronous, on
// `stream` of the current device; each returns the error of its launch.
#pragma once

#include <cuda_runtime.h>

#include "../records.h"
#include "../words.h"

namespace fusedopt {

using Word = unsigned long long;  // of csrc/words.h, in the type that CUDA's atomics take

// The tables of a plan on this device and the record of this step; passed by value.
struct DeviceStep {
  PlanView plan;
  StepRecord record;
  double* fields;  // of the options table; `numbers` are written to them
  const DeviceNumber* numbers;
  Word* sums;        // the blocks of reduce add to these; zero between launches
  Word* words;       // of each device that shares the norm
  uint32_t* ticket;  // blocks of reduce that are done; zero between launches
  int32_t n_devices;
  int32_t own_number;  // of the device whose words reduce writes
  int32_t rule;        // number in Rules
  int32_t n_states;    // of a tensor, at most
  bool coded;          // some row has streams that kernels for fp32 state cannot read
};

// Bytes passed in a kernel's parameters; every toolkit and GPU allows 4,096 of parameters.
constexpr size_t kPayloadBytes = 3840;

// Copies source[0, bytes), which is read before the call returns, to `destination` on a 16-byte
// boundary. `bytes` is a multiple of 16, and at most kPayloadBytes.
cudaError_t write_page(void* destination, const void* source, size_t bytes, cudaStream_t stream);

// Gradients to this device's words. If no other device and no rank has words to add, the last block
// also does the work of finalize().
cudaError_t reduce(const DeviceStep& step, int blocks, cudaStream_t stream);

// What reduce() launches for norm_bits="exact".
cudaError_t reduce_exactly(const DeviceStep& step, int blocks, cudaStream_t stream);

// The words of all devices to StepScalars, and a RowStep for each row.
cudaError_t finalize(const DeviceStep& step, cudaStream_t stream);

cudaError_t update(const DeviceStep& step, int blocks, cudaStream_t stream);

// Resident blocks of reduce and update on the current device: the size of a persistent grid.
cudaError_t resident_blocks(const DeviceStep& step, int* reduce_blocks, int* update_blocks);

}  // namespace fusedopt
