#include "gemm.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <limits>
#if defined(__x86_64__) && defined(__GNUC__)
#include <ATen/Version.h>
#include <cpuid.h>
#endif

#include "../op.h"

namespace tpkernels {

namespace {

struct Rows {
  int64_t first, last;
  bool hold(int64_t rows) const { return first <= rows && rows <= last; }
};
constexpr int64_t ANY = std::numeric_limits<int64_t>::max();
constexpr Rows NONE{1, 0};

// Weights of fewer elements are left to at::mm: their products take a few microseconds, as another op does.
constexpr int64_t SMALL = 1 << 16;

// From how many rows on, and up to how many, what else pays for a weight of one dtype.
struct Crossovers {
  bool wide = false;                // the arithmetic is float32's
  Library library = Library::aten;  // of unpacked products
  Rows rows = NONE;                 // of unpacked products that are wide, or another library's
  Library packs = Library::aten;    // of packed ones
  Rows packed = NONE;
};

#if defined(__x86_64__) && defined(__GNUC__)
struct Machine {
  bool intel, amx, avx512, avx512_bf16, avx512_fp16;
  Machine() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __get_cpuid(0, &a, &b, &c, &d);
    intel = b == signature_INTEL_ebx;
    a = b = c = d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    avx512 = at::get_cpu_capability() == "AVX512";  // the operating system's and ATEN_CPU_CAPABILITY's word counts too
    amx = avx512 && (d >> 22 & 1) && (d >> 24 & 1);
    avx512_fp16 = avx512 && (d >> 23 & 1);
    a = 0;
    __get_cpuid_count(7, 1, &a, &b, &c, &d);
    avx512_bf16 = avx512 && (a >> 5 & 1);
  }
};

// One thread, weights [2048, 1024], [1024, 2048] and [4096, 1024], time of F.linear / time, torch 2.13.
//
// AMD Zen 5, where MKL takes its AVX2 code (95 of 240 GFLOP/s) and oneDNN does not (float32 200, bfloat16 410):
//   rows                            1     2     4     16    64    128   256   512
//   float32, oneDNN                 1.0   0.8   1.5   1.8   2.1   2.2   2.3   2.2
//   float32, oneDNN packed          1.2   2.2   4.0   2.8   2.5   2.3   2.4   2.3
//   bfloat16, oneDNN packed         2.0   2.0   2.0   1.4   1.1   1.05  1.04  1.04
//   float16, wide, oneDNN packed    0.9   1.9   3.8   7.0   8.0   (plain float16 runs at 26 GFLOP/s)
// Gradients in float32: oneDNN 1.3x (by dy) and 3.9x (by weight) of at::mm at 4 rows, 1.5x and 1.9x at 16, 2.0x and 2.2x at 512.
//
// Intel with AVX512_BF16 and no AMX (or none that the virtual machine shows), where bfloat16 runs at 80 GFLOP/s and MKL's float32
// at 150: float32, MKL packed 1.0 at 1 row, 1.9 at 16, 1.15 at 128, 1.05 at 512; bfloat16, wide on packed weights 1.7 to 2.1 at 128
// to 512 rows, converting for the call from about 128 rows on. With fewer than 8 rows the float32 copy's bytes cost more than they
// save.
//
// Without any bfloat16 instruction at::mm is slower still, so that the same holds. With AMX bfloat16 is the fastest as it is.
Crossovers crossovers_of(at::ScalarType dtype) {
  static const Machine machine;
  const bool intel_libraries = machine.intel && has_library(Library::mkl);
  const bool onednn = !machine.intel && machine.avx512 && has_library(Library::onednn);
  const auto packs = onednn ? Library::onednn : intel_libraries ? Library::mkl : Library::aten;
  const auto packed = [&](Rows rows) { return packs == Library::aten ? NONE : rows; };
  const auto library = onednn ? Library::onednn : Library::aten;
  switch (dtype) {
    case at::kFloat:
      return {false, library, onednn ? Rows{4, ANY} : NONE, packs, packed(onednn ? Rows{2, 128} : Rows{2, 256})};
    case at::kBFloat16:
      if (machine.amx) return {};
      if (onednn && machine.avx512_bf16) return {false, Library::aten, NONE, Library::onednn, {1, 128}};
      if (machine.avx512_bf16 && !machine.intel) return {};
      return {true, library, {128, ANY}, packs, packed({8, ANY})};
    case at::kHalf:
      if (machine.avx512_fp16) return {};
      return {true, library, {4, ANY}, packs, packed({2, ANY})};
    default:
      return {};
  }
}
#else
Crossovers crossovers_of(at::ScalarType) { return {}; }
#endif

const Crossovers& crossovers(at::ScalarType dtype) {
  static const Crossovers all[] = {crossovers_of(at::kFloat), crossovers_of(at::kBFloat16), crossovers_of(at::kHalf), {}};
  return all[dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : dtype == at::kHalf ? 2 : 3];
}

std::optional<Gemm> forced;

bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

Gemm choose(at::ScalarType dtype, int64_t elements, int64_t rows, bool constant) {
  if (elements == 0 || rows == 0 || !(dtype == at::kFloat || is_half(dtype))) return {};
  if (forced) {
    auto gemm = *forced;
    gemm.wide = gemm.wide && is_half(dtype);
    gemm.packed = gemm.packed && constant && (gemm.library != Library::mkl || gemm.wide || dtype == at::kFloat);
    if (gemm.library == Library::mkl && !gemm.packed) gemm.library = Library::aten;
    return gemm;
  }
  const auto& c = crossovers(dtype);
  if (elements < SMALL) return {};
  if (constant && c.packed.hold(rows)) return {c.packs, c.wide, true};
  if (c.rows.hold(rows)) return {c.library, c.wide, false};
  return {};
}

// A dense matrix or its transpose, whose bytes can be sampled.
bool packable(const at::Tensor& weight) {
  if (weight.layout() != at::kStrided || !weight.has_storage() || !(weight.stride(0) == 1 || weight.stride(1) == 1)) return false;
  const int64_t last = weight.storage_offset() + (weight.size(0) - 1) * weight.stride(0) + (weight.size(1) - 1) * weight.stride(1);
  return static_cast<int64_t>(weight.storage().nbytes()) >= (last + 1) * weight.element_size();  // FSDP frees some for a while
}

// Whether this is a product that at::linear would not refuse.
bool fits(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dtype = weight.scalar_type();
  return weight.is_cpu() && input.is_cpu() && weight.dim() == 2 && input.dim() > 0 && input.size(-1) == weight.size(1) &&
         input.scalar_type() == dtype && input.layout() == at::kStrided && weight.layout() == at::kStrided &&
         (!bias || (bias->is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 && bias->size(0) == weight.size(0)));
}

// oneDNN sums all of K in one running float32 sum, whose error is two to three times that of MKL's, which is summed in blocks.
// A model amplifies it (SmolLM2's gradients by 100), so that where a gradient is wanted products are sums of blocks here too.
constexpr int64_t SUMMED = 320;
// Elements of a block of rows of such a product: the caches keep it from one addition to the next.
constexpr int64_t CACHED = 1 << 20;

// Anything but a whole matrix or its transpose, oneDNN multiplies with its reference code, a thousand times slower.
at::Tensor dense(const at::Tensor& t) {
  if (t.is_mkldnn() || t.is_contiguous() || t.t().is_contiguous()) return t;
  return t.stride(0) == 1 ? t.t().contiguous().t() : t.contiguous();
}

at::Tensor onednn_in_blocks(const at::Tensor& a, const at::Tensor& b_t, const std::optional<at::Tensor>& bias) {
  const int64_t rows = a.size(0), inner = a.size(1), columns = b_t.size(0);
  const int64_t parts = (inner + SUMMED - 1) / SUMMED, step = (inner / parts + 63) / 64 * 64;
  const int64_t block = std::max<int64_t>(CACHED / columns, 64);
  std::vector<at::Tensor> bs;
  for (int64_t k = 0; k < inner; k += step) bs.push_back(dense(b_t.narrow(1, k, std::min(step, inner - k))));
  auto out = at::empty({rows, columns}, a.options());
  for (int64_t begin = 0; begin < rows; begin += block) {
    const auto a_rows = a.narrow(0, begin, std::min(block, rows - begin));
    auto total = out.narrow(0, begin, a_rows.size(0));
    for (size_t i = 0; i < bs.size(); i++) {
      const auto a_i = dense(a_rows.narrow(1, static_cast<int64_t>(i) * step, bs[i].size(1)));
      const auto product = onednn_linear(a_i, bs[i], i ? std::nullopt : bias);
      i ? total.add_(product) : total.copy_(product);
    }
  }
  return out;
}

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b_t, const std::optional<at::Tensor>& bias, const Gemm& gemm,
                    bool grad) {
  const bool in_blocks = grad && !gemm.wide && a.size(1) > SUMMED;
  const bool few = in_blocks && a.size(0) < 32 && b_t.is_contiguous();  // so few that to copy b_t in parts costs as much
  if (gemm.library == Library::onednn && !few)
    return in_blocks ? onednn_in_blocks(a, b_t, bias) : onednn_linear(dense(a), dense(b_t), bias);
  return bias ? at::addmm(*bias, a, b_t.t()) : at::mm(a, b_t.t());
}

