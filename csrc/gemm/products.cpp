#include "products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <vector>

namespace tpkernels {

namespace {

// oneDNN sums all of K in one running float32 sum, whose error is two to three times that of MKL's,
// which is summed in blocks. A model amplifies it (SmolLM2's gradients by 100). So where a gradient
// is wanted, products are sums of blocks of this many terms here too.
constexpr int64_t BLOCK_K = 320;
// Elements of a block of rows of such a product: the caches keep it from one addition to the next.
constexpr int64_t CACHED = 1 << 20;
// With fewer rows, copying the other operand in blocks costs as much as the product.
constexpr int64_t FEW_ROWS = 32;

// Anything but a whole matrix or its transpose, oneDNN multiplies with its reference code, a
// thousand times slower.
at::Tensor dense(const at::Tensor& t) {
  if (t.is_mkldnn() || t.is_contiguous() || t.t().is_contiguous()) return t;
  if (t.stride(0) == 1) return t.t().contiguous().t();
  return t.contiguous();
}

at::Tensor onednn_in_blocks(const at::Tensor& a, const at::Tensor& b_t,
                            const std::optional<at::Tensor>& bias) {
  const int64_t m = a.size(0), k = a.size(1), n = b_t.size(0);
  const int64_t num_blocks = (k + BLOCK_K - 1) / BLOCK_K;
  const int64_t block_k = (k / num_blocks + 63) / 64 * 64;
  const int64_t block_m = std::max<int64_t>(CACHED / n, 64);
  std::vector<at::Tensor> blocks;
  for (int64_t begin = 0; begin < k; begin += block_k)
    blocks.push_back(dense(b_t.narrow(1, begin, std::min(block_k, k - begin))));
  auto out = at::empty({m, n}, a.options());
  for (int64_t begin = 0; begin < m; begin += block_m) {
    const auto a_rows = a.narrow(0, begin, std::min(block_m, m - begin));
    auto total = out.narrow(0, begin, a_rows.size(0));
    for (size_t i = 0; i < blocks.size(); i++) {
      const auto a_block =
          dense(a_rows.narrow(1, static_cast<int64_t>(i) * block_k, blocks[i].size(1)));
      if (i == 0) {
        total.copy_(onednn_linear(a_block, blocks[i], bias));
      } else {
        total.add_(onednn_linear(a_block, blocks[i], std::nullopt));
      }
    }
  }
  return out;
}

}  // namespace

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b_t,
                    const std::optional<at::Tensor>& bias, const Gemm& gemm, bool grad) {
  const bool in_blocks = grad && !gemm.opmath && a.size(1) > BLOCK_K;
  const bool too_few_rows = in_blocks && a.size(0) < FEW_ROWS && b_t.is_contiguous();
  if (gemm.library == GemmLibrary::onednn && !too_few_rows) {
    if (in_blocks) return onednn_in_blocks(a, b_t, bias);
    return onednn_linear(dense(a), dense(b_t), bias);
  }
  if (bias) return at::addmm(*bias, a, b_t.t());
  return at::mm(a, b_t.t());
}

}  // namespace tpkernels
