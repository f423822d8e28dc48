#include "gloo_work.h"

#include <utility>

namespace tpkernels {

GlooWork::GlooWork(c10d::OpType op, const char* name, const Tensors& inputs,
                   c10::intrusive_ptr<c10d::Work> work, Memories written, Memories sent)
    : c10d::Work(-1, op, name, inputs),
      work_(std::move(work)),
      written_(std::move(written)),
      sent_(std::move(sent)) {}

void GlooWork::complete() {
  std::call_once(completed_once_, [this] {
    write_back(written_);
    finish();
  });
}

bool GlooWork::isCompleted() {
  if (!work_->isCompleted()) return false;
  if (!work_->exception()) complete();
  return true;
}

bool GlooWork::wait(std::chrono::milliseconds timeout) {
  const bool done = work_->wait(timeout);
  if (done) complete();
  return done;
}

Tensors GlooWork::result() {
  if (written_.empty()) return work_->result();
  Tensors all;
  for (const auto& memory : written_) all.push_back(memory.tensor());
  return all;
}

c10::intrusive_ptr<c10::ivalue::Future> GlooWork::getFuture() {
  const auto self = c10::intrusive_ptr<GlooWork>::reclaim_copy(this);
  auto inner = work_->getFuture();
  return inner->then(
      [self](c10::ivalue::Future& future) -> c10::IValue {
        if (future.hasError()) std::rethrow_exception(future.exception_ptr());
        self->complete();
        return self->written_.empty() ? future.value() : c10::IValue(self->result());
      },
      inner->elementType());
}

}  // namespace tpkernels
