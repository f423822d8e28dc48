#include "queue.h"

namespace tpkernels {

namespace {
// The thread leaves this much time to the caller, which mostly waits at once and then needs no
// other thread on its core.
constexpr auto HEAD_START = std::chrono::microseconds(200);
}  // namespace

Queue::Work::Work(Queue& queue, std::function<void()> run, std::vector<at::Tensor> outputs)
    : queue_(queue),
      run_(std::move(run)),
      outputs_(std::move(outputs)),
      future_(
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {
}

void Queue::Work::run() {
  std::exception_ptr error;
  try {
    run_();
  } catch (...) {
    error = std::current_exception();
  }
  run_ = nullptr;
  if (error) {
    future_->setError(error);
  } else {
    future_->markCompleted(outputs_);
  }
  finish(error);
}

bool Queue::Work::wait(std::chrono::milliseconds /*timeout: that of the collective holds*/) {
  if (!isCompleted()) {
    std::unique_lock<std::mutex> lock(queue_.mutex_);
    queue_.help(lock, [this] { return isCompleted(); });
  }
  if (const auto error = exception()) std::rethrow_exception(error);
  return true;
}

Queue::~Queue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  pushed_.notify_all();
  if (thread_.joinable()) thread_.join();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!works_.empty()) run_front(lock);  // which fails, the ring having been left
}

c10::intrusive_ptr<c10d::Work> Queue::push(std::function<void()> run,
                                           std::vector<at::Tensor> outputs) {
  auto work = c10::make_intrusive<Work>(*this, std::move(run), std::move(outputs));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    works_.push_back(work);
    if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
  }
  pushed_.notify_one();
  return work;
}

void Queue::begin() {
  std::unique_lock<std::mutex> lock(mutex_);
  help(lock, [this] { return !running_ && works_.empty(); });
  running_ = true;
}

void Queue::end() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    running_ = false;
  }
  changed_.notify_all();
}

template <typename F>
void Queue::help(std::unique_lock<std::mutex>& lock, const F& done) {
  while (!done()) {
    if (running_ || works_.empty()) {
      changed_.wait(lock);
    } else {
      run_front(lock);
    }
  }
}

void Queue::run_front(std::unique_lock<std::mutex>& lock) {
  const auto work = std::move(works_.front());
  works_.pop_front();
  running_ = true;
  lock.unlock();
  work->run();
  lock.lock();
  running_ = false;
  changed_.notify_all();
}

void Queue::serve() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (works_.empty()) {
      pushed_.wait(lock);
      if (stopping_) break;
      pushed_.wait_for(lock, HEAD_START, [this] { return stopping_; });
    } else if (running_) {
      changed_.wait(lock);
    } else {
      run_front(lock);
    }
  }
}

}  // namespace tpkernels
