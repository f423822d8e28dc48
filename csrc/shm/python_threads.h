// Python's lock and signals, where C++ waits on behalf of Python.
#pragma once

namespace tpkernels {

// Lets other threads use the interpreter while one exists, if this thread holds it.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();

 private:
  void* state_ = nullptr;  // PyThreadState
};

// Runs the handlers of signals that have arrived, such as Ctrl-C's, which raises KeyboardInterrupt.
// Python lets its main thread do that only; on others this does nothing.
void check_signals();

}  // namespace tpkernels
