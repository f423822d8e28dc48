// NVLink SHARP, from sm_90 on: the switch makes loads that sum over all ranks and stores that reach
// all of them.
#pragma once

#include "vector.cuh"

namespace tpkernels {

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define TPKERNELS_MULTIMEM(...) __trap()
#else
#define TPKERNELS_MULTIMEM(...) asm volatile(__VA_ARGS__)
#endif

// The sum over the ranks in fp32, rounded to T once, in the switch's order. Ranks agree, since one
// of them reads the sum and shares it, but two runs may differ in the last bit.
template <typename T>
__device__ __forceinline__ Vector<T> multimem_sum(const Vector<T>* address);

#define TPKERNELS_MULTIMEM_SUM(T, type)                                                     \
  template <>                                                                               \
  __device__ __forceinline__ Vector<T> multimem_sum<T>(const Vector<T>* address) {          \
    uint4 bits{};                                                                           \
    TPKERNELS_MULTIMEM("multimem.ld_reduce.relaxed.sys.global.add" type                     \
                       " {%0, %1, %2, %3}, [%4];" : "=r"(bits.x),                           \
                       "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) : "l"(address) : "memory"); \
    return reinterpret_cast<Vector<T>&>(bits);                                              \
  }
TPKERNELS_MULTIMEM_SUM(float, ".v4.f32")
TPKERNELS_MULTIMEM_SUM(__half, ".acc::f32.v4.f16x2")
TPKERNELS_MULTIMEM_SUM(__nv_bfloat16, ".acc::f32.v4.bf16x2")
#undef TPKERNELS_MULTIMEM_SUM

template <typename T>
__device__ __forceinline__ void multimem_store(Vector<T>* address, const Vector<T>& vector) {
  const uint4& bits = reinterpret_cast<const uint4&>(vector);
  TPKERNELS_MULTIMEM("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                     "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w) : "memory");
}
#undef TPKERNELS_MULTIMEM
#else
// The CPU has no switch: the test harness knows whose memory lies behind a multicast address, in an
// order of its own.
template <typename T>
Vector<T> multimem_sum(const Vector<T>* address) {
  float sum[Vector<T>::kSize] = {};
  const simt::Multicast parts = simt::multicast(address);
  for (int i = 0; i < parts.ranks; ++i) {
    const Vector<T> term = load(static_cast<const Vector<T>*>(parts.memory[i]));
    for (int j = 0; j < Vector<T>::kSize; ++j) sum[j] += to_float(term.lanes[j]);
  }
  Vector<T> result;
  for (int j = 0; j < Vector<T>::kSize; ++j) result.lanes[j] = from_float<T>(sum[j]);
  return result;
}

template <typename T>
void multimem_store(Vector<T>* address, const Vector<T>& vector) {
  const simt::Multicast copies = simt::multicast(address);
  for (int i = 0; i < copies.ranks; ++i) store(static_cast<Vector<T>*>(copies.memory[i]), vector);
}
#endif

}  // namespace tpkernels