// input [M, K] @ weight^T + bias, in float32 if wide; undefined where at::mm is the choice.
at::Tensor forward(const at::Tensor& input, int64_t rows, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   bool grad) {
  if (!fits(input, weight, bias)) return {};
  if (grad) drop_packed(weight);
  auto gemm = choose_gemm(weight, rows, !grad);
  at::Tensor packed;
  if (gemm.packed) {
    packed = find_packed(weight, gemm.library, gemm.wide);
    if (!packed.defined()) gemm = choose_gemm(weight, rows, false);
  }
  if (gemm.plain()) return {};
  const auto widened = [&](const at::Tensor& t) { return gemm.wide ? t.to(at::kFloat) : t; };
  const auto x = widened(as_rows(input));
  const auto b = bias ? std::optional(widened(*bias)) : std::nullopt;
  if (gemm.library == Library::mkl) return mkl_linear(x, packed, weight.size(0), b);
  return multiply(x, packed.defined() ? packed : widened(weight), b, gemm, grad);
}

}  // namespace

Gemm choose_gemm(const at::Tensor& weight, int64_t rows, bool constant) {
  return weight.is_cpu() ? choose(weight.scalar_type(), weight.numel(), rows, constant && packable(weight)) : Gemm{};
}

void force_gemm(std::optional<Gemm> gemm) {
  TORCH_CHECK_VALUE(!gemm || has_library(gemm->library), "this torch was built without MKL or oneDNN");
  forced = gemm;
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool grad) {
  BelowAutograd guard;
  const int64_t rows = input.dim() ? rows_of(input) : 0;
  const auto out = forward(input, rows, weight, bias, grad);
  if (!out.defined()) return at::linear(input, weight, bias);
  auto shape = input.sizes().vec();
  shape.back() = weight.size(0);
  return out.to(input.scalar_type()).view(shape);
}

