// The collectives of the shared-memory transport, on raw memory. Every rank makes the same calls in
// the same order.
#pragma once

#include <c10/core/ScalarType.h>

#include <vector>

#include "../cpu/kernels.h"
#include "ring.h"

namespace tpkernels {

class Collectives {
 public:
  // `threads` is the most that any of the ranks has, so that all cut large buffers alike.
  Collectives(Ring& ring, int threads)
      : ring_(ring), piece_bytes_(std::min(ring.slot_bytes(), PIECE_BYTES * threads)) {}

  std::chrono::milliseconds timeout{};  // of each wait

  // Sums in rank order, in opmath, and rounds once: the same bits on all ranks, whatever the size.
  void all_reduce(char* data, int64_t count, c10::ScalarType dtype, Reduction reduction);
  // Only the root's `data` changes.
  void reduce(char* data, int64_t count, c10::ScalarType dtype, Reduction reduction, int root);
  // out [count] = the reduction of every rank's inputs[this rank] [count].
  void reduce_scatter(char* out, const std::vector<const char*>& inputs, int64_t count,
                      c10::ScalarType dtype, Reduction reduction);
  void all_gather(const std::vector<char*>& outs, const char* input, int64_t bytes);
  void broadcast(char* data, int64_t bytes, int root);
  // `outs` are the root's, one a rank, and empty elsewhere; likewise `inputs`.
  void gather(const std::vector<char*>& outs, const char* input, int64_t bytes, int root);
  void scatter(char* out, const std::vector<const char*>& inputs, int64_t bytes, int root);
  // inputs[r], of input_bytes[r], goes to rank r. outs[r], of out_bytes[r], comes from it.
  void all_to_all(const std::vector<char*>& outs, const std::vector<int64_t>& out_bytes,
                  const std::vector<const char*>& inputs, const std::vector<int64_t>& input_bytes);
  void barrier();

  // The most rows that sum_rows takes at once.
  int64_t max_rows(int64_t row_bytes) const { return ring_.slot_bytes() / row_bytes; }
  // args.out = the sum of every rank's ring.local_slot(), + bias + residual. The terms of `args`
  // are set here.
  void sum_rows(ReduceArgs args, int64_t rows);

  static std::string describe(uint64_t signature);

 private:
  static constexpr int64_t PIECE_BYTES = 256 << 10;
  // With three ranks and more, each reduces its part of tensors of this size and larger.
  static constexpr int64_t TWO_SHOT_BYTES = 32 << 10;

  void post_and_wait(int kind, c10::ScalarType dtype, int detail, int64_t bytes) {
    ring_.post_and_wait({static_cast<uint8_t>(kind), static_cast<uint8_t>(dtype),
                         static_cast<uint16_t>(detail), bytes},
                        timeout);
  }

  // Every rank's memory at `offset` of its slot, this rank's at `own`.
  std::vector<const char*> terms(int64_t offset, const char* own) const;

  Ring& ring_;
  const int64_t piece_bytes_;
};

}  // namespace tpkernels
