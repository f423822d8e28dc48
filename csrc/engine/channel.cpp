#include "channel.h"

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string_view>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "collective_log.h"
#include "comm_buffer.h"

namespace tpkernels {

Channel::Channel(const std::string& group_name, std::string tag_, int64_t chunks_,
                 const char* pipeline_)
    : group(c10d::resolve_process_group(group_name)),
      name(group_name),
      tag(std::move(tag_)),
      chunks(chunks_),
      pipeline(pipeline_),
      peers(find_peer_all_reduce(group_name)) {
  if (peers && !peers->belongs_to(*group)) peers = nullptr;  // mutant:channel.belongs
}

bool Channel::has_fast_path(const at::Tensor& buffer) const {
  return peers && chunks == 1 && buffer.numel() &&
         peers->supports(buffer);  // mutant:channel.supports
}

std::string Channel::wait_name(int64_t chunk) const {
  if (!ranges_enabled()) return {};
  return range_name(range_of(), "wait", chunk, pipeline ? chunks : 0);
}

void Channel::log(const char* op, const at::Tensor& buffer, int64_t chunk) const {
  if (!log_enabled()) return;
  log_write({op, tag, name, static_cast<int64_t>(buffer.nbytes()), chunk, chunks});
}

void Channel::check_agreement(const char* op, const at::Tensor& buffer, int64_t chunk) const {
  const char* debug = std::getenv("TPKERNELS_DEBUG");
  if (!debug || std::string_view(debug) != "1") return;
  constexpr int64_t width = 256;
  std::ostringstream text;
  text << op << " for " << tag << " of " << buffer.sizes() << " " << buffer.scalar_type()
       << ", chunk " << chunk << " of " << chunks;
  auto own = at::zeros({width}, at::kByte);
  std::strncpy(static_cast<char*>(own.data_ptr()), text.str().c_str(), width - 1);
  auto sent = empty_comm_buffer({width}, own.options().device(buffer.device())).copy_(own);
  auto all = empty_comm_buffer({size() * width}, sent.options());
  group->_allgather_base(all, sent)->wait();
  all = all.cpu();
  const char* first = static_cast<const char*>(all.data_ptr());
  std::ostringstream report;
  bool same = true;
  for (int rank = 0; rank < size(); rank++) {
    const char* theirs = first + rank * width;
    same = same && std::strcmp(theirs, first) == 0;
    report << "\n  rank " << rank << ": " << theirs;
  }
  TORCH_CHECK(same, "the ranks of group ", name,
              " are about to run different collectives:", report.str());
}

void Channel::all_reduce_fast_path(StagedTerm staged, const at::Tensor& out,
                                   const Epilogue& epilogue) const {
  log("all_reduce", out, 0);  // mutant:channel.log
  const auto launch = range("all_reduce");
  peers->all_reduce(std::move(staged), out, epilogue);  // mutant:channel.peers
}

Pending Channel::all_reduce(const at::Tensor& buffer, int64_t chunk, c10d::ReduceOp op) const {
  if (size() == 1) return {};
  check_agreement("all_reduce", buffer, chunk);
  if (op == c10d::ReduceOp::SUM && peers) {  // mutant:channel.flat
    const auto flat = buffer.view({1, -1});
    if (has_fast_path(flat)) {
      all_reduce_fast_path({flat, nullptr}, flat, {});
      return {};  // mutant:channel.flat_end
    }
  }
  if (buffer.numel() == 0) return {};
  log("all_reduce", buffer, chunk);
  c10d::AllreduceOptions options;
  options.reduceOp = std::move(op);
  // NCCL runs a synchronous all-reduce on the compute stream, where nothing can overlap it. On the
  // shm transport a single chunk's caller waits for it at once, so that no other thread need carry
  // it.
  options.asyncOp = !(synchronous() && chunks == 1);  // mutant:channel.sum_async
  std::vector<at::Tensor> tensors{buffer};
  const auto launch = range("all_reduce", chunk);
  auto work = group->allreduce(tensors, options);
  return {std::move(work), std::move(tensors), wait_name(chunk)};
}

Pending Channel::all_gather(const at::Tensor& out, const at::Tensor& shard) const {
  check_agreement("all_gather", shard, 0);
  if (out.numel() == 0) return {};
  log("all_gather", out, 0);
  c10d::AllgatherOptions options;
  options.asyncOp = !synchronous();  // mutant:channel.gather_async
  auto flat_out = out.view({-1}), flat_shard = shard.view({-1});
  const auto launch = range("all_gather");
  auto work = group->_allgather_base(flat_out, flat_shard, options);
  return {std::move(work), {flat_out, flat_shard}, wait_name(0)};  // mutant:channel.gather_holds
}

}  // namespace tpkernels
