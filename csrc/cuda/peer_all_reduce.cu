// The all-reduce kernels of include/tpkernels over buffers that Python rendezvoused through torch's
// symmetric memory.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tpkernels/all_reduce.cuh>

#include "../engine/peer_all_reduce.h"

namespace tpkernels {

static_assert(peer_buffer_bytes(16) == static_cast<int64_t>(buffer_bytes(16)));

namespace {

template <typename T>
T* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

template <typename T, int kRanks, bool kNorm>
auto kernel_of(bool one, bool multicast) {
  if (one) return one_shot<T, kRanks, kNorm>;
  if (multicast) return two_shot_multimem<T, kRanks, kNorm>;
  return two_shot<T, kRanks, kNorm>;
}

template <typename T, int kRanks>
void launch(const Arguments<T>& arguments, bool one, cudaStream_t stream) {
  const bool norm = arguments.normed != nullptr, multicast = arguments.multicast != nullptr;
  const int grid = grid_size(arguments.rows, arguments.columns, sizeof(T), norm);
  const auto kernel = norm ? kernel_of<T, kRanks, true>(one, multicast)
                           : kernel_of<T, kRanks, false>(one, multicast);
  kernel<<<grid, kThreads, 0, stream>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch(const Arguments<T>& arguments, int size, bool one, cudaStream_t stream) {
  switch (size) {
#define TPKERNELS_RANKS(n) \
  case n:                  \
    return launch<T, n>(arguments, one, stream);
    TPKERNELS_RANKS(2)
    TPKERNELS_RANKS(3)
    TPKERNELS_RANKS(4)
    TPKERNELS_RANKS(5)
    TPKERNELS_RANKS(6)
    TPKERNELS_RANKS(7)
    TPKERNELS_RANKS(8)
#undef TPKERNELS_RANKS
  }
  TORCH_CHECK(false, "peer memory is for 2 to ", kMaxRanks, " ranks, got ", size);
}

class SymmetricMemoryAllReduce : public PeerAllReduce {
 public:
  SymmetricMemoryAllReduce(at::Tensor buffer, int64_t peers, int64_t multicast, int64_t rank,
                           int64_t size, int64_t slot_bytes, int64_t one_shot_bytes)
      : buffer_(std::move(buffer)),
        epochs_(at::zeros({kMaxBlocks}, buffer_.options().dtype(at::kLong))),
        peers_(reinterpret_cast<char* const*>(peers)),
        multicast_(reinterpret_cast<char*>(multicast)),
        rank_(rank),
        size_(size),
        slot_bytes_(slot_bytes),
        one_shot_bytes_(one_shot_bytes),
        stream_(at::cuda::getCurrentCUDAStream(buffer_.device().index())) {}

  // Always: Python closes it before another group takes its name.
  bool belongs_to(c10d::ProcessGroup&) const override { return true; }

  bool supports(const at::Tensor& buffer) const override {
    const auto dtype = buffer.scalar_type();
    return buffer.is_cuda() &&
           (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) &&
           bytes_of(buffer) <= slot_bytes_;
  }

  bool fuses_norm() const override { return true; }

  void all_reduce(StagedTerm staged, const at::Tensor& /*out: in place*/,
                  const Epilogue& epilogue) override {
    const auto& buffer = staged.term;
    const c10::cuda::CUDAGuard guard(buffer.device());
    const auto stream = at::cuda::getCurrentCUDAStream();
    // Launches follow one another, whatever streams they are on. A graph's capture begins after all
    // earlier work, by torch's own doing.
    if (stream != stream_ &&
        c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None) {
      at::cuda::CUDAEvent launched;
      launched.record(stream_);
      launched.block(stream);
    }
    stream_ = stream;
    switch (buffer.scalar_type()) {
      case at::kFloat:
        return reduce<float>(buffer, epilogue, stream);
      case at::kHalf:
        return reduce<__half>(buffer, epilogue, stream);
      default:
        return reduce<__nv_bfloat16>(buffer, epilogue, stream);
    }
  }

 private:
  static int64_t bytes_of(const at::Tensor& buffer) {
    return tpkernels::slot_bytes(buffer.size(0), buffer.size(1),
                                 static_cast<int>(buffer.element_size()));
  }

  template <typename T>
  void reduce(const at::Tensor& buffer, const Epilogue& epilogue, cudaStream_t stream) {
    Arguments<T> arguments{};
    const bool one = bytes_of(buffer) <= one_shot_bytes_;
    arguments.peers = peers_;
    arguments.multicast = one ? nullptr : multicast_;
    arguments.epochs = static_cast<Epoch*>(epochs_.data_ptr());
    arguments.slot_bytes = slot_bytes_;
    arguments.rank = rank_;
    arguments.rows = buffer.size(0);
    arguments.columns = buffer.size(1);
    arguments.input = arguments.output = pointer<T>(buffer);
    arguments.bias = pointer<T>(epilogue.bias);
    arguments.residual = pointer<T>(epilogue.residual);
    arguments.normed = pointer<T>(epilogue.normed);
    arguments.weight = pointer<T>(epilogue.weight);
    arguments.epsilon = epilogue.eps;
    launch(arguments, size_, one, stream);
  }

  const at::Tensor buffer_, epochs_;  // kept alive: peers read the one, kernels of graphs the other
  char* const* const peers_;
  char* const multicast_;
  const int rank_, size_;
  const int64_t slot_bytes_, one_shot_bytes_;
  c10::cuda::CUDAStream stream_;  // of the last launch
};

// `buffer` is this rank's symmetric buffer, zeroed on all ranks. `peers` points to the addresses of
// the ranks' buffers, an array in device memory.
void open_peer_memory(const std::string& group, const at::Tensor& buffer, int64_t peers,
                      int64_t multicast, int64_t rank, int64_t size, int64_t slot_bytes,
                      int64_t one_shot_bytes) {
  TORCH_CHECK(size >= 2 && size <= kMaxRanks, "peer memory is for 2 to ", kMaxRanks, " ranks, got ",
              size);
  TORCH_CHECK(static_cast<size_t>(buffer.nbytes()) >= buffer_bytes(slot_bytes), "the buffer has ",
              buffer.nbytes(), " bytes, two slots of ", slot_bytes, " and flags need ",
              buffer_bytes(slot_bytes));
  TORCH_CHECK(slot_bytes % kVectorBytes == 0, "slot_bytes must be a multiple of ", kVectorBytes,
              ", got ", slot_bytes);
  TORCH_CHECK(multicast == 0 || at::cuda::getDeviceProperties(buffer.device().index())->major >= 9,
              "multimem needs sm_90 or newer");
  const c10::cuda::CUDAGuard guard(buffer.device());
  set_peer_all_reduce(group, std::make_shared<SymmetricMemoryAllReduce>(
                                 buffer, peers, multicast, rank, size, slot_bytes, one_shot_bytes));
}

}  // namespace

TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { m.impl("open_peer_memory", &open_peer_memory); }

}  // namespace tpkernels
