// A rank's part of a cross-entropy over a sharded vocabulary: each row of logits is read from
// memory once.
#include <cmath>
#include <limits>

#include "lanes.h"

namespace tpkernels::CPU_CAPABILITY {

namespace {

// A block of columns stays in the first cache between its maximum and its sum of exponentials.
// Blocks are so short that the running sums of a block, and then of the blocks, lose no accuracy to
// their length. Over a vocabulary, torch's single running sum is off by 1e-5.
constexpr int64_t BLOCK = 512;

// Milakov and Gimelshein, "Online normalizer calculation for softmax", a block at a time
template <typename T>
void stats_of(const CrossEntropyArgs& args, int64_t row, int64_t last, int64_t rows,
              Opmath<T>* stats) {
  using W = Opmath<T>;
  using V = typename Lanes<T>::V;
  constexpr W INF = std::numeric_limits<W>::infinity();
  const auto larger = [](const V& a, const V& b) { return at::vec::maximum(a, b); };
  for (; row < last; row++) {
    const T* z = row_of<T>(args.logits, row);
    W max = -INF;
    auto exps = broadcast<T>(0), total = broadcast<T>(0);
    for (int64_t start = 0; start < args.columns; start += BLOCK) {
      const int64_t columns = std::min(BLOCK, args.columns - start);
      auto block_max = broadcast<T>(-INF), block_total = broadcast<T>(0),
           block_exps = broadcast<T>(0);
      for_each_vector<T>(columns, [&](int64_t i, auto n) {
        const auto x = load(z + start + i, n);
        block_max = map(larger, block_max, first(x, n, -INF));
        block_total = map(plus, block_total, x);
      });
      total = map(plus, total, block_total);
      const W top = reduce(larger, block_max);
      if (!(top <= max)) {  // NaN too
        const W rescale = std::exp(max - top);
        exps = map([&](const V& x) { return x * V(rescale); }, exps);
        max = top;
      }
      if (top == -INF) continue;
      for_each_vector<T>(columns, [&](int64_t i, auto n) {
        const auto e = map([&](const V& x) { return exp(x - V(max)); }, load(z + start + i, n));
        block_exps = map(plus, block_exps, first(e, n));
      });
      exps = map(plus, exps, block_exps);
    }
    const int64_t target = args.target[row];
    stats[row] = max;
    stats[rows + row] = reduce_sum(exps);
    stats[2 * rows + row] = target >= 0 && target < args.columns ? static_cast<W>(z[target]) : W(0);
    stats[3 * rows + row] = reduce_sum(total);
  }
}

template <typename T>
void grad_of(const CrossEntropyGradArgs& args, int64_t row, int64_t last) {
  using W = Opmath<T>;
  using V = typename Lanes<T>::V;
  const auto *log_norm = static_cast<const W*>(args.log_norm),
             *scale = static_cast<const W*>(args.scale);
  const V uniform(static_cast<W>(args.smoothing / args.num_classes));
  const V confidence(static_cast<W>(1 - args.smoothing));
  for (; row < last; row++) {
    const T* z = row_of<T>(args.logits, row);
    T* out = row_of<T>(args.grad, row);
    if (scale[row] == 0) {
      std::fill_n(out, args.columns, T(0));
      continue;
    }
    const V norm(log_norm[row]), factor(scale[row]);
    const int64_t target = args.target[row];
    const bool here = target >= 0 && target < args.columns;
    Lanes<T> at_target;
    if (here) at_target = load(z + target, 1);  // now: `out` may be `z`
    const auto slope = [&](const V& x) { return exp(x - norm) - uniform; };
    for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
      store(out + i, map([&](const V& x) { return slope(x) * factor; }, load(z + i, n)), n);
    });
    if (here)
      store(out + target,
            map([&](const V& x) { return (slope(x) - confidence) * factor; }, at_target), 1);
  }
}

}  // namespace

void cross_entropy_stats(const CrossEntropyArgs& args, int64_t row, int64_t last, int64_t rows,
                         void* stats) {
  visit(args.dtype, [&](auto t) {
    stats_of<decltype(t)>(args, row, last, rows, static_cast<Opmath<decltype(t)>*>(stats));
  });
}

void cross_entropy_grad(const CrossEntropyGradArgs& args, int64_t row, int64_t last) {
  visit(args.dtype, [&](auto t) { grad_of<decltype(t)>(args, row, last); });
}

}  // namespace tpkernels::CPU_CAPABILITY