at::Tensor linear_now(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (!fits(input, weight, bias) || !at::isFloatingType(input.scalar_type())) return {};
  if (at::GradMode::is_enabled() && (input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()))) return {};
  // Anything that would see or change the call: a mode, a transform, autocast, a wrapper of another kind.
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  auto keys = input.key_set() | weight.key_set() | tls.included_;
  if (bias) keys = keys | bias->key_set();
  if (!tls.excluded_.has(c10::DispatchKey::AutocastCPU)) return {};  // autocast is on
  keys = keys - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset -
         c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  if (keys.highestPriorityTypeId() != c10::DispatchKey::CPU) return {};
  return linear(input, weight, bias, /*grad=*/false);
}

void linear_out(at::Tensor& out, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                bool grad) {
  const auto product = forward(input, input.size(0), weight, bias, grad);
  if (product.defined()) {
    out.copy_(product);
  } else if (bias) {
    at::addmm_out(out, *bias, input, weight.t());
  } else {
    at::mm_out(out, input, weight.t());
  }
}

const at::Tensor& LinearGrads::Operand::as(bool widened) {
  if (widened && !wide.defined()) wide = own.to(at::kFloat);
  return widened ? wide : own;
}

LinearGrads::LinearGrads(const std::vector<at::Tensor>& dys, const at::Tensor& x, at::TensorList weights) : x_{x} {
  int64_t elements = 0;
  bool same = dys[0].is_cpu();
  const auto dtype = dys[0].scalar_type();
  const int64_t features = x.defined() ? x.size(1) : weights.empty() ? 0 : weights[0].size(1);
  for (const auto& dy : dys) {
    dys_.push_back({dy});
    elements += dy.size(1) * features;
    same = same && dy.scalar_type() == dtype;
  }
  for (const auto& weight : weights) {
    weights_.push_back({weight});
    same = same && weight.scalar_type() == dtype;
  }
  if (same && (!x.defined() || x.scalar_type() == dtype)) gemm_ = choose(dtype, elements, dys[0].size(0), false);
}

