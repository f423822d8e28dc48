// A group's collectives as the engine uses them: started asynchronously on c10d, logged, waited for
// exactly once.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "nvtx.h"
#include "peer_all_reduce.h"

namespace tpkernels {

// A collective in flight. It owns the tensors that the collective reads and writes. It waits once:
// in wait(), or in the destructor when something threw. Under NCCL the wait orders the current
// stream behind the collective and does not block the host.
class Pending {
 public:
  Pending() = default;
  // `wait_name` names the NVTX range of the wait. It is empty where no profiler is attached.
  Pending(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors,
          std::string wait_name)
      : wait_name_(std::move(wait_name)),
        tensors_(std::move(tensors)),
        work_(std::move(work)) {}  // mutant:pending.hold
  Pending(Pending&&) = default;    // mutant:pending.move
  Pending& operator=(Pending&&) = delete;
  ~Pending() {
    try {
      wait();        // mutant:pending.destroy
    } catch (...) {  // the first error is already on its way
    }
  }
  void wait() {
    const NvtxRange range(std::exchange(wait_name_, {}));
    auto work = std::move(work_);  // mutant:pending.take
    if (work) work->wait();        // mutant:pending.wait
    tensors_.clear();              // mutant:pending.free
  }

 private:
  std::string wait_name_;
  std::vector<at::Tensor>
      tensors_;  // held until the wait: an unfinished collective still writes to them
  c10::intrusive_ptr<c10d::Work> work_;
};

// A group, with the names that the log and a profiler give to its collectives. A profiler's range
// is named by `pipeline` and the chunk, or by the tag where there is no pipeline.
struct Channel {
  Channel(const std::string& group, std::string tag, int64_t chunks = 1,
          const char* pipeline = nullptr);
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::string name, tag;
  int64_t chunks;
  const char* pipeline;
  std::shared_ptr<PeerAllReduce> peers;  // null: the group has only its c10d backend

  int rank() const { return group->getRank(); }
  int size() const { return group->getSize(); }
  // Reduces a contiguous `buffer` over the group, in place. On a group of one nothing is in flight.
  Pending all_reduce(const at::Tensor& buffer, int64_t chunk = 0,
                     c10d::ReduceOp op = c10d::ReduceOp::SUM) const;
  // With TPKERNELS_DEBUG=1 the ranks tell each other which collective comes next, and all raise
  // where they differ. It communicates, so nothing may be staged yet.
  void check_agreement(const char* op, const at::Tensor& buffer, int64_t chunk) const;
  // True if all_reduce_fast_path takes `buffer` [M, N].
  bool has_fast_path(const at::Tensor& buffer) const;
  // The sum through `peers`, with the epilogue in the same pass. Nothing is in flight afterwards.
  // The caller has checked the agreement.
  void all_reduce_fast_path(StagedTerm staged, const at::Tensor& out,
                            const Epilogue& epilogue) const;
  // Concatenates every rank's `shard` into `out` [size, *shard.shape].
  Pending all_gather(const at::Tensor& out, const at::Tensor& shard) const;
  // A profiler's range around a step of a chunk, such as its GEMM.
  NvtxRange range(const char* step, int64_t chunk = 0) const {
    return {range_of(), step, chunk, pipeline ? chunks : 0};
  }

 private:
  bool synchronous() const { return peers && peers->synchronous(); }
  std::string_view range_of() const {
    return pipeline ? std::string_view(pipeline) : std::string_view(tag);
  }
  std::string wait_name(int64_t chunk) const;
  void log(const char* op, const at::Tensor& buffer, int64_t chunk) const;
};

// out [M, N] = the sum over ranks of the terms that gemm(term, first row) writes, and the epilogue
// in the same pass. Where the memory that the ranks share is smaller than `out`, it goes by blocks
// of rows.
template <typename Gemm>
void all_reduce_fast_path(const Channel& channel, const at::Tensor& out, const Epilogue& epilogue,
                          const Gemm& gemm) {
  const int64_t rows = out.size(0), block = channel.peers->max_rows(out);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t n = std::min(block, rows - begin);
    const auto slice = out.narrow(0, begin, n);
    auto here = epilogue;
    if (here.residual.defined()) here.residual = here.residual.narrow(0, begin, n);
    if (here.normed.defined()) here.normed = here.normed.narrow(0, begin, n);
    channel.check_agreement("all_reduce", slice, 0);
    auto staged = channel.peers->stage(slice);
    {
      const auto range = channel.range("gemm");
      gemm(staged.term, begin);  // mutant:peers.gemm
    }
    channel.all_reduce_fast_path(std::move(staged), slice, here);  // mutant:peers.reduce
  }
}

}  // namespace tpkernels
