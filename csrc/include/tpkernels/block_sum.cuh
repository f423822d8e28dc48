#pragma once

#include "platform.cuh"

namespace tpkernels {

constexpr int kWarp = 32;

// The sum over the block, the same bits in every thread. All threads call it, and they make whole
// warps.
__device__ __forceinline__ float block_sum(float x) {
  float* const sums = shared_array<float, 1024 / kWarp>();
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0.f;
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums[warp];
  __syncthreads();  // the next row's sums go into the same words
  return total;
}

}  // namespace tpkernels