at::Tensor LinearGrads::sum(int64_t begin, int64_t rows) {
  at::Tensor total;
  for (size_t j = 0; j < dys_.size(); j++) {
    const auto dy = dys_[j].as(gemm_.wide).narrow(0, begin, rows), weight = weights_[j].as(gemm_.wide);
    if (j > 0 && gemm_.library == Library::aten) {
      total.addmm_(dy, weight);
    } else {
      const auto product = multiply(dy, weight.t(), std::nullopt, gemm_, /*grad=*/true);
      total = j > 0 ? total.add_(product) : product;
    }
  }
  return total;
}

void LinearGrads::input_out(at::Tensor& out, int64_t begin) {
  const int64_t rows = out.size(0);
  if (!gemm_.plain()) {
    out.copy_(sum(begin, rows));
    return;
  }
  at::mm_out(out, dys_[0].own.narrow(0, begin, rows), weights_[0].own);
  for (size_t j = 1; j < dys_.size(); j++) out.addmm_(dys_[j].own.narrow(0, begin, rows), weights_[j].own);
}

at::Tensor LinearGrads::input() { return sum(0, dys_[0].own.size(0)).to(dys_[0].own.scalar_type()); }

at::Tensor LinearGrads::weight(size_t j) {
  const auto dy = dys_[j].as(gemm_.wide), x = x_.as(gemm_.wide);
  return multiply(dy.t(), x.t(), std::nullopt, gemm_, /*grad=*/true).to(dys_[j].own.scalar_type());
}

void add_weight_grad_(at::Tensor& total, const at::Tensor& dy, const at::Tensor& x) {
  const auto gemm =
      dy.is_cpu() && dy.scalar_type() == x.scalar_type() ? choose(dy.scalar_type(), total.numel(), dy.size(0), false) : Gemm{};
  const auto widened = [&](const at::Tensor& t) { return gemm.wide ? t.to(at::kFloat) : t; };
  const auto a = widened(dy).t(), b = widened(x);
  if (gemm.library == Library::aten && total.scalar_type() == a.scalar_type()) {
    total.addmm_(a, b);
  } else {  // a half-precision product is rounded once, by its GEMM
    total.add_(multiply(a, b.t(), std::nullopt, gemm, /*grad=*/true));
  }
}

std::vector<at::Tensor> row_linear_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                                            const std::optional<at::Tensor>& weight, bool bias_grad) {
  BelowAutograd guard;
  const auto dy = as_rows(grad_output);
  LinearGrads gradients({dy}, input ? as_rows(*input) : at::Tensor(), weight ? at::TensorList(*weight) : at::TensorList());
  std::vector<at::Tensor> grads;
  if (weight) {
    auto shape = grad_output.sizes().vec();
    shape.back() = weight->size(1);
    grads.push_back(gradients.input().view(shape));
  }
  if (input) grads.push_back(gradients.weight(0));
  if (bias_grad) grads.push_back(dy.sum(0));
  return grads;
}

}  // namespace tpkernels
