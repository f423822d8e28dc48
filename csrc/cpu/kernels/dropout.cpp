// Dropout by counter-based random numbers: the mask is computed where it is used, forward and
// backward.
#include "../../philox.h"
#include "lanes.h"

namespace tpkernels::CPU_CAPABILITY {

namespace {

// So many counters are computed at a time; each gives four columns. The loops over them are left to
// the compiler, which vectorises loops of more than 16 rounds and unrolls shorter ones.
constexpr int GROUPS = 32, SPAN = 4 * GROUPS;

// bits[i]: the random bits of column 4 * group + i
void random_bits(uint64_t seed, uint64_t row, uint64_t group, uint32_t* bits) {
  uint32_t c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
  for (int i = 0; i < GROUPS; i++) {
    c0[i] = static_cast<uint32_t>(group) + i;
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(row >> 32);
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox::ROUNDS; round++) {
    for (int i = 0; i < GROUPS; i++) {
      const uint64_t left = static_cast<uint64_t>(philox::MULTIPLIER[0]) * c0[i],
                     right = static_cast<uint64_t>(philox::MULTIPLIER[1]) * c2[i];
      c0[i] = static_cast<uint32_t>(right >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(right);
      c2[i] = static_cast<uint32_t>(left >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(left);
    }
    k0 += philox::KEY_STEP[0], k1 += philox::KEY_STEP[1];
  }
  for (int i = 0; i < GROUPS; i++) {
    bits[4 * i] = c0[i];
    bits[4 * i + 1] = c1[i];
    bits[4 * i + 2] = c2[i];
    bits[4 * i + 3] = c3[i];
  }
}

template <typename T>
void apply(const DropoutArgs& args, int64_t row, int64_t last) {
  using W = Opmath<T>;
  using V = typename Lanes<T>::V;
  using Mask = std::conditional_t<sizeof(W) == 8, int64_t, int32_t>;
  const V scale(static_cast<W>(args.scale));
  uint32_t bits[SPAN];
  Mask kept[SPAN];
  for (; row < last; row++) {
    const T* x = row_of<T>(args.input, row);
    T* out = row_of<T>(args.out, row);
    int64_t skip = args.column % 4;  // columns of the first counter that lie before the tensor's
    for (int64_t start = 0; start < args.columns;) {
      random_bits(args.seed, args.row + row, (args.column + start) / 4, bits);
      for (int i = 0; i < SPAN; i++) kept[i] = bits[i] >= args.threshold ? -1 : 0;
      const int64_t columns = std::min(SPAN - skip, args.columns - start);
      for_each_vector<T>(columns, [&](int64_t i, auto n) {
        const auto mask = load_opmath<T>(reinterpret_cast<const W*>(kept + skip + i), n);
        store(out + start + i,
              map([&](const V& v, const V& m) { return (v * scale) & m; }, load(x + start + i, n),
                  mask),
              n);
      });
      start += columns;
      skip = 0;
    }
  }
}

}  // namespace

void dropout(const DropoutArgs& args, int64_t row, int64_t last) {
  visit(args.dtype, [&](auto t) { apply<decltype(t)>(args, row, last); });
}

}  // namespace tpkernels::CPU_CAPABILITY
