// The headers of torch that cost every file seconds to parse, compiled once for all of csrc/*.cpp
// (setup.py). Nothing of ours: a file includes what it uses, so that it also compiles without this.
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
