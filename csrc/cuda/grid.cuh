// How kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include "access.cuh"

namespace fusedopt {
namespace {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// As many blocks as there is work for, one at least.
int grid(int64_t chunks, int chunks_per_block, int most) {
  const int64_t wanted = (chunks + chunks_per_block - 1) / chunks_per_block;
  return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace
}  // namespace fusedopt
