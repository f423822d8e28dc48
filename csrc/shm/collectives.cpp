#include "collectives.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "../cpu/rows.h"

namespace tpkernels {

namespace {

enum Kind {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kAllToAll,
  kBarrier,
  kRowLinear,
  kReduce,
  kGather,
  kScatter
};
constexpr const char* NAMES[] = {"all_reduce", "reduce_scatter", "all_gather", "broadcast",
                                 "all_to_all", "barrier",        "row_linear", "reduce",
                                 "gather",     "scatter"};
constexpr const char* REDUCTIONS[] = {"sum", "mean", "min", "max"};
constexpr int64_t LINE = 64;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void copy(char* to, const char* from, int64_t bytes) {
  at::parallel_for(0, bytes, GRAIN * 4,
                   [&](int64_t i, int64_t last) { std::memcpy(to + i, from + i, last - i); });
}

void reduce(c10::ScalarType dtype, Reduction reduction, const std::vector<const char*>& terms,
            char* out, int64_t count) {
  static auto* const kernel = TPKERNELS_KERNEL(reduce_terms);
  const ReduceArgs args{dtype,   reduction, static_cast<int>(terms.size()), terms.data(), out, 0,
                        nullptr, {}};
  at::parallel_for(0, count, GRAIN, [&](int64_t i, int64_t last) { kernel(args, i, last); });
}

}  // namespace

std::string Collectives::describe(uint64_t signature) {
  const auto kind = signature >> 60, detail = signature >> 44 & 1023;
  const auto dtype = static_cast<c10::ScalarType>(signature >> 54 & 63);
  const auto bytes = std::to_string(signature & ((uint64_t(1) << 44) - 1)) + " bytes";
  if (kind > kScatter) return "something unknown";
  std::string text = NAMES[kind];
  if (kind == kBarrier) return text;
  const bool reduces = kind == kAllReduce || kind == kReduceScatter || kind == kReduce;
  if (reduces) text += std::string(" (") + REDUCTIONS[detail & 3] + ")";
  text += " of " + bytes;
  if (kind == kBroadcast || kind == kScatter) text += " from rank " + std::to_string(detail);
  if (kind == kGather) text += " to rank " + std::to_string(detail);
  if (kind == kReduce) text += " to rank " + std::to_string(detail >> 2);
  if (reduces || kind == kRowLinear) text += std::string(" of ") + c10::toString(dtype);
  return text;
}

// This rank's term is read where it came from: memory that memcpy wrote is in no cache of the
// writer's (twice as fast at 1 MB).
std::vector<const char*> Collectives::terms(int64_t offset, const char* own) const {
  std::vector<const char*> all(ring_.size());
  for (int r = 0; r < ring_.size(); r++)
    all[r] = r == ring_.rank() ? own : ring_.remote_slot(r) + offset;
  return all;
}

void Collectives::all_reduce(char* data, int64_t count, c10::ScalarType dtype,
                             Reduction reduction) {
  const int64_t size = c10::elementSize(dtype), bytes = count * size, piece = piece_bytes_ / size,
                ranks = ring_.size();
  const int detail = static_cast<int>(reduction), rank = ring_.rank();
  const bool one_shot = ranks == 2 || bytes < TWO_SHOT_BYTES;
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t n = std::min(piece, count - begin);
    char* const here = data + begin * size;
    if (one_shot) {
      copy(ring_.local_slot(), here, n * size);
      post_and_wait(kAllReduce, dtype, detail, bytes);
      tpkernels::reduce(dtype, reduction, terms(0, here), here, n);
      continue;
    }
    // Each rank reduces a share, of whole cache lines, and the others copy it.
    const int64_t share = round_up((n + ranks - 1) / ranks, LINE / size) * size;
    const auto first = [&](int64_t r) { return std::min(n * size, r * share); };
    const auto length = [&](int64_t r) { return first(r + 1) - first(r); };
    copy(ring_.local_slot(), here, first(rank));
    copy(ring_.local_slot() + first(rank + 1), here + first(rank + 1), n * size - first(rank + 1));
    post_and_wait(kAllReduce, dtype, detail, bytes);
    tpkernels::reduce(dtype, reduction, terms(first(rank), here + first(rank)), here + first(rank),
                      length(rank) / size);
    copy(ring_.local_slot() + first(rank), here + first(rank), length(rank));
    post_and_wait(kAllReduce, dtype, detail, bytes);
    for (int r = 0; r < ranks; r++)
      if (r != rank) copy(here + first(r), ring_.remote_slot(r) + first(r), length(r));
  }
}

