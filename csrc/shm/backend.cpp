#include "backend.h"

#include <atomic>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Utils.hpp>

#include "gloo_work.h"
#include "group.h"
#include "tensors.h"

namespace tpkernels {

namespace {

using c10d::OpType;
using std::chrono::milliseconds;

class ShmBackend : public c10d::Backend {
 public:
  ShmBackend(std::shared_ptr<ShmGroup> shared, int rank, int size, std::string group,
             c10::intrusive_ptr<c10d::Backend> fallback)
      : Backend(rank, size),
        shared_(std::move(shared)),
        group_(std::move(group)),
        fallback_(std::move(fallback)) {
    shared_->backend = this;
    set_peer_all_reduce(group_, shared_);
  }
  ~ShmBackend() override {
    if (find_peer_all_reduce(group_) == shared_)
      set_peer_all_reduce(group_, nullptr);  // else a later group has the name
  }

  const std::string getBackendName() const override { return "shm"; }
  // destroy_process_group calls it, whoever still holds the group.
  void shutdown() override {
    shared_->leave();
    fallback_->shutdown();
  }
  void setTimeout(milliseconds timeout) override {
    shared_->timeout = timeout;
    fallback_->setTimeout(timeout);
  }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return sequence_number_; }

  WorkPointer allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    const auto& tensor = only_one(tensors, "all_reduce");
    if (tensor.defined() && tensor.is_sparse()) return fallback_->allreduce(tensors, options);
    return reduce_all(OpType::ALLREDUCE, "all_reduce", tensors, options);
  }

  WorkPointer allreduce_coalesced(Tensors& tensors,
                                  const c10d::AllreduceCoalescedOptions& options) override {
    return reduce_all(OpType::ALLREDUCE_COALESCED, "all_reduce", tensors, options);
  }

