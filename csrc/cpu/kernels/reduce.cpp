// The sum (or extreme) of the ranks' terms, in rank order.
#include "lanes.h"

namespace tpkernels::CPU_CAPABILITY {

namespace {

struct Sum {
  template <typename V>
  V operator()(const V& a, const V& b) const {
    return a + b;
  }
};

struct Max {
  template <typename V>
  V operator()(const V& a, const V& b) const {
    return at::vec::maximum(a, b);
  }
};

struct Min {
  template <typename V>
  V operator()(const V& a, const V& b) const {
    return at::vec::minimum(a, b);
  }
};

// Reduces `count` elements from `offset` on. kTerms is the number of terms, or 0 for any.
// finish(x, i, n) is the epilogue, before the rounding.
template <typename T, int kTerms, typename Op, typename F>
void reduce_span(const ReduceArgs& args, int64_t offset, int64_t count, const Op& op,
                 const F& finish) {
  const int terms = kTerms ? kTerms : args.num_terms;
  const T* term[kTerms ? kTerms : 1];
  if constexpr (kTerms)
    for (int r = 0; r < kTerms; r++) term[r] = reinterpret_cast<const T*>(args.terms[r]) + offset;
  T* out = static_cast<T*>(args.out) + offset;
  const auto at = [&](int r) {
    if constexpr (kTerms) return term[r];
    return reinterpret_cast<const T*>(args.terms[r]) + offset;
  };
  for_each_vector<T>(count, [&](int64_t i, auto n) {
    auto x = load(at(0) + i, n);
    for (int r = 1; r < terms; r++) x = map(op, x, load(at(r) + i, n));
    store(out + i, finish(x, i, n), n);
  });
}

template <typename T, typename Op, typename F>
void reduce_span(const ReduceArgs& args, int64_t offset, int64_t count, const Op& op,
                 const F& finish) {
  switch (args.num_terms) {
    case 2:
      return reduce_span<T, 2>(args, offset, count, op, finish);
    case 3:
      return reduce_span<T, 3>(args, offset, count, op, finish);
    case 4:
      return reduce_span<T, 4>(args, offset, count, op, finish);
    default:
      return reduce_span<T, 0>(args, offset, count, op, finish);
  }
}

template <typename T>
void reduce_of(const ReduceArgs& args, int64_t begin, int64_t end) {
  const auto as_is = [](const auto& x, int64_t, auto) { return x; };
  switch (args.reduction) {
    case Reduction::max:
      return reduce_span<T>(args, begin, end - begin, Max(), as_is);
    case Reduction::min:
      return reduce_span<T>(args, begin, end - begin, Min(), as_is);
    case Reduction::sum:
      return reduce_span<T>(args, begin, end - begin, Sum(), as_is);
    case Reduction::mean:
      if constexpr (!std::is_integral_v<T>) {
        const auto ranks = broadcast<T>(static_cast<Opmath<T>>(args.num_terms));
        return reduce_span<T>(args, begin, end - begin, Sum(), [&](const auto& x, int64_t, auto) {
          return map([](const auto& a, const auto& b) { return a / b; }, x, ranks);
        });
      }
  }
}

}  // namespace

void reduce_terms(const ReduceArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case c10::ScalarType::Byte:
      return reduce_of<uint8_t>(args, begin, end);
    case c10::ScalarType::Char:
      return reduce_of<int8_t>(args, begin, end);
    case c10::ScalarType::Short:
      return reduce_of<int16_t>(args, begin, end);
    case c10::ScalarType::Int:
      return reduce_of<int32_t>(args, begin, end);
    case c10::ScalarType::Long:
      return reduce_of<int64_t>(args, begin, end);
    default:
      visit(args.dtype, [&](auto t) { reduce_of<decltype(t)>(args, begin, end); });
  }
}

void sum_rows(const ReduceArgs& args, int64_t row, int64_t last) {
  visit(args.dtype, [&](auto t) {
    using T = decltype(t);
    const T* bias = static_cast<const T*>(args.bias);
    for (; row < last; row++) {
      const T* residual = row_of<T>(args.residual, row);
      reduce_span<T>(args, row * args.columns, args.columns, Sum(), [&](auto x, int64_t i, auto n) {
        if (bias) x = map(Sum(), x, load(bias + i, n));
        if (args.residual.data) x = map(Sum(), x, load(residual + i, n));
        return x;
      });
    }
  });
}

}  // namespace tpkernels::CPU_CAPABILITY
