// Three ranks run random sequences of launches and check every result: what the sanitizers and the
// mutants run. Exit status: 0 right, 1 a wrong result, 2 the ranks hang.
#include <cuda_bf16.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "harness.h"

namespace {
constexpr int kRanks = 3, kLaunches = 8;
constexpr size_t kSlotBytes = 4096;
constexpr int kShapes[][2] = {{1, 1},  {1, 7},   {5, 24},   {4, 19},
                              {7, 40}, {1, 200}, {1, 1017}, {3, 136}};

float to_float(float x) { return x; }
float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
void from_float(float x, float* to) { *to = x; }
void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

struct Tensors {  // of one launch; each rank has its own, exactly as long as it should be
  template <typename T>
  T* make(size_t size) {
    owned.emplace_back(std::malloc(size * sizeof(T)), std::free);
    return static_cast<T*>(owned.back().get());
  }
  std::vector<std::shared_ptr<void>> owned;
};

struct Buffers {  // one set for each shape and type: the arguments of launches repeat
  void *input[kRanks], *output[kRanks], *normed[kRanks];
};

template <typename T>
struct Case {
  Tensors tensors;
  Spec specs[kRanks];
  std::vector<T> expected, expected_normed;

  Case(std::mt19937& rng, int kernel, const int (&shape)[2], int dtype, Buffers& buffers) {
    const auto draw = [&](int n) { return static_cast<int>(rng() % n); };
    const int rows = shape[0], columns = shape[1], blocks = 1 + draw(3), threads = 64,
              terms = draw(8);
    const bool in_place = draw(2);
    const size_t size = static_cast<size_t>(rows) * columns;
    // The switch's order is its own, so sums that it makes must be exact in any order. The others
    // are made to depend on the order.
    const auto value = [&] {
      return kernel == kTwoShotMultimem ? static_cast<float>(draw(7) - 3)
                                        : std::ldexp(static_cast<float>(draw(7) - 3), draw(2) * 24);
    };
    std::vector<float> sum(size);
    std::vector<T> bias(columns), residual(size), weight(columns);
    for (T& x : bias) from_float(draw(7) - 3, &x);
    for (T& x : residual) from_float(draw(7) - 3, &x);
    for (T& x : weight) from_float(draw(7) - 3, &x);
    const auto copy = [&](const std::vector<T>& from) {
      T* to = tensors.make<T>(from.size());
      std::memcpy(to, from.data(), from.size() * sizeof(T));
      return to;
    };
    for (int rank = 0; rank < kRanks; ++rank) {
      std::vector<T> input(size);
      for (size_t i = 0; i < size; ++i) {
        from_float(value(), &input[i]);
        sum[i] = rank == 0 ? to_float(input[i]) : sum[i] + to_float(input[i]);
      }
      Spec& spec = specs[rank];
      spec = {kernel, dtype, terms & 4, blocks, threads, rows, columns, 1e-3f};
      if (terms & 1) spec.bias = copy(bias);
      if (terms & 2) spec.residual = copy(residual);
      spec.weight = copy(weight);
      spec.fresh = copy(input);
      spec.input = buffers.input[rank];
      spec.output = in_place ? spec.input : buffers.output[rank];
      spec.normed = buffers.normed[rank];
      spec.kept_output = tensors.make<T>(size);
      spec.kept_normed = terms & 4 ? tensors.make<T>(size) : nullptr;
    }
    expected.resize(size);
    expected_normed.resize(terms & 4 ? size : 0);
    for (int row = 0; row < rows; ++row) {
      double squares = 0;
      for (int column = 0; column < columns; ++column) {
        const size_t i = static_cast<size_t>(row) * columns + column;
        if (terms & 1) sum[i] += to_float(bias[column]);
        if (terms & 2) sum[i] += to_float(residual[i]);
        from_float(sum[i], &expected[i]);
        squares += static_cast<double>(to_float(expected[i])) * to_float(expected[i]);
      }
      if (!(terms & 4)) continue;
      for (int column = 0; column < columns; ++column) {
        const size_t i = static_cast<size_t>(row) * columns + column;
        from_float(
            to_float(expected[i]) / std::sqrt(squares / columns + 1e-3f) * to_float(weight[column]),
            &expected_normed[i]);
      }
    }
  }

  bool right() const {
    const T* first = static_cast<const T*>(specs[0].kept_normed);
    for (const Spec& spec : specs) {
      const T* output = static_cast<const T*>(spec.kept_output);
      const T* normed = static_cast<const T*>(spec.kept_normed);
      for (size_t i = 0; i < expected.size(); ++i) {
        if (std::memcmp(output + i, &expected[i], sizeof(T)) &&
            !(to_float(output[i]) == 0 && to_float(expected[i]) == 0))
          return false;
      }
      for (size_t i = 0; i < expected_normed.size(); ++i) {
        const float want = to_float(expected_normed[i]);
        if (!(std::fabs(to_float(normed[i]) - want) <=
              1e-6f + std::fabs(want) * (sizeof(T) == 2 ? 0.01f : 1e-5f)))
          return false;
        if (std::memcmp(normed + i, first + i, sizeof(T))) return false;
      }
    }
    return true;
  }
};

template <typename T>
void run(int seed, int dtype) {
  std::mt19937 rng(seed);
  World* world = world_create(kRanks, kSlotBytes, 0xfffffff8u);  // on to more than 32 bits
  Tensors memory;
  Buffers buffers[std::size(kShapes)];
  for (size_t i = 0; i < std::size(kShapes); ++i) {
    const size_t size = static_cast<size_t>(kShapes[i][0]) * kShapes[i][1];
    for (int rank = 0; rank < kRanks; ++rank) {
      buffers[i].input[rank] = memory.make<T>(size);
      buffers[i].output[rank] = memory.make<T>(size);
      buffers[i].normed[rank] = memory.make<T>(size);
    }
  }
  std::vector<Case<T>> cases;
  std::vector<Spec> specs;
  for (int i = 0; i < kLaunches; ++i) {
    const size_t shape = rng() % std::size(kShapes);
    cases.emplace_back(rng, static_cast<int>(rng() % 3), kShapes[shape], dtype, buffers[shape]);
    specs.insert(specs.end(), cases.back().specs, cases.back().specs + kRanks);
  }
  if (!world_run(world, specs.data(), kLaunches, seed, nullptr)) {
    std::printf("seed %d, type %d: the ranks hang\n", seed, dtype);
    std::fflush(stdout);
    _exit(2);
  }
  for (int i = 0; i < kLaunches; ++i) {
    if (cases[i].right()) continue;
    std::printf("seed %d, type %d: launch %d is wrong\n", seed, dtype, i);
    std::fflush(stdout);
    _exit(1);
  }
  world_destroy(world);
}
}  // namespace

int main(int, char** argv) {
  for (int seed = 0; seed < std::atoi(argv[1]); ++seed) {
    run<__nv_bfloat16>(seed, kBfloat16);
    run<float>(seed, kFloat);
  }
  std::puts("right");
}
