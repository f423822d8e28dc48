// The c10d backend `shm`: collectives of CPU tensors over memory that the ranks of one host share.
#pragma once

#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace tpkernels {

// Collective: every rank of the group must call it. It raises on all of them or on none.
// `fallback`, a gloo backend of the same ranks, does what shm lacks: other collectives, reductions
// and dtypes. The engine finds the group's shared memory by the name `group`.
c10::intrusive_ptr<c10d::Backend> shm_backend(const c10::intrusive_ptr<c10d::Store>& store,
                                              int rank, int size, double timeout_seconds,
                                              const std::string& group,
                                              const c10::intrusive_ptr<c10d::Backend>& fallback);

}  // namespace tpkernels
