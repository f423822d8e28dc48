#include "packed_weights.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

namespace tpkernels {

namespace {

template <typename Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find_op(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  return op ? std::optional(op->typed<Signature>()) : std::nullopt;
}

using OptionalTensor = const std::optional<at::Tensor>&;
const auto& mkl_pack() {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, int64_t)>("mkl::_mkl_reorder_linear_weight");
  return op;
}
const auto& mkl_product() {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                            OptionalTensor, int64_t)>("mkl::_mkl_linear");
  return op;
}
const auto& onednn_pack() {
  static const auto op = find_op<at::Tensor(const at::Tensor&, std::optional<int64_t>)>(
      "mkldnn::_reorder_linear_weight");
  return op;
}
const auto& onednn_product() {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, OptionalTensor, std::string_view,
                         c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>)>(
          "mkldnn::_linear_pointwise");
  return op;
}

// The halves of a 128-bit product, as wyhash mixes them.
uint64_t mixed(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t fingerprint(const at::Tensor& weight) {
  constexpr int64_t LINE = 64;
  static constexpr uint64_t FACTORS[LINE / 8] = {
      0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,
      0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3};
  const int64_t major =
      weight.stride(1) == 1
          ? 0
          : 1;  // rows as they lie in memory: a transposed weight's are its columns
  const int64_t rows = weight.size(major), bytes = weight.size(1 - major) * weight.element_size();
  const int64_t pitch = weight.stride(major) * weight.element_size(),
                lines = (bytes + LINE - 1) / LINE;
  const int64_t each = (lines + rows - 1) / rows;
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  const auto of_rows = [&](int64_t row, int64_t last, uint64_t sum) {
    for (; row < last; row++) {
      for (int64_t i = 0; i < each; i++) {
        const int64_t begin = (row + i * rows) % lines * LINE;
        const char* source = data + row * pitch + begin;
        uint64_t words[LINE / 8] = {},
                              line = static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(i);
        if (bytes - begin >= LINE) {
          std::memcpy(words, source, LINE);
        } else {
          std::memcpy(words, source, bytes - begin);
        }
        for (int64_t k = 0; k < LINE / 8; k += 2)
          line += mixed(words[k] ^ FACTORS[k], words[k + 1] ^ FACTORS[k + 1]);
        sum += mixed(line ^ FACTORS[0], FACTORS[1]);
      }
    }
    return sum;
  };
  return at::parallel_reduce(0, rows, 8192, uint64_t{0}, of_rows, std::plus<>());
}

struct State {
  int64_t version;  // -1: an inference tensor, which has none
  uint64_t print;
  bool operator==(const State& other) const {
    return version == other.version && print == other.print;
  }
};

using Key = std::tuple<const c10::StorageImpl*, int64_t, int64_t, int64_t, int64_t, int64_t,
                       c10::ScalarType>;

// The weak reference keeps the storage's address from being given to another one while the entry
// exists.
struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  State state;
  GemmLibrary library;
  bool opmath;
  at::Tensor packed;
  int64_t bytes() const { return packed.defined() ? packed.numel() * packed.element_size() : 0; }
};

std::mutex mutex;  // held for moments: never while packing, nor while a tensor is freed
// Never destroyed: at exit the libraries may be gone before it.
auto& entries = *new std::map<Key, Entry>;
std::atomic<bool> holds_any{false};

Key key_of(const at::Tensor& weight) {
  return {weight.storage().unsafeGetStorageImpl(),
          weight.storage_offset(),
          weight.size(0),
          weight.size(1),
          weight.stride(0),
          weight.stride(1),
          weight.scalar_type()};
}

bool is_of(const std::pair<const Key, Entry>& entry, const c10::StorageImpl* storage) {
  return std::get<0>(entry.first) == storage;
}

// The first entry of a storage, by which they are sorted.
auto first_of(const c10::StorageImpl* storage) {
  constexpr auto least = std::numeric_limits<int64_t>::min();
  return entries.lower_bound({storage, least, least, least, least, least, c10::ScalarType{}});
}

