// What the host calls: one function a kernel. Asynchronous, on `stream` of the current device; each
// returns the launch's own error.
#pragma once

#include <cuda_runtime.h>

#include "step.h"

namespace fusedopt {

// Bytes that travel in a kernel's parameters, of which every toolkit and GPU allows 4,096.
constexpr int kPayloadBytes = 3840;

// destination[0, bytes) = source[0, bytes), read before the call returns; at most kPayloadBytes, a
// multiple of 16 on a 16-byte boundary.
cudaError_t write_page(void* destination, const void* source, size_t bytes, cudaStream_t stream);

// Partials and total. `finalizes`: the last block goes on to what finalize() does.
cudaError_t reduce(const DeviceStep& step, bool finalizes, int blocks, cudaStream_t stream);

cudaError_t finalize(const DeviceStep& step, cudaStream_t stream);

// amsgrad: some group of an AdamW plan uses it.
cudaError_t update(const DeviceStep& step, bool amsgrad, int blocks, cudaStream_t stream);

// Resident blocks of reduce and update on the current device: the size of a persistent grid.
cudaError_t resident_blocks(Rule rule, bool amsgrad, int* reduce_blocks, int* update_blocks);

}  // namespace fusedopt
