// What one launch gets, and one function for each kernel. The functions are asynchronous, on
// `stream` of the current device; each returns the launch's own error.
#pragma once

#include <cuda_runtime.h>

#include "../records.h"
#include "../words.h"

namespace fusedopt {

using Word = unsigned long long;  // of csrc/words.h, as atomics want it

// The tables of a plan on this device and the record of this step; travels by value.
struct DeviceStep {
  PlanView plan;
  StepRecord record;
  double* fields;  // of the table of options, where the numbers that follow are written to
  const DeviceNumber* numbers;
  Word* sums;        // to which the blocks of reduce add; zero between launches
  Word* words;       // of each device that shares the norm
  uint32_t* ticket;  // blocks of reduce that are done; zero between launches
  int32_t n_devices;
  int32_t own_number;  // of the device whose words reduce writes
  int32_t rule;        // number in Rules
  int32_t n_states;    // of a tensor, at most
  bool half_states;    // some state or master is 16 bits wide
};

// Bytes that travel in a kernel's parameters, of which every toolkit and GPU allows 4,096.
constexpr size_t kPayloadBytes = 3840;

// destination[0, bytes) = source[0, bytes), read before the call returns; at most kPayloadBytes, a
// multiple of 16 on a 16-byte boundary.
cudaError_t write_page(void* destination, const void* source, size_t bytes, cudaStream_t stream);

// Gradients to this device's words. `finalizes`: the last block goes on to what finalize() does.
cudaError_t reduce(const DeviceStep& step, bool finalizes, int blocks, cudaStream_t stream);

// The words of all devices to StepScalars, and a RowStep for each row.
cudaError_t finalize(const DeviceStep& step, cudaStream_t stream);

cudaError_t update(const DeviceStep& step, int blocks, cudaStream_t stream);

// Resident blocks of reduce and update on the current device: the size of a persistent grid.
cudaError_t resident_blocks(const DeviceStep& step, int* reduce_blocks, int* update_blocks);

}  // namespace fusedopt