void Collectives::reduce(char* data, int64_t count, c10::ScalarType dtype, Reduction reduction,
                         int root) {
  const int64_t size = c10::elementSize(dtype), piece = piece_bytes_ / size;
  const int detail = static_cast<int>(reduction) | root << 2;
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t n = std::min(piece, count - begin);
    char* const here = data + begin * size;
    if (ring_.rank() != root) copy(ring_.local_slot(), here, n * size);
    post_and_wait(kReduce, dtype, detail, count * size);
    if (ring_.rank() == root) tpkernels::reduce(dtype, reduction, terms(0, here), here, n);
  }
}

void Collectives::reduce_scatter(char* out, const std::vector<const char*>& inputs, int64_t count,
                                 c10::ScalarType dtype, Reduction reduction) {
  const int64_t size = c10::elementSize(dtype), ranks = ring_.size(), rank = ring_.rank();
  const int64_t piece = std::max<int64_t>(1, piece_bytes_ / ranks / LINE) * LINE / size;
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t n = std::min(piece, count - begin);
    for (int r = 0; r < ranks; r++)
      if (r != rank)
        copy(ring_.local_slot() + r * piece * size, inputs[r] + begin * size, n * size);
    post_and_wait(kReduceScatter, dtype, static_cast<int>(reduction), count * size * ranks);
    tpkernels::reduce(dtype, reduction, terms(rank * piece * size, inputs[rank] + begin * size),
                      out + begin * size, n);
  }
}

void Collectives::all_gather(const std::vector<char*>& outs, const char* input, int64_t bytes) {
  const int rank = ring_.rank();
  for (int64_t begin = 0; begin < bytes; begin += piece_bytes_) {
    const int64_t n = std::min(piece_bytes_, bytes - begin);
    copy(ring_.local_slot(), input + begin, n);
    post_and_wait(kAllGather, c10::ScalarType::Byte, 0, bytes);
    for (int r = 0; r < ring_.size(); r++)
      if (r != rank) copy(outs[r] + begin, ring_.remote_slot(r), n);
  }
  if (outs[rank] != input) copy(outs[rank], input, bytes);
}

void Collectives::broadcast(char* data, int64_t bytes, int root) {
  for (int64_t begin = 0; begin < bytes; begin += piece_bytes_) {
    const int64_t n = std::min(piece_bytes_, bytes - begin);
    if (ring_.rank() == root) copy(ring_.local_slot(), data + begin, n);
    post_and_wait(kBroadcast, c10::ScalarType::Byte, root, bytes);
    if (ring_.rank() != root) copy(data + begin, ring_.remote_slot(root), n);
  }
}

void Collectives::gather(const std::vector<char*>& outs, const char* input, int64_t bytes,
                         int root) {
  const int rank = ring_.rank();
  for (int64_t begin = 0; begin < bytes; begin += piece_bytes_) {
    const int64_t n = std::min(piece_bytes_, bytes - begin);
    if (rank != root) copy(ring_.local_slot(), input + begin, n);
    post_and_wait(kGather, c10::ScalarType::Byte, root, bytes);
    if (rank != root) continue;
    for (int r = 0; r < ring_.size(); r++)
      if (r != rank) copy(outs[r] + begin, ring_.remote_slot(r), n);
  }
  if (rank == root && outs[rank] != input) copy(outs[rank], input, bytes);
}

void Collectives::scatter(char* out, const std::vector<const char*>& inputs, int64_t bytes,
                          int root) {
  const int rank = ring_.rank();
  const int64_t piece = std::max<int64_t>(1, piece_bytes_ / ring_.size() / LINE) * LINE;
  for (int64_t begin = 0; begin < bytes; begin += piece) {
    const int64_t n = std::min(piece, bytes - begin);
    if (rank == root)
      for (int r = 0; r < ring_.size(); r++)
        if (r != rank) copy(ring_.local_slot() + r * piece, inputs[r] + begin, n);
    post_and_wait(kScatter, c10::ScalarType::Byte, root, bytes);
    if (rank != root) copy(out + begin, ring_.remote_slot(root) + rank * piece, n);
  }
  if (rank == root && inputs[rank] != out) copy(out, inputs[rank], bytes);
}

