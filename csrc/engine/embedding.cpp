// The lookup in an embedding table that is sharded by vocabulary.
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include "../op.h"
#include "channel.h"
#include "comm_buffer.h"

namespace tpkernels {

// Embeddings [..., D] of all ids. This rank holds rows vocab_start_index .. vocab_start_index + V/n
// of the table. Ids of other ranks' rows add zeros to the sum over the ranks.
at::Tensor vocab_embedding(const at::Tensor& ids,     // [...]
                           const at::Tensor& weight,  // [V/n, D]
                           int64_t vocab_start_index, const std::string& group,
                           const std::string& tag) {
  BelowAutograd guard;
  auto local = ids.flatten() - vocab_start_index;
  const auto outside = (local < 0).logical_or_(local >= weight.size(0));
  auto out = empty_comm_buffer({local.size(0), weight.size(1)}, weight.options());
  if (weight.size(0) == 0) {
    out.zero_();
  } else {
    const NvtxRange range(tag, "lookup");
    at::index_select_out(out, weight, 0, local.masked_fill_(outside, 0));
    out.masked_fill_(outside.unsqueeze(1), 0);  // mutant:embedding.mask
  }
  Channel(group, tag).all_reduce(out).wait();  // mutant:embedding.sum
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  return out.view(shape);
}

static void register_embedding(torch::Library& m) { m.impl("vocab_embedding", &vocab_embedding); }

TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { register_embedding(m); }
TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { register_embedding(m); }

}  // namespace tpkernels
