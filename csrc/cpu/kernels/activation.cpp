// Bias + activation (+ gating) in one pass, and its gradients, the bias' included, in another.
#include <cmath>

#include "lanes.h"

namespace tpkernels::CPU_CAPABILITY {

namespace {

// An activation's value and derivative, which share the costly part.
template <typename V>
struct ValueAndSlope {
  V value, slope;
};

// `value` is 1 / (1 + e^x), `rest` is 1 - value without cancellation.
template <typename V>
struct Logistic {
  V value, rest;
  explicit Logistic(const V& x) {
    const V e = exp(at::vec::clamp_max(x, V(80)));
    value = V(1) / (V(1) + e), rest = e * value;
  }
};

struct Relu {
  template <typename V>
  static V value(const V& x) {
    return at::vec::maximum(x, V(0));
  }
  template <typename V>
  static ValueAndSlope<V> both(const V& x) {
    return {value(x), V::blendv(V(1), V(0), x <= V(0))};
  }
};

struct Relu2 {
  template <typename V>
  static V value(const V& x) {
    const V r = Relu::value(x);
    return r * r;
  }
  template <typename V>
  static ValueAndSlope<V> both(const V& x) {
    const V r = Relu::value(x);
    return {r * r, r + r};
  }
};

struct Silu {
  template <typename V>
  static V value(const V& x) {
    return x / (V(1) + exp(x.neg()));
  }
  template <typename V>
  static ValueAndSlope<V> both(const V& x) {
    const Logistic<V> s(x.neg());
    const V y = x * s.value;
    return {y, at::vec::fmadd(y, s.rest, s.value)};
  }
};

// x Phi(x), where Phi is the normal distribution's function.
struct Gelu {
  static constexpr double SQRT_HALF = 0.70710678118654752440, SLOPE_AT_0 = 0.39894228040143267794;

  // Returns 1 - Phi(|x|), and Phi's slope.
  static ValueAndSlope<Vectorized<double>> tail(const Vectorized<double>& x) {
    using V = Vectorized<double>;
    return {V(0.5) * (x.abs() * V(SQRT_HALF)).erfc(), V(SLOPE_AT_0) * exp(x * x * V(-0.5))};
  }
  // Abramowitz and Stegun 7.1.26: its absolute error is 7.5e-8, and the slope shares its exp.
  static ValueAndSlope<Vectorized<float>> tail(const Vectorized<float>& x) {
    using V = Vectorized<float>;
    const V bell = exp(x * x * V(-0.5f)),
            t = V(1) / at::vec::fmadd(x.abs(), V(0.3275911f * float(SQRT_HALF)), V(1));
    V p = at::vec::fmadd(V(0.5f * 1.061405429f), t, V(0.5f * -1.453152027f));
    p = at::vec::fmadd(p, t, V(0.5f * 1.421413741f));
    p = at::vec::fmadd(p, t, V(0.5f * -0.284496736f));
    p = at::vec::fmadd(p, t, V(0.5f * 0.254829592f));
    return {p * t * bell, V(float(SLOPE_AT_0)) * bell};
  }
  template <typename V>
  static V value(const V& x) {
    // The tail is 0 long before 100; infinity times it were NaN.
    const V limited = at::vec::clamp_max(x.abs(), V(100));
    return at::vec::fnmadd(limited, tail(x).value, at::vec::clamp_min(x, V(0)));
  }
  template <typename V>
  static ValueAndSlope<V> both(const V& x) {
    const auto far = tail(x);
    const V phi = V(0.5) + ((V(0.5) - far.value) | (x & V(-0.0)));  // the sign of x
    return {x * phi, at::vec::fmadd(x, far.slope, phi)};
  }
};

// 0.5 x (1 + tanh(u)) = x sigmoid(2u), 2u = x (A + B x^2)
struct GeluTanh {
  static constexpr double A = 2 * 0.79788456080286535588, B = A * 0.044715;
  template <typename V>
  static V value(const V& x) {
    return x / (V(1) + exp(x * at::vec::fmadd(x * x, V(-B), V(-A))));
  }
  template <typename V>
  static ValueAndSlope<V> both(const V& x) {
    const V square = x * x;
    const Logistic<V> s(x * at::vec::fmadd(square, V(-B), V(-A)));
    const V y = x * s.value;
    return {y, at::vec::fmadd(y * s.rest, at::vec::fmadd(square, V(3 * B), V(A)), s.value)};
  }
};

template <typename F>
void visit_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu:
      return f(Relu());
    case Activation::relu2:
      return f(Relu2());
    case Activation::gelu:
      return f(Gelu());
    case Activation::gelu_tanh:
      return f(GeluTanh());
    case Activation::silu:
      return f(Silu());
  }
}

template <typename F, typename T>
void forward(const ActivationArgs& args, int64_t row, int64_t last) {
  const auto *gate_bias = static_cast<const Opmath<T>*>(args.gate_bias),
             *up_bias = static_cast<const Opmath<T>*>(args.up_bias);
  for (; row < last; row++) {
    const T *gate = row_of<T>(args.gate, row),
            *up = args.up.data ? row_of<T>(args.up, row) : nullptr;
    T* out = row_of<T>(args.out, row);
    for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
      auto y = map([](const auto& v) { return F::value(v); }, biased(gate, gate_bias, i, n));
      if (up) y = map(times, y, biased(up, up_bias, i, n));
      store(out + i, y, n);
    });
  }
}

template <typename F, typename T>
void backward(const ActivationArgs& args, int64_t row, int64_t last, Opmath<T>* bias_grad) {
  const auto *gate_bias = static_cast<const Opmath<T>*>(args.gate_bias),
             *up_bias = static_cast<const Opmath<T>*>(args.up_bias);
  for (; row < last; row++) {
    const T *gate = row_of<T>(args.gate, row),
            *up = args.up.data ? row_of<T>(args.up, row) : nullptr;
    const T* grad = row_of<T>(args.out, row);
    T *gate_grad = row_of<T>(args.gate_grad, row), *up_grad = row_of<T>(args.up_grad, row);
    for_each_vector<T>(args.columns, [&](int64_t i, auto n) {
      const auto x = biased(gate, gate_bias, i, n);
      auto dy = load(grad + i, n);
      Lanes<T> value, slope;
      for (int k = 0; k < Lanes<T>::vectors; k++) {
        const auto both = F::both(x.v[k]);
        value.v[k] = both.value, slope.v[k] = both.slope;
      }
      if (up) {
        const auto dup = map(times, dy, value);
        dy = map(times, dy, biased(up, up_bias, i, n));
        store(up_grad + i, dup, n);
        if (bias_grad) add_opmath<T>(bias_grad + args.columns + i, dup, n);
      }
      const auto dx = map(times, dy, slope);
      store(gate_grad + i, dx, n);
      if (bias_grad) add_opmath<T>(bias_grad + i, dx, n);
    });
  }
}

}  // namespace

void activation_forward(const ActivationArgs& args, int64_t row, int64_t last) {
  visit_activation(args.activation, [&](auto f) {
    visit(args.dtype, [&](auto t) { forward<decltype(f), decltype(t)>(args, row, last); });
  });
}

void activation_backward(const ActivationArgs& args, int64_t row, int64_t last, void* bias_grad) {
  visit_activation(args.activation, [&](auto f) {
    visit(args.dtype, [&](auto t) {
      backward<decltype(f), decltype(t)>(args, row, last,
                                         static_cast<Opmath<decltype(t)>*>(bias_grad));
    });
  });
}

}  // namespace tpkernels::CPU_CAPABILITY
