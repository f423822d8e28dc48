// The epilogue of a row-parallel layer's all-reduce in one pass.
#include "lanes.h"

namespace tpkernels::CPU_CAPABILITY {

void add_bias_residual(c10::ScalarType dtype, int64_t columns, StridedRows self, const void* bias,
                       StridedRows residual, int64_t row, int64_t last) {
  visit(dtype, [&](auto t) {
    using T = decltype(t);
    for (; row < last; row++) {
      T *y = row_of<T>(self, row), *rest = row_of<T>(residual, row);
      for_each_vector<T>(columns, [&](int64_t i, auto n) {
        store(y + i,
              map(plus, biased(y, static_cast<const Opmath<T>*>(bias), i, n), load(rest + i, n)),
              n);
      });
    }
  });
}

}  // namespace tpkernels::CPU_CAPABILITY
