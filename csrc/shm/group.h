// The shared memory of a group's ranks and the order of its collectives. It serves the c10d backend
// and, as a PeerAllReduce, the engine.
#pragma once

#include <ATen/ThreadLocalState.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>
#include <vector>

#include "../engine/peer_all_reduce.h"
#include "../op.h"
#include "collectives.h"
#include "queue.h"
#include "segments.h"

namespace tpkernels {

using WorkPointer = c10::intrusive_ptr<c10d::Work>;

// A call of a collective, as the backend gets it.
struct Call {
  c10d::OpType op;
  const char* name;  // the profiler's
  bool async;
  std::chrono::milliseconds timeout;  // of each wait; 0: the group's
  const Tensors& inputs;              // the profiler shows their shapes
  const Tensors& outputs;             // the result of its work
};

class ShmGroup : public PeerAllReduce {
 public:
  ShmGroup(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
           std::chrono::milliseconds timeout);
  ~ShmGroup() override;

  // Takes this rank out: its peers raise at once where they would wait for it.
  void leave();
  // Runs `body(collectives)` after everything that was called before it: now, or if the call is
  // asynchronous when somebody waits for it, or meanwhile.
  template <typename F>
  WorkPointer run(const Call& call, F body);

  // PeerAllReduce
  bool belongs_to(c10d::ProcessGroup& group) const override;
  bool supports(const at::Tensor& buffer) const override;
  int64_t max_rows(const at::Tensor& out) const override;
  StagedTerm stage(const at::Tensor& out) override;
  void all_reduce(StagedTerm staged, const at::Tensor& out, const Epilogue& epilogue) override;
  bool synchronous() const override { return true; }

  std::chrono::milliseconds timeout;
  const c10d::Backend* backend = nullptr;  // of this group

 private:
  // Raises the ring's errors as torch's.
  template <typename F>
  static void translate(const F& f);
  // A forked child has the group's memory, but is none of its ranks.
  void check_process() const;

  const int forks_;  // of the process and its parents when the group was made
  const Segments segments_;
  Ring ring_;
  Collectives collectives_;
  const std::shared_ptr<Queue> queue_;
};

template <typename F>
void ShmGroup::translate(const F& f) {
  try {
    f();
  } catch (const RingError& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "shm transport: ", error.what());
  }
}

template <typename F>
WorkPointer ShmGroup::run(const Call& call, F body) {
  check_process();
  const auto wait = call.timeout > std::chrono::milliseconds(0) ? call.timeout : timeout;
  auto run = [this, wait, body = std::move(body)] {
    const BelowAutograd below;
    translate([&] {
      collectives_.timeout = wait;
      body(collectives_);
    });
  };
  if (!call.async) {
    auto work =
        c10::make_intrusive<Queue::Work>(nullptr, call.op, call.name, call.inputs, call.outputs);
    const Queue::Guard guard(*queue_);
    work->run_unshared(run);
    return work;
  }
  auto work =
      c10::make_intrusive<Queue::Work>(queue_, call.op, call.name, call.inputs, call.outputs,
                                       [run = std::move(run), state = at::ThreadLocalState()] {
                                         const at::ThreadLocalStateGuard guard(state);
                                         run();
                                       });
  queue_->push(work);
  return work;
}

}  // namespace tpkernels
