// The c10d backend `shm`: collectives of CPU tensors over memory that the ranks of one host share.
#pragma once

#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace tpkernels {

// The ranks must all call it; it raises on all of them or on none. `rest`, a gloo of the same
// ranks, does what shm lacks: other collectives, reductions and dtypes. `group`: the name by which
// the engine finds it.
c10::intrusive_ptr<c10d::Backend> shm_backend(const c10::intrusive_ptr<c10d::Store>& store,
                                              int rank, int size, double seconds,
                                              const std::string& group,
                                              const c10::intrusive_ptr<c10d::Backend>& rest);

}  // namespace tpkernels
