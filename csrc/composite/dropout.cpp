// Dropout whose mask depends on the seed and the element's global row and column alone, on any
// device, in ATen calls.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../op.h"
#include "../philox.h"

namespace tpkernels {

namespace {

constexpr int64_t LOW = 0xFFFFFFFF;

at::Tensor high_half(const at::Tensor& t) { return t.bitwise_right_shift(32).bitwise_and_(LOW); }

// Returns random 32-bit numbers in int64: [rows, columns]. An element is lane column % 4 of counter
// (column / 4, row's low half, row's high half, 0).
at::Tensor random_bits(const at::Tensor& seed, int64_t row, int64_t rows, int64_t column,
                       int64_t columns) {
  const auto options = seed.options().dtype(at::kLong);
  const int64_t group = column / 4, groups = (column + columns + 3) / 4 - group;
  const auto r = at::arange(row, row + rows, options).unsqueeze_(1);
  at::Tensor counter[4] = {at::arange(group, group + groups, options).bitwise_and_(LOW),
                           r.bitwise_and(LOW), high_half(r), at::zeros({}, options)};
  const auto s = seed.reshape({});
  at::Tensor key[2] = {s.bitwise_and(LOW), high_half(s)};
  for (int round = 0; round < philox::ROUNDS; round++) {
    // int64 products wrap, as do the low 64 bits of the unsigned ones.
    const auto left = counter[0] * static_cast<int64_t>(philox::MULTIPLIER[0]);
    const auto right = counter[2] * static_cast<int64_t>(philox::MULTIPLIER[1]);
    counter[0] = high_half(right).bitwise_xor(counter[1]).bitwise_xor(key[0]);
    counter[1] = right.bitwise_and(LOW);
    counter[2] = high_half(left).bitwise_xor(counter[3]).bitwise_xor(key[1]);
    counter[3] = left.bitwise_and(LOW);
    for (int i = 0; i < 2; i++)
      key[i] = key[i].add(static_cast<int64_t>(philox::KEY_STEP[i])).bitwise_and_(LOW);
  }
  for (auto& lane : counter) lane = lane.expand({rows, groups});
  return at::stack(counter, -1).flatten(1).narrow(1, column - 4 * group, columns);
}

at::Tensor dropout(const at::Tensor& input, const at::Tensor& seed, double p, int64_t row,
                   int64_t column) {
  BelowAutograd guard;
  const auto opmath = at::toOpMathType(input.scalar_type());
  const auto bits =
      random_bits(seed, row, rows_of(input), column, input.size(-1)).view(input.sizes());
  const auto kept = bits.ge(static_cast<int64_t>(philox::dropout_threshold(p)));
  return at::where(kept, input.to(opmath) * (1 / (1 - p)), 0).to(input.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) { m.impl("dropout", &dropout); }

}  // namespace tpkernels
