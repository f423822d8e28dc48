// Rotary position embedding: a step's angles are loaded for all its heads.
#include "lanes.h"

namespace tpkernels::CPU_CAPABILITY {

namespace {

template <typename V>
struct Pair {
  V first, second;
};

template <typename V>
Pair<V> rotate(const V& x1, const V& x2, const V& c, const V& s) {
  return {at::vec::fmadd(x1, c, (x2 * s).neg()), at::vec::fmadd(x2, c, x1 * s)};
}

// Pairs (i, i + half)
template <typename T>
void rotate_halves(const T* x, T* out, const Opmath<T>* cos, const Opmath<T>* sin, bool inverse,
                   int64_t half) {
  for_each_vector<T>(half, [&](int64_t i, auto n) {
    auto x1 = load(x + i, n), x2 = load(x + half + i, n);
    const auto c = load_opmath<T>(cos + i, n), s = load_opmath<T>(sin + i, n);
    for (int k = 0; k < Lanes<T>::vectors; k++) {
      const auto y = rotate(x1.v[k], x2.v[k], c.v[k], inverse ? s.v[k].neg() : s.v[k]);
      x1.v[k] = y.first, x2.v[k] = y.second;
    }
    store(out + i, x1, n);
    store(out + half + i, x2, n);
  });
}

// Pairs (2i, 2i + 1)
template <typename T>
void rotate_interleaved(const T* x, T* out, const Opmath<T>* cos, const Opmath<T>* sin,
                        bool inverse, int64_t half) {
  using V = typename Lanes<T>::V;
  constexpr int64_t size = Lanes<T>::size, pairs = V::size(),
                    loads = 2 / Lanes<T>::vectors;  // of T, to fill two vectors
  for (int64_t i = 0; i < half; i += pairs) {
    const int64_t n = std::min(pairs, half - i);
    V both[2];
    for (int64_t k = 0; k < loads; k++) {
      const auto lanes = load(x + 2 * i + k * size, std::clamp<int64_t>(2 * n - k * size, 0, size));
      std::copy_n(lanes.v, Lanes<T>::vectors, both + k);
    }
    const auto [x1, x2] = at::vec::deinterleave2(both[0], both[1]);
    const V c = V::loadu(cos + i, n), s = V::loadu(sin + i, n);
    const auto y = rotate(x1, x2, c, inverse ? s.neg() : s);
    std::tie(both[0], both[1]) = at::vec::interleave2(y.first, y.second);
    for (int64_t k = 0; k < loads; k++) {
      Lanes<T> lanes;
      std::copy_n(both + k, Lanes<T>::vectors, lanes.v);
      store(out + 2 * i + k * size, lanes, std::clamp<int64_t>(2 * n - k * size, 0, size));
    }
  }
}

template <typename T>
void apply(const RotaryArgs& args, int64_t step, int64_t last) {
  const auto offset = [&](const int64_t* strides, int64_t batch, int64_t t) {
    return batch * strides[0] + t * strides[1];
  };
  for (; step < last; step++) {
    const int64_t batch = step / args.steps, t = step % args.steps,
                  table = batch * args.table_batch_stride + t * args.half;
    const T* x = static_cast<const T*>(args.input) + offset(args.input_strides, batch, t);
    T* out = static_cast<T*>(args.out) + offset(args.out_strides, batch, t);
    const auto *cos = static_cast<const Opmath<T>*>(args.cos) + table,
               *sin = static_cast<const Opmath<T>*>(args.sin) + table;
    for (int64_t head = 0; head < args.heads;
         head++, x += args.input_strides[2], out += args.out_strides[2]) {
      (args.interleaved ? rotate_interleaved<T> : rotate_halves<T>)(x, out, cos, sin, args.inverse,
                                                                    args.half);
      std::copy(x + 2 * args.half, x + args.features, out + 2 * args.half);
    }
  }
}

}  // namespace

void rotary(const RotaryArgs& args, int64_t step, int64_t last) {
  visit(args.dtype, [&](auto t) { apply<decltype(t)>(args, step, last); });
}

}  // namespace tpkernels::CPU_CAPABILITY
