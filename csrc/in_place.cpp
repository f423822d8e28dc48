// Version counters of the ops that write to their first tensor. Autograd compares them: a backward
// whose saved tensor has been written to raises, where it would otherwise compute with the new
// values.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "op.h"

namespace tpkernels {

namespace {

template <OpName Name, typename Written, typename... Args>
struct CountedOp {
  static void call(c10::DispatchKeySet keys, Written written, Args... args) {
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      typed_op<Name, void(Written, Args...)>().redispatch(keys & c10::after_ADInplaceOrView_keyset,
                                                          written, args...);
    }
    written.unsafeGetTensorImpl()->bump_version();
  }
};

template <OpName Name, typename... Args>
void count_write(torch::Library& m) {
  m.impl(Name.text, &CountedOp<Name, Args...>::call);
}

using Tensor = const at::Tensor&;

TORCH_LIBRARY_IMPL(tpkernels, ADInplaceOrView, m) {
  count_write<"tpkernels::all_reduce_", at::Tensor&, const std::string&, const std::string&,
              const std::string&>(m);
  count_write<"tpkernels::add_bias_residual_", Tensor, Tensor, Tensor>(m);
  count_write<"tpkernels::vocab_ce_grad_", Tensor, Tensor, Tensor, Tensor, int64_t, double,
              int64_t>(m);
}

}  // namespace

}  // namespace tpkernels
