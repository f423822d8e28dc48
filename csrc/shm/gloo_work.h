// The work of a collective that shm leaves to gloo: under shm's name in the profiler, and with the
// results copied to tensors that are not contiguous.
#pragma once

#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "tensors.h"

namespace tpkernels {

class GlooWork : public c10d::Work {
 public:
  // When `work` is done, what it wrote goes to the tensors of `written`; `sent` lives until then.
  GlooWork(c10d::OpType op, const char* name, const Tensors& inputs,
           c10::intrusive_ptr<c10d::Work> work, Memories written, Memories sent);
  bool isCompleted() override;
  bool isSuccess() const override { return work_->isSuccess(); }
  std::exception_ptr exception() const override { return work_->exception(); }
  int sourceRank() const override { return work_->sourceRank(); }
  bool wait(std::chrono::milliseconds timeout) override;
  void synchronize() override { wait(kNoTimeout); }
  void abort() override { work_->abort(); }
  Tensors result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  // Copies the results once, and ends the profiler's range.
  void complete();

  const c10::intrusive_ptr<c10d::Work> work_;
  const Memories written_, sent_;
  std::once_flag completed_once_;
};

}  // namespace tpkernels
