// Residual add + LayerNorm or RMSNorm of a row while it is in cache, and the gradients.
#include <cmath>

#include "lanes.h"

namespace tpkernels::CPU_CAPABILITY {

namespace {

constexpr auto square_add = [](const auto& x, const auto& sum) {
  return at::vec::fmadd(x, x, sum);
};

template <typename T>
void forward(const NormArgs& args, int64_t row, int64_t last) {
  using W = Opmath<T>;
  using V = typename Lanes<T>::V;
  const auto *weight = static_cast<const W*>(args.weight), *bias = static_cast<const W*>(args.bias);
  const W count = args.columns;
  for (; row < last; row++) {
    const T* h = row_of<T>(args.input, row);
    const T* residual = args.residual.data ? row_of<T>(args.residual, row) : nullptr;
    T *sum = residual ? row_of<T>(args.sum, row) : nullptr, *out = row_of<T>(args.out, row);
    auto total = broadcast<T>(0);
    for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
      auto x = load(h + i, n);
      if (residual) {
        store(sum + i, map(plus, x, load(residual + i, n)), n);
        x = load(sum + i, n);  // rounded
      }
      total = args.rms ? map(square_add, x, total) : map(plus, x, total);
    });
    if (residual) h = sum;
    W mean = 0, variance = reduce_sum(total) / count;
    if (!args.rms) {
      mean = variance;
      total = broadcast<T>(0);
      for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
        const auto centred = map([&](const V& x) { return x - V(mean); }, load(h + i, n));
        total = map(square_add, first(centred, n), total);
      });
      variance = reduce_sum(total) / count;
      static_cast<W*>(args.mean)[row] = mean;
    }
    const W rstd = 1 / std::sqrt(variance + static_cast<W>(args.eps));
    static_cast<W*>(args.rstd)[row] = rstd;
    for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
      auto y = map([&](const V& x) { return (x - V(mean)) * V(rstd); }, load(h + i, n));
      if (weight) y = map(times, y, load_opmath<T>(weight + i, n));
      if (bias) y = map(plus, y, load_opmath<T>(bias + i, n));
      store(out + i, y, n);
    });
  }
}

template <typename T>
void backward(const NormBackwardArgs& args, int64_t row, int64_t last, Opmath<T>* param_grads) {
  using W = Opmath<T>;
  using V = typename Lanes<T>::V;
  const auto* weight = static_cast<const W*>(args.weight);
  const W count = args.columns;
  for (; row < last; row++) {
    const T *grad = row_of<T>(args.grad, row), *h = row_of<T>(args.sum, row);
    const T* grad_sum = args.grad_sum.data ? row_of<T>(args.grad_sum, row) : nullptr;
    T* input_grad = row_of<T>(args.input_grad, row);
    const V mean(args.rms ? 0 : static_cast<const W*>(args.mean)[row]),
        rstd(static_cast<const W*>(args.rstd)[row]);
    const auto normed = [&](const V& x) { return (x - mean) * rstd; };
    // The sums of the normed row's gradient times the row, and of the gradient.
    auto along = broadcast<T>(0), total = broadcast<T>(0);
    for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
      const auto dy = load(grad + i, n), x = map(normed, load(h + i, n)),
                 product = map(times, dy, x);
      if (param_grads) {
        add_opmath<T>(param_grads + i, product, n);
        add_opmath<T>(param_grads + args.columns + i, dy, n);
      }
      const auto dx = weight ? map(times, dy, load_opmath<T>(weight + i, n)) : dy;
      along = map([](const V& a, const V& b, const V& c) { return at::vec::fmadd(a, b, c); }, dx, x,
                  along);
      total = map(plus, total, dx);
    });
    const V slope(reduce_sum(along) / count), shift(args.rms ? 0 : reduce_sum(total) / count);
    for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
      auto dx = load(grad + i, n);
      if (weight) dx = map(times, dx, load_opmath<T>(weight + i, n));
      dx = map([&](const V& d, const V& x) { return (d - normed(x) * slope - shift) * rstd; }, dx,
               load(h + i, n));
      if (grad_sum) dx = map(plus, dx, load(grad_sum + i, n));
      store(input_grad + i, dx, n);
    });
  }
}

}  // namespace

void norm_forward(const NormArgs& args, int64_t row, int64_t last) {
  visit(args.dtype, [&](auto t) { forward<decltype(t)>(args, row, last); });
}

void norm_backward(const NormBackwardArgs& args, int64_t row, int64_t last, void* param_grads) {
  visit(args.dtype, [&](auto t) {
    backward<decltype(t)>(args, row, last, static_cast<Opmath<decltype(t)>*>(param_grads));
  });
}

}  // namespace tpkernels::CPU_CAPABILITY
