// Collectives as the overlap engine uses them: started asynchronously on a c10d group, logged, waited exactly once.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <tuple>
#include <utility>
#include <vector>

#include "peer.h"
#include "ranges.h"

namespace tpkernels {

// One line of the collective log; `chunk` of `chunks` is 0 of 1 for a collective that is not chunked.
struct Collective {
  std::string op, tag, group;
  int64_t bytes, chunk, chunks;
};

// The log is off until started. Fake kernels write to it too, so that a traced model's volumes can be counted.
void log_start();
std::vector<Collective> log_stop();
bool log_enabled();
void log_write(Collective entry);

// A collective in flight. It owns what it reads and writes, and waits for it once: in wait(), or when it is destroyed because
// something threw. Under NCCL the wait orders the current stream behind the collective and does not block the host.
class Pending {
 public:
  Pending() = default;
  // `wait_name`: of the wait's range; empty where no profiler is attached.
  Pending(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors, std::string wait_name)
      : wait_name_(std::move(wait_name)), tensors_(std::move(tensors)), work_(std::move(work)) {}  // mutant:pending.hold
  Pending(Pending&&) = default;  // mutant:pending.move
  Pending& operator=(Pending&&) = delete;
  ~Pending() {
    try {
      wait();  // mutant:pending.destroy
    } catch (...) {  // the first error is already on its way
    }
  }
  void wait() {
    const Range range(std::exchange(wait_name_, {}));
    auto work = std::move(work_);  // mutant:pending.take
    if (work) work->wait();  // mutant:pending.wait
    tensors_.clear();  // mutant:pending.free
  }

 private:
  std::string wait_name_;
  std::vector<at::Tensor> tensors_;  // held until the wait: an unfinished collective still writes to them
  c10::intrusive_ptr<c10d::Work> work_;
};

// Where a collective runs and what the log calls it. A profiler calls it by `pipeline`, with its chunk, or else by the tag.
struct Channel {
  Channel(const std::string& group, std::string tag, int64_t chunks = 1, const char* pipeline = nullptr);
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::string name, tag;
  int64_t chunks;
  const char* pipeline;
  std::shared_ptr<PeerMemory> peers;

  int rank() const { return group->getRank(); }
  int size() const { return group->getSize(); }
  // Sums (or takes the maximum of) a contiguous `buffer` over the group, in place. Nothing is in flight on a group of one.
  Pending all_reduce(const at::Tensor& buffer, int64_t chunk = 0, c10d::ReduceOp op = c10d::ReduceOp::SUM) const;
  // Whether all_reduce_now takes `buffer` [M, N].
  bool fits_peers(const at::Tensor& buffer) const;
  // The same sum through the group's peer memory, with what follows it in the same pass; nothing is in flight afterwards.
  void all_reduce_now(Staged staged, const at::Tensor& out, const Epilogue& epilogue) const;
  // Concatenates every rank's `shard` into `out` [size, *shard.shape].
  Pending all_gather(const at::Tensor& out, const at::Tensor& shard) const;
  // A profiler's range around a step of chunk `chunk`, such as its GEMM.
  Range range(const char* step, int64_t chunk = 0) const { return {range_of(), step, chunk, pipeline ? chunks : 0}; }

 private:
  // Whether its collectives are the calling core's own work.
  bool synchronous() const { return peers && peers->synchronous(); }
  std::string_view range_of() const { return pipeline ? std::string_view(pipeline) : std::string_view(tag); }
  std::string wait_name(int64_t chunk) const;
  // With TPKERNELS_DEBUG=1 the ranks tell each other what they are about to do, and all raise where they differ.
  void check_agreement(const char* op, const at::Tensor& buffer, int64_t chunk) const;
};

// Every buffer that a collective touches is allocated here, so that a registered pool can take this function's place.
at::Tensor empty_comm_buffer(at::IntArrayRef sizes, const at::TensorOptions& options);

// Row boundaries [0, ..., rows] of at most `chunks` chunks in proportions 1 2 3 ... 3 2 1: the first and the last are the small
// ones, since the first one's GEMM hides no all-reduce and the last one's all-reduce is hidden by no GEMM. Boundaries are multiples
// of 128 rows where there are that many (full GEMM tiles), otherwise of as many rows as keep each slice 16-byte aligned.
std::vector<int64_t> chunk_bounds(int64_t rows, int64_t chunks, int64_t row_bytes);

}  // namespace tpkernels
