#include "backend.h"

#include <c10/util/Exception.h>

#include <optional>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Utils.hpp>

#include "group.h"

namespace tpkernels {

namespace {

using std::chrono::milliseconds;

std::optional<Reduction> reduction_of(const c10d::ReduceOp& op, const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool integer = dtype == at::kLong || dtype == at::kInt || dtype == at::kShort ||
                       dtype == at::kChar || dtype == at::kByte;
  if (!integer && dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf &&
      dtype != at::kDouble)
    return std::nullopt;
  switch (static_cast<c10d::ReduceOp::RedOpType>(op)) {
    case c10d::ReduceOp::SUM:
      return Reduction::sum;
    case c10d::ReduceOp::MIN:
      return Reduction::min;
    case c10d::ReduceOp::MAX:
      return Reduction::max;
    case c10d::ReduceOp::AVG:
      TORCH_CHECK_VALUE(!integer, "ReduceOp.AVG of ", dtype,
                        ": the average of integers is none; take SUM, or a floating point dtype");
      return Reduction::mean;
    default:
      return std::nullopt;
  }
}

// A tensor as contiguous memory. write_back() matters where that is a copy.
class ContiguousMemory {
 public:
  explicit ContiguousMemory(const at::Tensor& tensor)
      : tensor_(tensor), memory_(tensor.contiguous()) {}
  char* data() const { return static_cast<char*>(memory_.data_ptr()); }
  int64_t bytes() const { return memory_.nbytes(); }
  void write_back() const {
    if (!memory_.is_same(tensor_)) tensor_.copy_(memory_);
  }

 private:
  at::Tensor tensor_, memory_;
};

const at::Tensor& only_tensor(const Tensors& tensors, const char* op) {
  TORCH_CHECK_VALUE(tensors.size() == 1, op, " takes one tensor a rank, got ", tensors.size());
  TORCH_CHECK_VALUE(tensors[0].is_cpu() && tensors[0].layout() == at::kStrided, op,
                    " on the shm transport takes dense CPU tensors, got ", tensors[0].device(),
                    ", ", tensors[0].layout());
  return tensors[0];
}

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
  void setTimeout(milliseconds timeout) override {
    shared_->timeout = timeout;
    fallback_->setTimeout(timeout);
  }
  void setSequenceNumberForGroup() override { fallback_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return fallback_->getSequenceNumberForGroup(); }

  WorkPointer allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    const auto& tensor = only_tensor(tensors, "all_reduce");
    const auto reduction = reduction_of(options.reduceOp, tensor);
    if (!reduction) return fallback_->allreduce(tensors, options);
    return shared_->run("shm:all_reduce", options.asyncOp, options.timeout, tensors,
                        [tensor, reduction](Collectives& c) {
                          const ContiguousMemory memory(tensor);
                          c.all_reduce(memory.data(), tensor.numel(), tensor.scalar_type(),
                                       *reduction);
                          memory.write_back();
                        });
  }

  WorkPointer allreduce_coalesced(Tensors& tensors,
                                  const c10d::AllreduceCoalescedOptions& options) override {
    return run_each(tensors.size(), [&](size_t i) {
      Tensors one{tensors[i]};
      return allreduce(one, options);
    });
  }

