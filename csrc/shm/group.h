// The shared memory of a group's ranks and the order of its collectives. It serves the c10d backend
// and, as a PeerAllReduce, the engine.
#pragma once

#include <ATen/ThreadLocalState.h>
#include <ATen/record_function.h>

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

using Tensors = std::vector<at::Tensor>;
using WorkPointer = c10::intrusive_ptr<c10d::Work>;

// The work of a collective that was done when its call returned.
WorkPointer completed_work(Tensors outputs);

class ShmGroup : public PeerAllReduce {
 public:
  ShmGroup(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
           std::chrono::milliseconds timeout);
  ~ShmGroup() override { ring_.leave(); }

  // Runs `body(collectives)` after everything that was called before it: now, or if `async` when
  // somebody waits for it, or meanwhile. `limit` is the timeout of each wait, 0 the group's.
  template <typename F>
  WorkPointer run(const char* name, bool async, std::chrono::milliseconds limit, Tensors outputs,
                  F body);

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

  const Segments segments_;
  Ring ring_;
  Collectives collectives_;
  Queue queue_;
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
WorkPointer ShmGroup::run(const char* name, bool async, std::chrono::milliseconds limit,
                          Tensors outputs, F body) {
  const auto wait = limit > std::chrono::milliseconds(0) ? limit : timeout;
  auto call = [this, name, wait, body = std::move(body)] {
    const BelowAutograd below;
    RECORD_FUNCTION(name, std::vector<c10::IValue>());
    translate([&] {
      collectives_.timeout = wait;
      body(collectives_);
    });
  };
  if (!async) {
    const Queue::Lock lock(queue_);
    call();
    return completed_work(std::move(outputs));
  }
  return queue_.push(
      [call = std::move(call), state = at::ThreadLocalState()] {
        const at::ThreadLocalStateGuard guard(state);
        call();
      },
      std::move(outputs));
}

}  // namespace tpkernels
