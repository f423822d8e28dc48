#include "gemm.h"

#include <c10/util/Exception.h>

#include <limits>
#if defined(__x86_64__) && defined(__GNUC__)
#include <ATen/Version.h>
#include <cpuid.h>
#endif

#include "../op.h"

namespace tpkernels {

namespace {

struct RowRange {
  int64_t first, last;
  bool contains(int64_t m) const { return first <= m && m <= last; }
};
constexpr int64_t ANY = std::numeric_limits<int64_t>::max();
constexpr RowRange NONE{1, 0};

// Weights of fewer elements are left to at::mm: their products take a few microseconds, as another
// op does.
constexpr int64_t SMALL = 1 << 16;

// The row ranges where another GEMM beats at::mm for a weight of one dtype.
struct Crossovers {
  bool opmath = false;
  GemmLibrary library = GemmLibrary::aten;  // of unpacked products
  RowRange rows = NONE;  // where unpacked products are in opmath, or another library's
  GemmLibrary packed_library = GemmLibrary::aten;  // of products with a packed weight
  RowRange packed_rows = NONE;
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
    // The operating system and ATEN_CPU_CAPABILITY can forbid it.
    avx512 = at::get_cpu_capability() == "AVX512";
    amx = avx512 && (d >> 22 & 1) && (d >> 24 & 1);
    avx512_fp16 = avx512 && (d >> 23 & 1);
    a = 0;
    __get_cpuid_count(7, 1, &a, &b, &c, &d);
    avx512_bf16 = avx512 && (a >> 5 & 1);
  }
};

// One thread, weights [2048, 1024], [1024, 2048] and [4096, 1024], time of F.linear / time,
// torch 2.13.
//
// AMD Zen 5, where MKL takes its AVX2 code (95 of 240 GFLOP/s) and oneDNN does not (float32 200,
// bfloat16 410):
//   rows                            1     2     4     16    64    128   256   512
//   float32, oneDNN                 1.0   0.8   1.5   1.8   2.1   2.2   2.3   2.2
//   float32, oneDNN packed          1.2   2.2   4.0   2.8   2.5   2.3   2.4   2.3
//   bfloat16, oneDNN packed         2.0   2.0   2.0   1.4   1.1   1.05  1.04  1.04
//   float16, opmath, oneDNN packed  0.9   1.9   3.8   7.0   8.0   (plain: 26 GFLOP/s)
// Gradients in float32: oneDNN 1.3x (by dy) and 3.9x (by weight) of at::mm at 4 rows, 1.5x and 1.9x
// at 16, 2.0x and 2.2x at 512.
//
// Intel with AVX512_BF16 and no AMX (or none that the virtual machine shows), where bfloat16 runs
// at 80 GFLOP/s and MKL's float32 at 150: float32, MKL packed 1.0 at 1 row, 1.9 at 16, 1.15 at
// 128, 1.05 at 512; bfloat16, in opmath on packed weights 1.7 to 2.1 at 128 to 512 rows, converting
// for the call from about 128 rows on. With fewer than 8 rows the float32 copy's bytes cost more
// than they save.
//
// Without any bfloat16 instruction at::mm is slower still, so that the same holds. With AMX
// bfloat16 is the fastest as it is.
Crossovers crossovers_of(at::ScalarType dtype) {
  static const Machine machine;
  const bool intel_libraries = machine.intel && has_gemm_library(GemmLibrary::mkl);
  const bool onednn = !machine.intel && machine.avx512 && has_gemm_library(GemmLibrary::onednn);
  auto packs = GemmLibrary::aten;
  if (intel_libraries) packs = GemmLibrary::mkl;
  if (onednn) packs = GemmLibrary::onednn;
  const auto packed = [&](RowRange rows) { return packs == GemmLibrary::aten ? NONE : rows; };
  const auto library = onednn ? GemmLibrary::onednn : GemmLibrary::aten;
  switch (dtype) {
    case at::kFloat:
      return {false, library, onednn ? RowRange{4, ANY} : NONE, packs,
              packed(onednn ? RowRange{2, 128} : RowRange{2, 256})};
    case at::kBFloat16:
      if (machine.amx) return {};
      if (onednn && machine.avx512_bf16)
        return {false, GemmLibrary::aten, NONE, GemmLibrary::onednn, {1, 128}};
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
  static const Crossovers all[] = {
      crossovers_of(at::kFloat), crossovers_of(at::kBFloat16), crossovers_of(at::kHalf), {}};
  switch (dtype) {
    case at::kFloat:
      return all[0];
    case at::kBFloat16:
      return all[1];
    case at::kHalf:
      return all[2];
    default:
      return all[3];
  }
}

bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

std::optional<Gemm> forced;

Gemm fit_forced(at::ScalarType dtype, bool constant) {
  auto gemm = *forced;
  gemm.opmath = gemm.opmath && is_half(dtype);
  const bool mkl_can_pack = gemm.opmath || dtype == at::kFloat;
  gemm.packed = gemm.packed && constant && (gemm.library != GemmLibrary::mkl || mkl_can_pack);
  if (gemm.library == GemmLibrary::mkl && !gemm.packed) gemm.library = GemmLibrary::aten;
  return gemm;
}

// A dense matrix or its transpose, whose bytes can be sampled.
bool is_packable(const at::Tensor& weight) {
  if (weight.layout() != at::kStrided || !weight.has_storage()) return false;
  if (weight.stride(0) != 1 && weight.stride(1) != 1) return false;
  // FSDP frees some storages for a while.
  return static_cast<int64_t>(weight.storage().nbytes()) >= spanned_bytes(weight);
}

}  // namespace

Gemm choose_cpu_gemm(at::ScalarType dtype, int64_t elements, int64_t m, bool constant) {
  if (elements == 0 || m == 0 || !(dtype == at::kFloat || is_half(dtype))) return {};
  if (forced) return fit_forced(dtype, constant);
  const auto& c = crossovers(dtype);
  if (elements < SMALL) return {};
  if (constant && c.packed_rows.contains(m)) return {c.packed_library, c.opmath, true};
  if (c.rows.contains(m)) return {c.library, c.opmath, false};
  return {};
}

Gemm choose_gemm(const at::Tensor& weight, int64_t m, bool constant) {
  if (!weight.is_cpu()) return {};
  return choose_cpu_gemm(weight.scalar_type(), weight.numel(), m, constant && is_packable(weight));
}

void force_gemm(std::optional<Gemm> gemm) {
  TORCH_CHECK_VALUE(!gemm || has_gemm_library(gemm->library),
                    "this torch was built without MKL or oneDNN");
  forced = gemm;
}

}  // namespace tpkernels