void Collectives::all_to_all(const std::vector<char*>& outs, const std::vector<int64_t>& out_bytes,
                             const std::vector<const char*>& inputs,
                             const std::vector<int64_t>& input_bytes) {
  const int ranks = ring_.size(), rank = ring_.rank();
  // The sizes come first, so that all ranks agree on the number of steps, and that the sizes match.
  const int64_t table = ranks * static_cast<int64_t>(sizeof(int64_t));
  auto* const said = ring_.local_slot();
  std::memcpy(said, input_bytes.data(), table);
  std::memcpy(said + table, out_bytes.data(), table);
  post_and_wait(kAllToAll, c10::ScalarType::Byte, 0, 0);
  const auto sent = [&](int from, int to) {
    return reinterpret_cast<const int64_t*>(ring_.remote_slot(from))[to];
  };
  const auto wanted = [&](int by, int from) {
    return reinterpret_cast<const int64_t*>(ring_.remote_slot(by) + table)[from];
  };
  int64_t most = 0;
  for (int r = 0; r < ranks; r++) {
    for (int to = 0; to < ranks; to++) {
      TORCH_CHECK_VALUE(sent(r, to) == wanted(to, r), "all_to_all: rank ", r, " sends ",
                        sent(r, to), " bytes to rank ", to, ", which expects ", wanted(to, r),
                        ": input and output split sizes must match");
      most = std::max(most, sent(r, to));
    }
  }
  const int64_t piece = std::max<int64_t>(1, piece_bytes_ / ranks / LINE) * LINE;
  const auto left = [&](int64_t bytes, int64_t begin) {
    return std::clamp<int64_t>(bytes - begin, 0, piece);
  };
  for (int64_t begin = 0; begin < most; begin += piece) {
    for (int r = 0; r < ranks; r++)
      if (r != rank)
        copy(ring_.local_slot() + r * piece, inputs[r] + begin, left(input_bytes[r], begin));
    post_and_wait(kAllToAll, c10::ScalarType::Byte, 0, most);
    for (int r = 0; r < ranks; r++)
      if (r != rank)
        copy(outs[r] + begin, ring_.remote_slot(r) + rank * piece, left(out_bytes[r], begin));
  }
  copy(outs[rank], inputs[rank], input_bytes[rank]);
}

void Collectives::barrier() { post_and_wait(kBarrier, c10::ScalarType::Byte, 0, 0); }

void Collectives::sum_rows(ReduceArgs args, int64_t rows) {
  static auto* const kernel = TPKERNELS_KERNEL(sum_rows);
  const int64_t row_bytes = args.columns * c10::elementSize(args.dtype), bytes = rows * row_bytes,
                ranks = ring_.size();
  post_and_wait(kRowLinear, args.dtype, 0, bytes);
  const auto all = terms(0, ring_.remote_slot(ring_.rank()));
  args.num_terms = static_cast<int>(ranks);
  args.terms = all.data();
  if (ranks == 2 || bytes < TWO_SHOT_BYTES) {
    for_rows(rows, args.columns, [&](int64_t row, int64_t last) { kernel(args, row, last); });
    return;
  }
  char* const out = static_cast<char*>(args.out);
  const int64_t share = (rows + ranks - 1) / ranks, rank = ring_.rank();
  const auto first = [&](int64_t r) { return std::min(rows, r * share); };
  const auto at = [&](int64_t r) { return first(r) * row_bytes; };
  for_rows(first(rank + 1) - first(rank), args.columns,
           [&](int64_t row, int64_t last) { kernel(args, first(rank) + row, first(rank) + last); });
  copy(ring_.local_slot() + at(rank), out + at(rank), at(rank + 1) - at(rank));
  post_and_wait(kRowLinear, args.dtype, 0, bytes);
  for (int r = 0; r < ranks; r++)
    if (r != rank) copy(out + at(r), ring_.remote_slot(r) + at(r), at(r + 1) - at(r));
}

}  // namespace tpkernels