  WorkPointer reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    const auto& tensor = only_one(tensors, "reduce");
    check_writable(tensor, "reduce");
    check_root(options.rootRank, options.rootTensor, getSize(), "reduce");
    const auto reduction = reduction_of(options.reduceOp, tensor);
    if (!reduction)
      return on_gloo(OpType::REDUCE, "shm:reduce", tensors, {}, [&](Tensors& written, Tensors&) {
        return fallback_->reduce(written, options);
      });
    return start(OpType::REDUCE, "shm:reduce", options, tensors, tensors,
                 [tensor, reduction, root = static_cast<int>(options.rootRank),
                  rank = getRank()](Collectives& c) {
                   const ContiguousMemory memory(tensor);
                   c.reduce(memory.data(), tensor.numel(), tensor.scalar_type(), *reduction, root);
                   if (root == rank) memory.write_back();
                 });
  }

  WorkPointer broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    const auto& tensor = only_one(tensors, "broadcast");
    check_writable(tensor, "broadcast");
    check_root(options.rootRank, options.rootTensor, getSize(), "broadcast");
    return start(OpType::BROADCAST, "shm:broadcast", options, tensors, tensors,
                 [tensor, root = static_cast<int>(options.rootRank)](Collectives& c) {
                   const ContiguousMemory memory(tensor);
                   c.broadcast(memory.data(), memory.bytes(), root);
                   memory.write_back();
                 });
  }

  WorkPointer allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                        const c10d::AllgatherOptions& options) override {
    const auto& input = only_one(inputs, "all_gather");
    check_readable(input, "all_gather");
    check_lists(outputs, getSize(), "all_gather", "outputs");
    for (const auto& out : outputs[0]) check_writable(out, "all_gather");
    if (!all_like(outputs[0], input))  // which gloo takes, or says why not
      return on_gloo(OpType::ALLGATHER, "shm:all_gather", outputs[0], inputs,
                     [&](Tensors& written, Tensors& read) {
                       std::vector<Tensors> lists{written};
                       return fallback_->allgather(lists, read, options);
                     });
    return start(OpType::ALLGATHER, "shm:all_gather", options, inputs, outputs[0],
                 [input, outs = outputs[0]](Collectives& c) {
                   const Memories out(outs.begin(), outs.end());
                   const ContiguousMemory shard(input);
                   c.all_gather(addresses<char*>(out), shard.data(), shard.bytes());
                   write_back(out);
                 });
  }

  WorkPointer _allgather_base(at::Tensor& output, at::Tensor& input,
                              const c10d::AllgatherOptions& options) override {
    Tensors outputs{output}, inputs{input};
    return gather_all(OpType::_ALLGATHER_BASE, "shm:_all_gather_base", outputs, inputs, options);
  }

  WorkPointer allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                              const c10d::AllgatherOptions& options) override {
    return gather_all(OpType::COALESCED, "shm:all_gather", outputs, inputs, options);
  }

  WorkPointer allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                  const c10d::AllgatherOptions& options) override {
    return on_gloo(OpType::ALLGATHER_COALESCED, "shm:all_gather", {}, {}, [&](Tensors&, Tensors&) {
      return fallback_->allgather_coalesced(outputs, inputs, options);
    });
  }

  WorkPointer gather(std::vector<Tensors>& outputs, Tensors& inputs,
                     const c10d::GatherOptions& options) override {
    const auto& input = only_one(inputs, "gather");
    check_readable(input, "gather");
    check_root(options.rootRank, 0, getSize(), "gather");
    const auto outs =
        list_of_root(outputs, options.rootRank == getRank(), input, getSize(), "gather", "outputs");
    for (const auto& out : outs) check_writable(out, "gather");
    return start(OpType::GATHER, "shm:gather", options, inputs, outs,
                 [input, outs, root = static_cast<int>(options.rootRank)](Collectives& c) {
                   const Memories out(outs.begin(), outs.end());
                   const ContiguousMemory shard(input);
                   c.gather(addresses<char*>(out), shard.data(), shard.bytes(), root);
                   write_back(out);
                 });
  }

  WorkPointer scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                      const c10d::ScatterOptions& options) override {
    const auto& output = only_one(outputs, "scatter");
    check_writable(output, "scatter");
    check_root(options.rootRank, 0, getSize(), "scatter");
    const auto ins =
        list_of_root(inputs, options.rootRank == getRank(), output, getSize(), "scatter", "inputs");
    for (const auto& input : ins) check_readable(input, "scatter");
    return start(OpType::SCATTER, "shm:scatter", options, ins, outputs,
                 [output, ins, root = static_cast<int>(options.rootRank)](Collectives& c) {
                   const ContiguousMemory memory(output);
                   const Memories in(ins.begin(), ins.end());
                   c.scatter(memory.data(), addresses<const char*>(in), memory.bytes(), root);
                   memory.write_back();
                 });
  }

  WorkPointer reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                             const c10d::ReduceScatterOptions& options) override {
    const auto& output = only_one(outputs, "reduce_scatter");
    check_writable(output, "reduce_scatter");
    check_lists(inputs, getSize(), "reduce_scatter", "inputs");
    for (const auto& input : inputs[0]) check_readable(input, "reduce_scatter");
    const auto reduction = reduction_of(options.reduceOp, output);
    if (!reduction || !all_like(inputs[0], output))
      return on_gloo(OpType::REDUCE_SCATTER, "shm:reduce_scatter", outputs, inputs[0],
                     [&](Tensors& written, Tensors& read) {
                       std::vector<Tensors> lists{read};
                       return fallback_->reduce_scatter(written, lists, options);
                     });
    return start(OpType::REDUCE_SCATTER, "shm:reduce_scatter", options, inputs[0], outputs,
                 [output, ins = inputs[0], reduction](Collectives& c) {
                   const Memories in(ins.begin(), ins.end());
                   scatter_sum(c, output, addresses<const char*>(in), *reduction);
                 });
  }

  WorkPointer _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                   const c10d::ReduceScatterOptions& options) override {
    Tensors outputs{output}, inputs{input};
    return scatter_sums(OpType::_REDUCE_SCATTER_BASE, outputs, inputs, options);
  }

  WorkPointer reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                              const c10d::ReduceScatterOptions& options) override {
    return scatter_sums(OpType::REDUCE_SCATTER_TENSOR_COALESCED, outputs, inputs, options);
  }

  WorkPointer alltoall_base(at::Tensor& output, at::Tensor& input,
                            std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
                            const c10d::AllToAllOptions& options) override {
    check_writable(output, "all_to_all");
    check_readable(input, "all_to_all");
    c10d::checkSplitSizes(input_splits, input, getSize());
    c10d::checkSplitSizes(output_splits, output, getSize());
    const auto split = [&](const at::Tensor& t, const std::vector<int64_t>& sizes) {
      return sizes.empty() ? t.tensor_split(getSize()) : t.split_with_sizes(sizes);
    };
    auto outputs = split(output, output_splits), inputs = split(input, input_splits);
    return exchange(OpType::ALLTOALL_BASE, {input}, {output}, outputs, inputs, options);
  }

  WorkPointer alltoall(Tensors& outputs, Tensors& inputs,
                       const c10d::AllToAllOptions& options) override {
    TORCH_CHECK_VALUE(
        outputs.size() == static_cast<size_t>(getSize()) && inputs.size() == outputs.size(),
        "all_to_all over ", getSize(), " ranks takes as many inputs and outputs, got ",
        inputs.size(), " and ", outputs.size());
    for (const auto& t : inputs) check_readable(t, "all_to_all");
    for (const auto& t : outputs) check_writable(t, "all_to_all");
    return exchange(OpType::ALLTOALL, inputs, outputs, outputs, inputs, options);
  }

  WorkPointer barrier(const c10d::BarrierOptions& options) override {
    return start(OpType::BARRIER, "shm:barrier", options, {}, {},
                 [](Collectives& c) { c.barrier(); });
  }

  WorkPointer allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    return fallback_->allreduce_sparse(tensors, options);
  }
  WorkPointer send(Tensors& tensors, int rank, int tag) override {
    check_readable(only_one(tensors, "send"), "send");
    return on_gloo(OpType::SEND, "shm:send", {}, tensors,
                   [&](Tensors&, Tensors& read) { return fallback_->send(read, rank, tag); });
  }
  WorkPointer recv(Tensors& tensors, int rank, int tag) override {
    check_writable(only_one(tensors, "recv"), "recv");
    return on_gloo(OpType::RECV, "shm:recv", tensors, {},
                   [&](Tensors& written, Tensors&) { return fallback_->recv(written, rank, tag); });
  }
  WorkPointer recvAnysource(Tensors& tensors, int tag) override {
    check_writable(only_one(tensors, "recv"), "recv");
    return on_gloo(
        OpType::RECVANYSOURCE, "shm:recvAnySource", tensors, {},
        [&](Tensors& written, Tensors&) { return fallback_->recvAnysource(written, tag); });
  }
  void monitoredBarrier(const c10d::BarrierOptions& options, bool all) override {
    fallback_->monitoredBarrier(options, all);
  }

 private:
  template <typename Options, typename F>
  WorkPointer start(OpType op, const char* name, const Options& options, const Tensors& inputs,
                    const Tensors& outputs, F body) {
    sequence_number_++;
    return shared_->run({op, name, options.asyncOp, options.timeout, inputs, outputs},
                        std::move(body));
  }

  // Calls gloo with contiguous copies of `written` and `read` where they are not contiguous, as
  // gloo takes no others, and some of its collectives do not say so.
  template <typename F>
  WorkPointer on_gloo(OpType op, const char* name, const Tensors& written, const Tensors& read,
                      const F& call) {
    sequence_number_++;
    Memories written_memory(written.begin(), written.end()), read_memory(read.begin(), read.end());
    auto contiguous = memory_of(written_memory), sent = memory_of(read_memory);
    auto work = call(contiguous, sent);
    return c10::make_intrusive<GlooWork>(op, name, written.empty() ? read : written,
                                         std::move(work), std::move(written_memory),
                                         std::move(read_memory));
  }

  template <typename Options>
  WorkPointer reduce_all(OpType op, const char* name, Tensors& tensors, const Options& options) {
    TORCH_CHECK_VALUE(!tensors.empty(), name, " takes at least one tensor");
    for (const auto& t : tensors) check_writable(t, name);
    const auto reductions = reductions_of(options.reduceOp, tensors);
    if (!reductions)
      return on_gloo(op, "shm:all_reduce", tensors, {}, [&](Tensors& written, Tensors&) {
        if constexpr (std::is_same_v<Options, c10d::AllreduceOptions>)
          return fallback_->allreduce(written, options);
        else
          return fallback_->allreduce_coalesced(written, options);
      });
    return start(op, "shm:all_reduce", options, tensors, tensors,
                 [tensors = FewTensors(tensors.begin(), tensors.end()),
                  reductions = *reductions](Collectives& c) {
                   for (size_t i = 0; i < tensors.size(); i++) {
                     const ContiguousMemory memory(tensors[i]);
                     c.all_reduce(memory.data(), tensors[i].numel(), tensors[i].scalar_type(),
                                  reductions[i]);
                     memory.write_back();
                   }
                 });
  }

  WorkPointer gather_all(OpType op, const char* name, const Tensors& outputs, const Tensors& inputs,
                         const c10d::AllgatherOptions& options) {
    check_pairs(outputs, inputs, "all_gather");
    for (size_t i = 0; i < inputs.size(); i++)
      check_whole(outputs[i], inputs[i], getSize(), "all_gather's output", "input's");
    return start(op, name, options, inputs, outputs,
                 [inputs, outputs, size = getSize()](Collectives& c) {
                   for (size_t i = 0; i < inputs.size(); i++) {
                     const ContiguousMemory memory(outputs[i]), shard(inputs[i]);
                     std::vector<char*> outs(size);
                     for (int r = 0; r < size; r++) outs[r] = memory.data() + r * shard.bytes();
                     c.all_gather(outs, shard.data(), shard.bytes());
                     memory.write_back();
                   }
                 });
  }

  WorkPointer scatter_sums(OpType op, Tensors& outputs, Tensors& inputs,
                           const c10d::ReduceScatterOptions& options) {
    check_pairs(outputs, inputs, "reduce_scatter");
    for (size_t i = 0; i < inputs.size(); i++)
      check_whole(inputs[i], outputs[i], getSize(), "reduce_scatter's input", "output's");
    const auto reductions = reductions_of(options.reduceOp, outputs);
    if (!reductions)
      return on_gloo(op, "shm:reduce_scatter", outputs, inputs,
                     [&](Tensors& written, Tensors& read) {
                       if (op == OpType::_REDUCE_SCATTER_BASE)
                         return fallback_->_reduce_scatter_base(written[0], read[0], options);
                       return fallback_->reduce_scatter_tensor_coalesced(written, read, options);
                     });
    return start(op, "shm:reduce_scatter", options, inputs, outputs,
                 [inputs, outputs, reductions = *reductions, size = getSize()](Collectives& c) {
                   for (size_t i = 0; i < inputs.size(); i++) {
                     const ContiguousMemory in(inputs[i]);
                     std::vector<const char*> terms(size);
                     for (int r = 0; r < size; r++) terms[r] = in.data() + r * (in.bytes() / size);
                     scatter_sum(c, outputs[i], terms, reductions[i]);
                   }
                 });
  }

  template <typename Options>
  WorkPointer exchange(OpType op, const Tensors& shown, const Tensors& result,
                       const Tensors& outputs, const Tensors& inputs, const Options& options) {
    return start(op, "shm:all_to_all", options, shown, result, [outputs, inputs](Collectives& c) {
      const Memories out(outputs.begin(), outputs.end()), in(inputs.begin(), inputs.end());
      c.all_to_all(addresses<char*>(out), sizes_in_bytes(out), addresses<const char*>(in),
                   sizes_in_bytes(in));
      write_back(out);
    });
  }

  static void scatter_sum(Collectives& c, const at::Tensor& output,
                          const std::vector<const char*>& terms, Reduction reduction) {
    const ContiguousMemory memory(output);
    c.reduce_scatter(memory.data(), terms, output.numel(), output.scalar_type(), reduction);
    memory.write_back();
  }

  const std::shared_ptr<ShmGroup> shared_;
  const std::string group_;
  const c10::intrusive_ptr<c10d::Backend> fallback_;
  std::atomic<uint64_t> sequence_number_ = 0;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> shm_backend(const c10::intrusive_ptr<c10d::Store>& store,
                                              int rank, int size, double seconds,
                                              const std::string& group,
                                              const c10::intrusive_ptr<c10d::Backend>& fallback) {
  const milliseconds timeout(static_cast<int64_t>(seconds * 1000));
  auto shared = std::make_shared<ShmGroup>(store, rank, size, timeout);
  return c10::make_intrusive<ShmBackend>(std::move(shared), rank, size, group, fallback);
}

}  // namespace tpkernels
