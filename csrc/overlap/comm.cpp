#include "comm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <sstream>
#include <string_view>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <unordered_map>

namespace tpkernels {

namespace {
std::atomic<bool> logging{false};  // read on every collective; the mutex guards the entries
std::mutex log_mutex;
std::vector<Collective> log_entries;
}  // namespace

void log_start() {
  std::lock_guard<std::mutex> lock(log_mutex);
  TORCH_CHECK(!logging, "the collective log is already running: logs do not nest");
  log_entries.clear();
  logging = true;
}

std::vector<Collective> log_stop() {
  std::lock_guard<std::mutex> lock(log_mutex);
  logging = false;
  return std::exchange(log_entries, {});
}

bool log_enabled() { return logging.load(std::memory_order_relaxed); }

void log_write(Collective entry) {
  std::lock_guard<std::mutex> lock(log_mutex);
  if (logging) log_entries.push_back(std::move(entry));
}

namespace {
std::mutex peers_mutex;
std::unordered_map<std::string, std::shared_ptr<PeerMemory>> peer_memories;
}  // namespace

std::shared_ptr<PeerMemory> find_peer_memory(const std::string& group) {
  std::lock_guard<std::mutex> lock(peers_mutex);
  const auto found = peer_memories.find(group);
  return found == peer_memories.end() ? nullptr : found->second;
}

void set_peer_memory(const std::string& group, std::shared_ptr<PeerMemory> memory) {
  std::lock_guard<std::mutex> lock(peers_mutex);
  if (memory) {
    peer_memories[group] = std::move(memory);
  } else {
    peer_memories.erase(group);
  }
}

Channel::Channel(const std::string& group_name, std::string tag_, int64_t chunks_, const char* pipeline_)
    : group(c10d::resolve_process_group(group_name)),
      name(group_name),
      tag(std::move(tag_)),
      chunks(chunks_),
      pipeline(pipeline_),
      peers(find_peer_memory(group_name)) {
  if (peers && !peers->serves(*group)) peers = nullptr;  // mutant:channel.serves
}

bool Channel::fits_peers(const at::Tensor& buffer) const {
  return peers && chunks == 1 && buffer.numel() && peers->takes(buffer);  // mutant:channel.fits
}

std::string Channel::wait_name(int64_t chunk) const {
  return ranges_enabled() ? range_name(range_of(), "wait", chunk, pipeline ? chunks : 0) : std::string();
}

void Channel::check_agreement(const char* op, const at::Tensor& buffer, int64_t chunk) const {
  const char* debug = std::getenv("TPKERNELS_DEBUG");
  if (!debug || std::string_view(debug) != "1") return;
  constexpr int64_t width = 256;
  std::ostringstream text;
  text << op << " for " << tag << " of " << buffer.sizes() << " " << buffer.scalar_type() << ", chunk " << chunk << " of "
       << chunks;
  auto mine = at::zeros({width}, at::kByte);
  std::strncpy(static_cast<char*>(mine.data_ptr()), text.str().c_str(), width - 1);
  auto sent = empty_comm_buffer({width}, mine.options().device(buffer.device())).copy_(mine);
  auto all = empty_comm_buffer({size() * width}, sent.options());
  group->_allgather_base(all, sent)->wait();
  all = all.cpu();
  std::ostringstream report;
  bool same = true;
  for (int rank = 0; rank < size(); rank++) {
    const char* theirs = static_cast<const char*>(all.data_ptr()) + rank * width;
    same = same && std::strcmp(theirs, static_cast<const char*>(all.data_ptr())) == 0;
    report << "\n  rank " << rank << ": " << theirs;
  }
  TORCH_CHECK(same, "the ranks of group ", name, " are about to run different collectives:", report.str());
}

void Channel::all_reduce_now(Staged staged, const at::Tensor& out, const Epilogue& epilogue) const {
  check_agreement("all_reduce", out, 0);
  if (log_enabled()) log_write({"all_reduce", tag, name, static_cast<int64_t>(out.nbytes()), 0, 1});  // mutant:channel.log
  const auto launch = range("all_reduce");
  peers->all_reduce(std::move(staged), out, epilogue);  // mutant:channel.peers
}

Pending Channel::all_reduce(const at::Tensor& buffer, int64_t chunk, c10d::ReduceOp op) const {
  if (size() == 1) return {};
  if (op == c10d::ReduceOp::SUM && fits_peers(buffer.view({1, -1}))) {  // mutant:channel.flat
    const auto flat = buffer.view({1, -1});
    all_reduce_now({flat, nullptr}, flat, {});
    return {};  // mutant:channel.flat_end
  }
  check_agreement("all_reduce", buffer, chunk);
  if (buffer.numel() == 0) return {};
  if (log_enabled()) log_write({"all_reduce", tag, name, static_cast<int64_t>(buffer.nbytes()), chunk, chunks});
  c10d::AllreduceOptions options;
  options.reduceOp = std::move(op);
  // NCCL runs a synchronous one on the compute stream, where nothing can overlap it. On the shm transport a single chunk's caller
  // waits for it at once: no other thread need carry it.
  options.asyncOp = !(synchronous() && chunks == 1);  // mutant:channel.sum_async
  std::vector<at::Tensor> tensors{buffer};
  const auto launch = range("all_reduce", chunk);
  auto work = group->allreduce(tensors, options);
  return {std::move(work), std::move(tensors), wait_name(chunk)};
}

Pending Channel::all_gather(const at::Tensor& out, const at::Tensor& shard) const {
  check_agreement("all_gather", shard, 0);
  if (out.numel() == 0) return {};
  if (log_enabled()) log_write({"all_gather", tag, name, static_cast<int64_t>(out.nbytes()), 0, chunks});
  c10d::AllgatherOptions options;
  options.asyncOp = !synchronous();  // mutant:channel.gather_async
  auto flat_out = out.view({-1}), flat_shard = shard.view({-1});
  const auto launch = range("all_gather");
  auto work = group->_allgather_base(flat_out, flat_shard, options);
  return {std::move(work), {flat_out, flat_shard}, wait_name(0)};  // mutant:channel.gather_holds
}

at::Tensor empty_comm_buffer(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

std::vector<int64_t> chunk_bounds(int64_t rows, int64_t chunks, int64_t row_bytes) {
  TORCH_CHECK(chunks >= 1, "chunks must be at least 1, got ", chunks);
  const int64_t unit = rows >= 128 * chunks ? 128 : 16 / std::gcd<int64_t>(16, std::max<int64_t>(row_bytes, 1));
  const int64_t units = (rows + unit - 1) / unit, count = std::max<int64_t>(std::min(chunks, units), 1);
  std::vector<int64_t> bounds(count + 1, 0), weights(count);
  for (int64_t i = 0; i < count; i++) weights[i] = std::min(i, count - 1 - i) + 1;
  const int64_t total = std::accumulate(weights.begin(), weights.end(), int64_t{0});
  for (int64_t i = 0, weight = 0, end = 0; i < count; i++) {
    weight += weights[i];
    const int64_t share = (2 * units * weight + total) / (2 * total);               // rounded
    end = std::max(std::min(share, units - (count - 1 - i)), end + (units > end));  // a unit at least for this one and each later
    bounds[i + 1] = std::min(rows, end * unit);
  }
  return bounds;
}

}  // namespace tpkernels
