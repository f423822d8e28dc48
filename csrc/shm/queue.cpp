#include "queue.h"

#include <ATen/record_function.h>

#include "python_threads.h"

namespace tpkernels {

namespace {
// The thread leaves this much time to the caller, which mostly waits at once and then needs no
// other thread on its core.
constexpr auto HEAD_START = std::chrono::microseconds(200);
// How long a waiting thread sleeps before it looks for signals.
constexpr auto NAP = std::chrono::milliseconds(50);

// A profiler sees them. Without one, c10d would make a range and copy the list for nothing.
const char* shown_name(const char* name) { return at::hasCallbacks() ? name : nullptr; }
std::optional<Tensors> shown_inputs(const Tensors& inputs) {
  return at::hasCallbacks() ? std::optional(inputs) : std::nullopt;
}
}  // namespace

Queue::Work::Work(std::shared_ptr<Queue> queue, c10d::OpType op, const char* name,
                  const Tensors& inputs, Tensors outputs, std::function<void()> body)
    : c10d::Work(-1, op, shown_name(name), shown_inputs(inputs)),
      queue_(std::move(queue)),
      outputs_(std::move(outputs)),
      body_(std::move(body)) {}

void Queue::Work::complete(const std::exception_ptr& error) {
  // Before the callbacks, which may wait for this work.
  finish(error);
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    settled_ = true;
    future = future_;
  }
  if (future) settle(*future);
}

c10::intrusive_ptr<c10::ivalue::Future> Queue::Work::getFuture() {
  bool late = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!future_) {
      future_ =
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
      late = settled_;
    }
  }
  if (late) settle(*future_);
  return future_;
}

void Queue::Work::settle(c10::ivalue::Future& future) const {
  if (const auto error = exception()) {
    future.setError(error);
  } else {
    future.markCompleted(outputs_);
  }
}

bool Queue::Work::wait(std::chrono::milliseconds /*timeout: that of the collective holds*/) {
  if (!queue_) return true;
  if (!isCompleted()) {
    Lock lock(queue_->mutex_);
    queue_->help(lock, [this] { return isCompleted(); });
  }
  if (const auto error = exception()) std::rethrow_exception(error);
  return true;
}

void Queue::push(WorkPointer work) {
  {
    Lock lock(mutex_);
    if (owner_ == std::this_thread::get_id()) {
      lock.unlock();
      return work->run();
    }
    works_.push_back(std::move(work));
    if (!thread_.joinable()) thread_ = std::thread([self = shared_from_this()] { self->serve(); });
  }
  pushed_.notify_one();
}

void Queue::stop() {
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  pushed_.notify_all();
  changed_.notify_all();
  if (thread_.joinable()) {
    // The thread may need the interpreter, for a callback or to drop a tensor.
    const WithoutGil released;
    if (thread_.get_id() == std::this_thread::get_id()) {
      thread_.detach();  // a callback dropped the group
    } else {
      thread_.join();
    }
  }
  Lock lock(mutex_);
  while (!works_.empty()) run_front(lock);  // which fails, the ring having been left
}

void Queue::begin() {
  Lock lock(mutex_);
  const auto self = std::this_thread::get_id();
  if (owner_ != self) {
    help(lock, [&] { return owner_ == std::thread::id() && works_.empty(); });
    owner_ = self;
  }
  depth_++;
}

void Queue::end() {
  const Lock lock(mutex_);
  release();
}

void Queue::release() {
  if (--depth_ == 0) owner_ = std::thread::id();
  changed_.notify_all();
}

template <typename F>
void Queue::help(Lock& lock, const F& done) {
  while (!done()) {
    const bool own = owner_ == std::this_thread::get_id();
    if (!works_.empty() && (own || owner_ == std::thread::id())) {
      run_front(lock);
    } else {
      TORCH_CHECK(!own, "a callback waits for a collective that cannot come before it returns");
      changed_.wait_for(lock, NAP);
      lock.unlock();
      check_signals();
      lock.lock();
    }
  }
}

void Queue::run_front(Lock& lock) {
  auto work = std::move(works_.front());
  works_.pop_front();
  owner_ = std::this_thread::get_id();
  depth_++;
  lock.unlock();
  work->run();
  // Its tensors may need the interpreter, whose lock another thread may hold that waits for ours.
  work.reset();
  lock.lock();
  release();
}

void Queue::serve() {
  Lock lock(mutex_);
  while (!stopping_) {
    if (works_.empty()) {
      pushed_.wait(lock);
      if (stopping_) break;
      pushed_.wait_for(lock, HEAD_START, [this] { return stopping_; });
    } else if (owner_ != std::thread::id()) {
      changed_.wait(lock);
    } else {
      run_front(lock);
    }
  }
}

}  // namespace tpkernels
