// Runs the collectives of one group in the order of their calls. The caller runs them, or a thread
// if the caller does something else.
//
// A work holds the group until the callbacks of its future have returned. What they call themselves
// runs at once, before whatever was called after the work: so all ranks keep one order, whichever
// thread ran the callbacks. It cannot be left for later, as a callback may wait for its future,
// which runs nothing.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>

#include "tensors.h"

namespace tpkernels {

class Queue : public std::enable_shared_from_this<Queue> {
 public:
  // A collective. Whoever waits for it runs it, with what was called before it, unless another
  // thread has begun.
  class Work : public c10d::Work {
   public:
    // The profiler shows it as `name`, with the shapes of `inputs`.
    Work(std::shared_ptr<Queue> queue, c10d::OpType op, const char* name, const Tensors& inputs,
         Tensors outputs, std::function<void()> body = nullptr);
    bool wait(std::chrono::milliseconds timeout) override;
    Tensors result() override { return outputs_; }
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
    // Runs `body` as this work, in the caller's hold of the group. An error is left in the work.
    template <typename F>
    void run(const F& body) {
      std::exception_ptr error;
      try {
        body();
      } catch (...) {
        error = std::current_exception();
      }
      complete(error);
    }

    // Runs what it was made with.
    void run() { run(std::exchange(body_, nullptr)); }
    // Runs `body` in the caller's hold of the group, before anybody else has this work, so that no
    // lock is needed. An error is raised.
    template <typename F>
    void run_unshared(const F& body) {
      try {
        body();
      } catch (...) {
        finish(std::current_exception());
        throw;
      }
      settled_ = true;
      if (recordFunctionEndCallback_) return finish();
      completed_ = true;
    }

   private:
    void complete(const std::exception_ptr& error);
    void settle(c10::ivalue::Future& future) const;

    const std::shared_ptr<Queue> queue_;  // null: it has run before anybody can wait for it
    const Tensors outputs_;
    std::function<void()> body_;
    // Made when somebody asks for it. Both are under the mutex of c10d's Work.
    c10::intrusive_ptr<c10::ivalue::Future> future_;
    bool settled_ = false;  // what asks from now on settles its future itself
  };
  using WorkPointer = c10::intrusive_ptr<Work>;

  // Holds the group: what other threads call waits.
  class Guard {
   public:
    explicit Guard(Queue& queue) : queue_(queue) { queue_.begin(); }
    ~Guard() { queue_.end(); }
    Guard(const Guard&) = delete;

   private:
    Queue& queue_;
  };

  // Runs `work` when somebody waits for it, or meanwhile; at once if this thread holds the group.
  void push(WorkPointer work);
  // Runs what is left, and ends the thread. Nothing may be called afterwards.
  void stop();

 private:
  using Lock = std::unique_lock<std::mutex>;

  void begin();
  void end();
  // Ends one guard, with the mutex held.
  void release();
  // Runs what is queued until `done`. It raises if `done` can never come.
  template <typename F>
  void help(Lock& lock, const F& done);
  void run_front(Lock& lock);
  void serve();

  std::mutex mutex_;
  std::condition_variable changed_, pushed_;
  std::deque<WorkPointer> works_;
  std::thread::id owner_;  // holds the group
  int depth_ = 0;          // guards within guards
  bool stopping_ = false;
  std::thread thread_;  // from the first asynchronous collective on
};

}  // namespace tpkernels
