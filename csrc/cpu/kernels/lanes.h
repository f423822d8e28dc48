// at::vec for kernels that compute in a wider dtype (opmath) than they store. Lanes<T> holds the
// elements of one vector of T, in opmath.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "../kernels.h"

namespace tpkernels::CPU_CAPABILITY {

using at::vec::Vectorized;

template <typename T>
using Opmath = at::opmath_type<T>;

template <typename T>
struct Lanes {
  using V = Vectorized<Opmath<T>>;
  static constexpr int size = Vectorized<T>::size(), vectors = size / V::size();
  V v[vectors];
};

// Loads the first n elements at p. The other lanes are 0.
template <typename T>
inline Lanes<T> load(const T* p, int64_t n) {
  if constexpr (std::is_same_v<T, Opmath<T>>) {
    return {{Vectorized<T>::loadu(p, n)}};
  } else {
    const auto [a, b] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(p, n));
    return {{a, b}};
  }
}

template <typename T>
inline void store(T* p, const Lanes<T>& x, int64_t n) {
  if constexpr (std::is_same_v<T, Opmath<T>>) {
    x.v[0].store(p, n);
  } else {
    at::vec::convert_from_float<T>(x.v[0], x.v[1]).store(p, n);
  }
}

// Loads as many lanes as T has, from memory that is in opmath already.
template <typename T>
inline Lanes<T> load_opmath(const Opmath<T>* p, int64_t n) {
  constexpr int64_t step = Lanes<T>::V::size();
  Lanes<T> x;
  for (int k = 0; k < Lanes<T>::vectors; k++)
    x.v[k] = Lanes<T>::V::loadu(p + k * step, std::clamp<int64_t>(n - k * step, 0, step));
  return x;
}

template <typename T>
inline void add_opmath(Opmath<T>* p, const Lanes<T>& x, int64_t n) {
  constexpr int64_t step = Lanes<T>::V::size();
  for (int k = 0; k < Lanes<T>::vectors; k++) {
    const int64_t count = std::clamp<int64_t>(n - k * step, 0, step);
    (Lanes<T>::V::loadu(p + k * step, count) + x.v[k]).store(p + k * step, count);
  }
}

// Returns the first n lanes of x, and `rest` in the others.
template <typename T>
inline Lanes<T> first(const Lanes<T>& x, int64_t n, Opmath<T> rest = 0) {
  constexpr int64_t step = Lanes<T>::V::size();
  if (n == Lanes<T>::size) return x;
  Lanes<T> out;
  for (int k = 0; k < Lanes<T>::vectors; k++)
    out.v[k] = Lanes<T>::V::set(typename Lanes<T>::V(rest), x.v[k],
                                std::clamp<int64_t>(n - k * step, 0, step));
  return out;
}

// Applies f to each vector of the arguments.
template <typename T, typename F, typename... Args>
inline Lanes<T> map(const F& f, const Lanes<T>& x, const Args&... args) {
  Lanes<T> out;
  for (int k = 0; k < Lanes<T>::vectors; k++) out.v[k] = f(x.v[k], args.v[k]...);
  return out;
}

inline constexpr auto plus = [](const auto& a, const auto& b) { return a + b; };
inline constexpr auto times = [](const auto& a, const auto& b) { return a * b; };

// x[i .. i + n] + bias[i .. i + n], if there is a bias
template <typename T>
inline Lanes<T> biased(const T* x, const Opmath<T>* bias, int64_t i, int64_t n) {
  const auto lanes = load(x + i, n);
  return bias ? map(plus, lanes, load_opmath<T>(bias + i, n)) : lanes;
}

template <typename T, typename F>
inline Opmath<T> reduce(const F& f, const Lanes<T>& x) {
  auto v = x.v[0];
  if constexpr (Lanes<T>::vectors == 2) v = f(v, x.v[1]);
  return at::vec::vec_reduce_all<Opmath<T>>(f, v);
}

template <typename T>
inline Opmath<T> reduce_sum(const Lanes<T>& x) {
  return reduce([](const auto& a, const auto& b) { return a + b; }, x);
}

template <typename T>
inline Lanes<T> broadcast(Opmath<T> value) {
  Lanes<T> out;
  for (auto& v : out.v) v = typename Lanes<T>::V(value);
  return out;
}

// Calls f(i, n) for each i where a vector of T starts in [0, columns). The vector uses n lanes: a
// constant of its type, but for the last.
template <typename T, typename F>
inline void for_each_vector(int64_t columns, const F& f) {
  constexpr std::integral_constant<int64_t, Lanes<T>::size> step;
  int64_t i = 0;
  for (; i + step <= columns; i += step) f(i, step);
  if (i < columns) f(i, columns - i);
}

template <typename T>
inline T* row_of(const StridedRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// Calls f(T()) for the dtype's T.
template <typename F>
inline void visit(c10::ScalarType dtype, const F& f) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return f(float());
    case c10::ScalarType::Double:
      return f(double());
    case c10::ScalarType::Half:
      return f(c10::Half());
    default:
      return f(c10::BFloat16());
  }
}

inline Vectorized<double> exp(const Vectorized<double>& x) { return x.exp(); }

// 2^n e^r with |r| <= ln(2) / 2. The relative error is below 2^-23; below -87 the result is 0
// (never subnormal). at::vec's own calls a library.
inline Vectorized<float> exp(const Vectorized<float>& x) {
  using V = Vectorized<float>;
  using I = Vectorized<int32_t>;
  const V round(12582912.0f);  // 1.5 * 2^23: added, it leaves n in the low bits
  const V limited = at::vec::clamp(x, V(-87.6f), V(88.8f));
  const V shifted = at::vec::fmadd(limited, V(1.44269504088896341f), round), n = shifted - round;
  // ln(2) in two parts, n times the first of which is exact
  const V r = at::vec::fnmadd(n, V(-2.12194440e-4f), at::vec::fnmadd(n, V(0.693359375f), limited));
  // (e^r - 1 - r) / r^2, fitted at Chebyshev nodes
  V q = at::vec::fmadd(V(1.3933733571320772e-3f), r, V(8.363235741853714e-3f));
  q = at::vec::fmadd(q, r, V(4.1666463017463684e-2f));
  q = at::vec::fmadd(q, r, V(0.16666576266288757f));
  q = at::vec::fmadd(q, r, V(0.5f));
  const V e = at::vec::fmadd(r * r, q, r) + V(1.0f);
  // 2^(n-1), so that n = 128 does not overflow
  const I exponent = (at::vec::cast<int32_t>(shifted) << I(23)) + I(126 << 23);
  return (e + e) * at::vec::cast<float>(exponent);
}

}  // namespace tpkernels::CPU_CAPABILITY
