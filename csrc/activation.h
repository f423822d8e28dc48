// The activations, and their names in Python.
#pragma once

#include <c10/util/Exception.h>

#include <string_view>

namespace tpkernels {

enum class Activation { relu, relu2, gelu, gelu_tanh, silu };

struct NamedActivation {
  Activation function;
  bool gated;  // function(gate) * up
};

inline NamedActivation parse_activation(std::string_view name) {
  if (name == "relu") return {Activation::relu, false};
  if (name == "relu2") return {Activation::relu2, false};
  if (name == "gelu") return {Activation::gelu, false};
  if (name == "gelu_tanh") return {Activation::gelu_tanh, false};
  if (name == "silu") return {Activation::silu, false};
  if (name == "swiglu") return {Activation::silu, true};
  if (name == "geglu") return {Activation::gelu, true};
  TORCH_CHECK_VALUE(
      false, "activation must be one of relu, relu2, gelu, gelu_tanh, silu, swiglu, geglu, got '",
      name, "'");
}

}  // namespace tpkernels