// Moves the entries of freed storages out of the map, for the caller to free without the lock.
std::vector<Entry> take_expired() {
  std::vector<Entry> taken;
  for (auto i = entries.begin(); i != entries.end();) {
    const auto here = i++;
    if (!here->second.storage.expired()) continue;
    taken.push_back(std::move(here->second));
    entries.erase(here);
  }
  return taken;
}

at::Tensor pack(const at::Tensor& weight, GemmLibrary library, bool opmath) {
  const auto source = (opmath ? weight.to(at::kFloat) : weight).contiguous();
  // The number is a hint: either layout multiplies any number of rows. 128 was the best, or as
  // good, for 2 to 512 rows.
  constexpr int64_t rows = 128;
  return library == GemmLibrary::mkl ? mkl_pack()->call(source, rows)
                                     : onednn_pack()->call(source, rows);
}

}  // namespace

bool has_gemm_library(GemmLibrary library) {
  return library == GemmLibrary::aten ||
         (library == GemmLibrary::mkl ? mkl_pack() && mkl_product()
                                      : onednn_pack() && onednn_product());
}

at::Tensor find_packed(const at::Tensor& weight, GemmLibrary library, bool opmath) {
  const State state{weight.is_inference() ? -1 : static_cast<int64_t>(weight._version()),
                    fingerprint(weight)};
  const auto key = key_of(weight);
  std::vector<Entry> dead;
  at::Tensor old;
  {
    std::lock_guard<std::mutex> lock(mutex);
    static int64_t calls = 0;
    const auto found = entries.find(key);
    if (found == entries.end() || ++calls % 256 == 0) dead = take_expired();
    if (found == entries.end()) {
      entries.emplace(key,
                      Entry{weight.storage().getWeakStorageImpl(), state, library, opmath, {}});
      holds_any = true;
      return {};
    }
    auto& entry = found->second;
    if (!(entry.state == state)) {
      std::swap(old, entry.packed);
      entry.state = state;
      return {};
    }
    if (entry.packed.defined() && entry.library == library && entry.opmath == opmath)
      return entry.packed;
  }
  auto packed = pack(weight, library, opmath);
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = entries.find(key);
  // It may have been dropped meanwhile, or seen with another content.
  if (found != entries.end() && found->second.state == state) {
    found->second.library = library;
    found->second.opmath = opmath;
    old = std::exchange(found->second.packed, packed);
  }
  return packed;
}

at::Tensor mkl_linear(const at::Tensor& input, const at::Tensor& packed, int64_t n,
                      const std::optional<at::Tensor>& bias) {
  // The op also asks for the unpacked weight, but reads only its shape.
  const auto shape = at::empty({1}, input.options()).expand({n, input.size(1)});
  return mkl_product()->call(input, packed, shape, bias, input.size(0));
}

at::Tensor onednn_linear(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  return onednn_product()->call(input, weight, bias, "none", c10::List<std::optional<at::Scalar>>(),
                                "");
}

void drop_packed(const at::Tensor& weight) {
  if (!holds_any.load(std::memory_order_relaxed)) return;
  const auto* storage = weight.storage().unsafeGetStorageImpl();
  std::vector<Entry> dropped;
  std::lock_guard<std::mutex> lock(mutex);
  for (auto i = first_of(storage); i != entries.end() && is_of(*i, storage); i = entries.erase(i))
    dropped.push_back(std::move(i->second));
  holds_any = !entries.empty();
}

int64_t packed_bytes(const std::optional<at::Tensor>& weight) {
  const auto* storage = weight ? weight->storage().unsafeGetStorageImpl() : nullptr;
  std::vector<Entry> dead;
  std::lock_guard<std::mutex> lock(mutex);
  dead = take_expired();
  int64_t bytes = 0;
  for (const auto& entry : entries)
    if (!storage || is_of(entry, storage)) bytes += entry.second.bytes();
  return bytes;
}

}  // namespace tpkernels
