// Runs the collectives of one group in the order of their calls. The caller runs them, or a thread
// if the caller does something else.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/Work.hpp>

namespace tpkernels {

class Queue {
 public:
  // An asynchronous collective. Whoever waits for it runs it, with what was called before it,
  // unless the thread has begun.
  class Work : public c10d::Work {
   public:
    Work(Queue& queue, std::function<void()> run, std::vector<at::Tensor> outputs);
    bool wait(std::chrono::milliseconds timeout) override;
    std::vector<at::Tensor> result() override { return outputs_; }
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
    void run();

   private:
    Queue& queue_;
    std::function<void()> run_;
    std::vector<at::Tensor> outputs_;
    c10::intrusive_ptr<c10::ivalue::Future> future_;
  };

  // A lock guard: nothing else of the group runs while one exists.
  class Lock {
   public:
    Lock() = default;
    explicit Lock(Queue& queue) : queue_(&queue) { queue.begin(); }
    Lock(Lock&& other) noexcept : queue_(std::exchange(other.queue_, nullptr)) {}
    ~Lock() {
      if (queue_) queue_->end();
    }

   private:
    Queue* queue_ = nullptr;
  };

  ~Queue();
  c10::intrusive_ptr<c10d::Work> push(std::function<void()> run, std::vector<at::Tensor> outputs);

 private:
  void begin();
  void end();
  // Runs what is queued until `done`.
  template <typename F>
  void help(std::unique_lock<std::mutex>& lock, const F& done);
  void run_front(std::unique_lock<std::mutex>& lock);
  void serve();

  std::mutex mutex_;
  std::condition_variable changed_, pushed_;
  std::deque<c10::intrusive_ptr<Work>> works_;
  bool running_ = false, stopping_ = false;
  std::thread thread_;  // from the first asynchronous collective on
};

}  // namespace tpkernels
