// Hides the differences between nvcc and the CPU (tests/proofs/device/simt): nothing else in these
// headers asks which of the two compiles it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#ifndef __CUDACC__
#include "simt.h"
#endif

namespace tpkernels {

// Counts the barriers of a buffer's life. 64 bits never wrap: with 32, a flag of a lane that no
// grid used for 2^31 epochs would pass for one that is ahead.
using Epoch = uint64_t;

// A release makes this thread's writes, and those it knows of from a __syncthreads, visible to
// whoever acquires it. The scope is the system's: that may be another GPU of the node. A plain
// store, unlike an atomic, needs no native peer atomics.
__device__ __forceinline__ void store_release(Epoch* flag, Epoch value) {
#ifdef __CUDACC__
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
#else
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  simt::stored();
#endif
}

__device__ __forceinline__ Epoch load_acquire(Epoch* flag) {
#ifdef __CUDACC__
  Epoch value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
#else
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
#endif
}

// The body of a loop that waits for a flag.
__device__ __forceinline__ void spin() {
#ifndef __CUDACC__
  simt::wait_for_store();
#endif
}

// All reads of tensors and of peers' memory. On the host the const is cast away because GCC's
// ThreadSanitizer does not look at reads through pointers to const; on the GPU these are plain
// loads, never ld.global.nc: a peer writes what they read.
template <typename V>
__device__ __forceinline__ V load(const V* address) {
#ifdef __CUDACC__
  return *address;
#else
  simt::preempt();
  return *const_cast<V*>(address);
#endif
}

template <typename V>
__device__ __forceinline__ void store(V* address, const V& value) {
#ifndef __CUDACC__
  simt::preempt();
#endif
  *address = value;
}

// The block's shared memory. Each <V, kSize> is one array, whoever asks for it.
template <typename V, int kSize>
__device__ __forceinline__ V* shared_array() {
#ifdef __CUDACC__
  __shared__ V array[kSize];
  return array;
#else
  static char key;
  return static_cast<V*>(simt::shared_memory(&key, sizeof(V) * kSize));
#endif
}

}  // namespace tpkernels
