// CUDA kernels on the CPU, for tests: every thread of every block of every rank is a fiber, and one
// OS thread runs them all in an order that a seed picks. All blocks are resident at once.
// ThreadSanitizer sees only the happens-before that CUDA promises:
// __syncthreads, release -> acquire, and the order of a rank's stream.
#pragma once

#include <cuda_fp16.h>  // and with it the vector types

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#undef __global__
#undef __host__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

struct Thread {
  uint3 thread_index, block_index;
  dim3 block_dim, grid_dim;
};
extern Thread* current;

void syncthreads();
float shuffle_xor(unsigned mask, float value, int lane_mask);
void* shared_memory(const void* key, size_t bytes);  // the block's, one piece for each key

void preempt();         // here another thread may run
void stored();          // a flag was stored: those who wait look again
void wait_for_store();  // until the next flag is stored, anywhere

// The ranks' memory behind an address of the multicast range, in an order that changes from call to
// call, as a switch's may.
struct Multicast {
  void* memory[8];
  int ranks;
};
Multicast multicast(const void* address);
void set_multicast(const char* base, size_t bytes, const std::vector<char*>& ranks);

struct Launch {
  int blocks, threads;
  std::function<void()> body;
};

struct Outcome {
  bool finished;   // false: every thread that is left waits for something that will not come
  uint64_t trace;  // hash of the order in which threads ran
};

// Runs each rank's launches in order, all ranks side by side.
Outcome run(const std::vector<std::vector<Launch>>& streams, uint64_t seed);

}  // namespace simt

#define threadIdx (simt::current->thread_index)
#define blockIdx (simt::current->block_index)
#define blockDim (simt::current->block_dim)
#define gridDim (simt::current->grid_dim)
#define __syncthreads() simt::syncthreads()
#define __shfl_xor_sync(mask, value, lane_mask) simt::shuffle_xor(mask, value, lane_mask)

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
