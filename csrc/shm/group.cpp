#include "group.h"

#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "python_threads.h"

namespace tpkernels {

namespace {

constexpr int64_t MAX_SLOT_BYTES = 8 << 20;

// Counts the forks that led to this process. A call of getpid would cost each collective a system
// call.
int forks() {
  static std::atomic<int> count = 0;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { count++; });
  TORCH_INTERNAL_ASSERT(registered == 0);
  return count.load(std::memory_order_relaxed);
}

void* data_or_null(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

}  // namespace

ShmGroup::ShmGroup(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                   std::chrono::milliseconds timeout)
    : timeout(timeout),
      forks_(forks()),
      segments_(store, rank, size, MAX_SLOT_BYTES),
      ring_(segments_.addresses(), segments_.processes(), rank, segments_.slot_bytes(),
            segments_.oversubscribed(), &Collectives::describe, &check_signals),
      collectives_(ring_, segments_.threads()),
      queue_(std::make_shared<Queue>()) {}

ShmGroup::~ShmGroup() {
  leave();
  if (forks() == forks_) queue_->stop();  // a forked child has no such thread
}

void ShmGroup::leave() {
  if (forks() == forks_) ring_.leave();  // the parent of a forked child goes on
}

void ShmGroup::check_process() const {
  TORCH_CHECK_WITH(DistBackendError, forks() == forks_, "shm transport: this process (", getpid(),
                   ") was forked from the rank whose group this is: it must not call its "
                   "collectives; start a group in the child");
}

bool ShmGroup::belongs_to(c10d::ProcessGroup& group) const {
  const auto types = group.getDeviceTypes();
  const bool on_cpu = std::count(types.begin(), types.end(), c10::kCPU) > 0;
  return on_cpu && group.getBackend(c10::kCPU).get() == backend;
}

bool ShmGroup::supports(const at::Tensor& buffer) const {
  const bool floating = at::isFloatingType(buffer.scalar_type()) && buffer.element_size() > 1;
  const int64_t row_bytes = buffer.size(1) * buffer.element_size();
  return buffer.is_cpu() && floating && row_bytes <= ring_.slot_bytes();
}

int64_t ShmGroup::max_rows(const at::Tensor& out) const {
  return collectives_.max_rows(std::max<int64_t>(1, out.size(1)) * out.element_size());
}

StagedTerm ShmGroup::stage(const at::Tensor& out) {
  check_process();
  auto lock = std::make_shared<Queue::Guard>(*queue_);
  return {at::from_blob(ring_.local_slot(), out.sizes(), out.options()), std::move(lock)};
}

void ShmGroup::all_reduce(StagedTerm staged, const at::Tensor& out, const Epilogue& epilogue) {
  RECORD_FUNCTION("shm:all_reduce", std::vector<c10::IValue>());
  translate([&] {
    const auto dtype = out.scalar_type();
    if (!staged.lock) {  // `out` is not in the segment yet
      check_process();
      const Queue::Guard guard(*queue_);
      collectives_.timeout = timeout;
      auto* const data = static_cast<char*>(out.data_ptr());
      return collectives_.all_reduce(data, out.numel(), dtype, Reduction::sum);
    }
    collectives_.timeout = timeout;
    ReduceArgs args{};
    args.dtype = dtype;
    args.reduction = Reduction::sum;
    args.out = out.data_ptr();
    args.columns = out.size(1);
    args.bias = data_or_null(epilogue.bias);
    args.residual = {data_or_null(epilogue.residual), out.size(1)};
    collectives_.sum_rows(args, out.size(0));
  });
}

}  // namespace tpkernels
