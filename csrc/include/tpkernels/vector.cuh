// 16 bytes of a tensor: every kernel reads and writes memory in these.
#pragma once

#include "platform.cuh"

namespace tpkernels {

constexpr int kVectorBytes = 16;

template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T lanes[kSize];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

// Loads the first `count` elements at `address`, then zeros. Where rows or tensors begin off a
// 16-byte boundary, it goes element by element.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* address, int count) {
  if (count == Vector<T>::kSize && is_aligned(address))
    return load(reinterpret_cast<const Vector<T>*>(address));
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i)
    vector.lanes[i] = i < count ? load(address + i) : from_float<T>(0.f);
  return vector;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& vector, int count) {
  if (count == Vector<T>::kSize && is_aligned(address))
    return store(reinterpret_cast<Vector<T>*>(address), vector);
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (i < count) store(address + i, vector.lanes[i]);
  }
}

// Sums vectors in float32.
template <typename T>
struct Accumulator {
  float lanes[Vector<T>::kSize];

  __device__ __forceinline__ explicit Accumulator(const Vector<T>& vector) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) lanes[i] = to_float(vector.lanes[i]);
  }

  __device__ __forceinline__ void add(const Vector<T>& vector) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) lanes[i] += to_float(vector.lanes[i]);
  }

  __device__ __forceinline__ Vector<T> round() const {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) vector.lanes[i] = from_float<T>(lanes[i]);
    return vector;
  }
};

}  // namespace tpkernels