  WorkPointer broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    const auto& tensor = only_tensor(tensors, "broadcast");
    return shared_->run("shm:broadcast", options.asyncOp, options.timeout, tensors,
                        [tensor, root = options.rootRank](Collectives& c) {
                          const ContiguousMemory memory(tensor);
                          c.broadcast(memory.data(), memory.bytes(), root);
                          memory.write_back();
                        });
  }

  WorkPointer allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                        const c10d::AllgatherOptions& options) override {
    const auto& input = only_tensor(inputs, "all_gather");
    TORCH_CHECK_VALUE(outputs.size() == 1 && outputs[0].size() == static_cast<size_t>(getSize()),
                      "all_gather into ", getSize(), " ranks takes as many outputs");
    for (const auto& out : outputs[0])
      if (out.nbytes() != input.nbytes())
        return fallback_->allgather(outputs, inputs, options);  // which takes them, or says why not
    return shared_->run("shm:all_gather", options.asyncOp, options.timeout, outputs[0],
                        [input, outs = outputs[0]](Collectives& c) { gather(c, outs, input); });
  }

  WorkPointer _allgather_base(at::Tensor& output, at::Tensor& input,
                              const c10d::AllgatherOptions& options) override {
    only_tensor({input}, "all_gather");
    TORCH_CHECK_VALUE(
        output.numel() == input.numel() * getSize() && output.scalar_type() == input.scalar_type(),
        "all_gather's output must have ", getSize(),
        " times the input's elements, and its dtype; got ", output.sizes(), " of ",
        output.scalar_type(), " for ", input.sizes(), " of ", input.scalar_type());
    return shared_->run("shm:all_gather", options.asyncOp, options.timeout, {output},
                        [input, output, size = getSize()](Collectives& c) {
                          const ContiguousMemory memory(output);
                          const ContiguousMemory shard(input);
                          std::vector<char*> outs(size);
                          for (int r = 0; r < size; r++)
                            outs[r] = memory.data() + r * shard.bytes();
                          c.all_gather(outs, shard.data(), shard.bytes());
                          memory.write_back();
                        });
  }

  WorkPointer allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                              const c10d::AllgatherOptions& options) override {
    return run_each(inputs.size(),
                    [&](size_t i) { return _allgather_base(outputs[i], inputs[i], options); });
  }

  WorkPointer reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                             const c10d::ReduceScatterOptions& options) override {
    const auto& output = only_tensor(outputs, "reduce_scatter");
    TORCH_CHECK_VALUE(inputs.size() == 1 && inputs[0].size() == static_cast<size_t>(getSize()),
                      "reduce_scatter over ", getSize(), " ranks takes as many inputs");
    const auto reduction = reduction_of(options.reduceOp, output);
    bool even = true;
    for (const auto& input : inputs[0])
      even = even && input.numel() == output.numel() && input.scalar_type() == output.scalar_type();
    if (!reduction || !even) return fallback_->reduce_scatter(outputs, inputs, options);
    return shared_->run("shm:reduce_scatter", options.asyncOp, options.timeout, outputs,
                        [output, ins = inputs[0], reduction](Collectives& c) {
                          const ContiguousMemory memory(output);
                          std::vector<ContiguousMemory> held(ins.begin(), ins.end());
                          std::vector<const char*> terms;
                          for (const auto& input : held) terms.push_back(input.data());
                          c.reduce_scatter(memory.data(), terms, output.numel(),
                                           output.scalar_type(), *reduction);
                          memory.write_back();
                        });
  }

  WorkPointer _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                   const c10d::ReduceScatterOptions& options) override {
    only_tensor({input}, "reduce_scatter");
    TORCH_CHECK_VALUE(
        input.numel() == output.numel() * getSize() && output.scalar_type() == input.scalar_type(),
        "reduce_scatter's input must have ", getSize(),
        " times the output's elements, and its dtype; got ", input.sizes(), " of ",
        input.scalar_type(), " for ", output.sizes(), " of ", output.scalar_type());
    Tensors outputs{output};
    std::vector<Tensors> inputs{input.contiguous().view({getSize(), -1}).unbind()};
    return reduce_scatter(outputs, inputs, options);
  }

  WorkPointer reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                              const c10d::ReduceScatterOptions& options) override {
    return run_each(inputs.size(),
                    [&](size_t i) { return _reduce_scatter_base(outputs[i], inputs[i], options); });
  }

  WorkPointer alltoall_base(at::Tensor& output, at::Tensor& input,
                            std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
                            const c10d::AllToAllOptions& options) override {
    only_tensor({input}, "all_to_all");
    c10d::checkSplitSizes(input_splits, input, getSize());
    c10d::checkSplitSizes(output_splits, output, getSize());
    const auto split = [&](const at::Tensor& t, const std::vector<int64_t>& sizes) {
      return sizes.empty() ? t.tensor_split(getSize()) : t.split_with_sizes(sizes);
    };
    auto outputs = split(output, output_splits), inputs = split(input, input_splits);
    return alltoall(outputs, inputs, options);
  }

  WorkPointer alltoall(Tensors& outputs, Tensors& inputs,
                       const c10d::AllToAllOptions& options) override {
    TORCH_CHECK_VALUE(
        outputs.size() == static_cast<size_t>(getSize()) && inputs.size() == outputs.size(),
        "all_to_all over ", getSize(), " ranks takes as many inputs and outputs, got ",
        inputs.size(), " and ", outputs.size());
    for (const auto& t : inputs) only_tensor({t}, "all_to_all");
    return shared_->run("shm:all_to_all", options.asyncOp, options.timeout, outputs,
                        [outputs, inputs](Collectives& c) {
                          const std::vector<ContiguousMemory> out(outputs.begin(), outputs.end()),
                              in(inputs.begin(), inputs.end());
                          std::vector<char*> outs;
                          std::vector<const char*> ins;
                          std::vector<int64_t> out_bytes, in_bytes;
                          for (const auto& t : out)
                            outs.push_back(t.data()), out_bytes.push_back(t.bytes());
                          for (const auto& t : in)
                            ins.push_back(t.data()), in_bytes.push_back(t.bytes());
                          c.all_to_all(outs, out_bytes, ins, in_bytes);
                          for (const auto& t : out) t.write_back();
                        });
  }

  WorkPointer barrier(const c10d::BarrierOptions& options) override {
    return shared_->run("shm:barrier", options.asyncOp, options.timeout, {},
                        [](Collectives& c) { c.barrier(); });
  }

  WorkPointer allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    return fallback_->allreduce_sparse(tensors, options);
  }
  WorkPointer allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                  const c10d::AllgatherOptions& options) override {
    return fallback_->allgather_coalesced(outputs, inputs, options);
  }
  WorkPointer reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    return fallback_->reduce(tensors, options);
  }
  WorkPointer gather(std::vector<Tensors>& outputs, Tensors& inputs,
                     const c10d::GatherOptions& options) override {
    return fallback_->gather(outputs, inputs, options);
  }
  WorkPointer scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                      const c10d::ScatterOptions& options) override {
    return fallback_->scatter(outputs, inputs, options);
  }
  WorkPointer send(Tensors& tensors, int rank, int tag) override {
    return fallback_->send(tensors, rank, tag);
  }
  WorkPointer recv(Tensors& tensors, int rank, int tag) override {
    return fallback_->recv(tensors, rank, tag);
  }
  WorkPointer recvAnysource(Tensors& tensors, int tag) override {
    return fallback_->recvAnysource(tensors, tag);
  }
  void monitoredBarrier(const c10d::BarrierOptions& options, bool all) override {
    fallback_->monitoredBarrier(options, all);
  }

 private:
  static void gather(Collectives& c, const Tensors& outputs, const at::Tensor& input) {
    const std::vector<ContiguousMemory> memory(outputs.begin(), outputs.end());
    std::vector<char*> outs;
    for (const auto& out : memory) outs.push_back(out.data());
    const ContiguousMemory shard(input);
    c.all_gather(outs, shard.data(), shard.bytes());
    for (const auto& out : memory) out.write_back();
  }

  // Returns the last one's work, which stands for all: they run in order.
  template <typename F>
  WorkPointer run_each(size_t count, const F& start) {
    WorkPointer last = completed_work({});
    for (size_t i = 0; i < count; i++) last = start(i);
    return last;
  }

  const std::shared_ptr<ShmGroup> shared_;
  const std::string group_;
  const c10::intrusive_ptr<c10d::Backend> fallback_;
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
