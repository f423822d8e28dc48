// All-reduces of small tensors over peer memory, with the epilogue of a row-parallel layer: bias,
// residual, RMSNorm. W is the tensor's bytes, n the number of ranks.
//
//   one_shot             copy in | barrier | sum all slots
//                        each rank reads W * n
//   two_shot             copy in | barrier | sum own slice | barrier | gather the slices
//                        each rank reads 2 * W
//   two_shot_multimem    the same, but the NVLink switch sums a slice and spreads it
//                        from sm_90 on, NVLS only
//
// A launch is kernel<T, kRanks, kNorm><<<grid_size(...), kThreads, 0, stream>>>(arguments), with
// the same shape, grid and kernel on every rank and no programmatic dependent launch; launches that
// share a buffer share a stream. It may be captured in a graph.
#pragma once

#include "barrier.cuh"
#include "block_sum.cuh"
#include "multimem.cuh"
#include "vector.cuh"

namespace tpkernels {

template <typename T>
struct Arguments {
  // The ranks' symmetric buffers, an array in device memory. Each has buffer_bytes(slot_bytes),
  // 16-byte aligned.
  char* const* peers;
  // The same buffers behind one multicast address; for two_shot_multimem only.
  char* multicast;
  // This rank's own kMaxBlocks words of device memory, zero at first.
  Epoch* epochs;
  // The same for the buffer's life: a multiple of 16, at least slot_bytes(...) of every launch.
  size_t slot_bytes;
  int rank;
  // The shape of every tensor here but bias and weight [columns]. All are contiguous and have fewer
  // than 2^31 elements.
  int rows, columns;
  const T* input;
  T* output;          // sum + bias + residual, rounded once; may be `input`
  const T* bias;      // or null
  const T* residual;  // or null; none of the tensors that are written
  // kNorm only: normed = output * rsqrt(mean(output^2) + epsilon) * weight, in fp32, rounded once.
  T* normed;
  const T* weight;
  float epsilon;
};

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// Bytes that a launch takes of each slot: rows padded to 16 bytes.
constexpr size_t slot_bytes(int64_t rows, int64_t columns, int element_size) {
  return rows * ceil_div<int64_t>(columns * element_size, kVectorBytes) * kVectorBytes;
}

// Bytes of a rank's symmetric buffer with two such slots. The buffer must be zero, on all ranks,
// before the first launch.
constexpr size_t buffer_bytes(size_t slot_bytes) { return kFlagBytes + 2 * slot_bytes; }

// Blocks of a launch: a function of arguments that all ranks share. 0 means that there is nothing
// to do: do not launch. With the norm a block works on whole rows.
constexpr int grid_size(int64_t rows, int64_t columns, int element_size, bool norm) {
  int64_t blocks =
      ceil_div<int64_t>(slot_bytes(rows, columns, element_size), kThreads * kVectorBytes);
  if (norm && columns) blocks = rows;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// The vectors that a block works on: the same on every rank, in all phases, so that block b waits
// for no block but b of its peers. The vectors, row after row, are cut into segments. Segment s
// belongs to block s modulo the grid. With the norm a segment is a row, without it there is one for
// each block.
template <typename T, bool kNorm>
struct Partition {
  int columns, row_vectors, vectors, segments, length, slice;

  __device__ __forceinline__ Partition(const Arguments<T>& a, int ranks)
      : columns(a.columns),
        row_vectors(ceil_div<int>(a.columns, Vector<T>::kSize)),
        vectors(a.rows * row_vectors),
        segments(kNorm ? a.rows : gridDim.x),
        length(kNorm ? row_vectors : ceil_div<int>(vectors, gridDim.x)),
        slice(ceil_div(length, ranks)) {}

  __device__ __forceinline__ int end(int segment) const {
    return min(length, vectors - segment * length);
  }
};

// A vector of a slot, in the tensors.
template <typename T>
struct Position {
  size_t offset;  // of its first element
  int column, count;

  template <bool kNorm>
  __device__ __forceinline__ Position(const Partition<T, kNorm>& partition, int vector) {
    const int row = vector / partition.row_vectors;
    column = (vector - row * partition.row_vectors) * Vector<T>::kSize;
    offset = static_cast<size_t>(row) * partition.columns + column;
    count = min(Vector<T>::kSize, partition.columns - column);
  }
};

// Calls body(vector) for this thread's share of the block's vectors. The share is the same in every
// phase that uses it, so that `output` may be `input` and a thread may read again its own values.
template <typename T, bool kNorm, typename Body>
__device__ __forceinline__ void for_each_vector(const Partition<T, kNorm>& partition, int segment,
                                                Body body) {
  const int first = segment * partition.length, end = partition.end(segment);
  for (int i = threadIdx.x; i < end; i += blockDim.x) body(first + i);
}

template <typename T, bool kNorm>
__device__ __forceinline__ void copy_in(const Arguments<T>& a, const Partition<T, kNorm>& partition,
                                        Vector<T>* slot) {
  for (int segment = blockIdx.x; segment < partition.segments; segment += gridDim.x) {
    for_each_vector(partition, segment, [&](int vector) {
      const Position<T> position(partition, vector);
      store(slot + vector, load_vector(a.input + position.offset, position.count));
    });
  }
}

// Sums in rank order on every rank: all get the same bits.
template <typename T, int kRanks>
__device__ __forceinline__ Accumulator<T> sum_slots(Vector<T>* const (&slots)[kRanks], int vector) {
  Vector<T> parts[kRanks];
#pragma unroll
  for (int rank = 0; rank < kRanks; ++rank) parts[rank] = load(slots[rank] + vector);
  Accumulator<T> sum(parts[0]);
#pragma unroll
  for (int rank = 1; rank < kRanks; ++rank) sum.add(parts[rank]);
  return sum;
}

// sum() + bias + residual in fp32, rounded once. Bias and residual are loaded first, to be under
// way together with the peers' data.
template <typename T, typename Sum>
__device__ __forceinline__ Vector<T> add_bias_residual(const Arguments<T>& a,
                                                       const Position<T>& position, Sum sum) {
  Vector<T> bias{}, residual{};
  if (a.bias != nullptr) bias = load_vector(a.bias + position.column, position.count);
  if (a.residual != nullptr) residual = load_vector(a.residual + position.offset, position.count);
  Accumulator<T> total = sum();
  if (a.bias != nullptr) total.add(bias);
  if (a.residual != nullptr) total.add(residual);
  return total.round();
}

// Writes result(vector, position) to `output`, and its norm to `normed`.
template <typename T, bool kNorm, typename Result>
__device__ __forceinline__ void finish(const Arguments<T>& a, const Partition<T, kNorm>& partition,
                                       Result result) {
  for (int segment = blockIdx.x; segment < partition.segments; segment += gridDim.x) {
    float squares = 0.f;
    for_each_vector(partition, segment, [&](int vector) {
      const Position<T> position(partition, vector);
      const Vector<T> h = result(vector, position);
      store_vector(a.output + position.offset, h, position.count);
      if constexpr (kNorm) {
        // Past the row's end h is zero, as are the slots and all that is added.
        const Accumulator<T> opmath(h);
#pragma unroll
        for (float x : opmath.lanes) squares += x * x;
      }
    });
    if constexpr (kNorm) {
      const float scale = rsqrtf(block_sum(squares) / partition.columns + a.epsilon);
      for_each_vector(partition, segment, [&](int vector) {
        const Position<T> position(partition, vector);
        Accumulator<T> y(load_vector(a.output + position.offset, position.count));
        const Accumulator<T> weight(load_vector(a.weight + position.column, position.count));
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) y.lanes[i] *= scale * weight.lanes[i];
        store_vector(a.normed + position.offset, y.round(), position.count);
      });
    }
  }
}

// The phases of both two-shots. Rank r owns slice r of every segment: sum(vector) gives its sum
// over ranks, publish(vector, h) puts the finished value where gather(owner, vector) finds it. Only
// the owner touches its slice between the barriers.
template <typename T, int kRanks, bool kNorm, typename Sum, typename Publish, typename Gather>
__device__ __forceinline__ void two_shot_phases(const Arguments<T>& a, Vector<T>* slot, Epoch epoch,
                                                Sum sum, Publish publish, Gather gather) {
  const Partition<T, kNorm> partition(a, kRanks);
  copy_in(a, partition, slot);
  barrier<kRanks>(a.peers, a.rank, epoch + 1);
  const int segments = ceil_div<int>(partition.segments - blockIdx.x, gridDim.x);
  for (int i = threadIdx.x; i < segments * partition.slice; i += blockDim.x) {
    const int segment = blockIdx.x + i / partition.slice * gridDim.x,
              in_segment = a.rank * partition.slice + i % partition.slice;
    if (in_segment < partition.end(segment)) {
      const int vector = segment * partition.length + in_segment;
      publish(vector,
              add_bias_residual(a, Position<T>(partition, vector), [&] { return sum(vector); }));
    }
  }
  barrier<kRanks>(a.peers, a.rank, epoch + 2);
  finish(a, partition, [&](int vector, const Position<T>&) {
    return gather(vector % partition.length / partition.slice, vector);
  });
  advance_epochs(a.epochs, epoch);
}

// One block an SM is enough. Told so, ptxas has the loads from all peers in flight at once instead
// of saving registers.
template <typename T, int kRanks, bool kNorm>
__global__ void __launch_bounds__(kThreads, 1) one_shot(const Arguments<T> a) {
  const Epoch epoch = load(a.epochs + blockIdx.x);
  const size_t offset = slot_offset(epoch, a.slot_bytes);
  const Partition<T, kNorm> partition(a, kRanks);
  Vector<T>* slots[kRanks];
#pragma unroll
  for (int rank = 0; rank < kRanks; ++rank)
    slots[rank] = reinterpret_cast<Vector<T>*>(a.peers[rank] + offset);
  copy_in(a, partition, reinterpret_cast<Vector<T>*>(a.peers[a.rank] + offset));
  barrier<kRanks>(a.peers, a.rank, epoch + 1);
  finish(a, partition, [&](int vector, const Position<T>& position) {
    return add_bias_residual(a, position, [&] { return sum_slots<T, kRanks>(slots, vector); });
  });
  advance_epochs(a.epochs, epoch);
}

template <typename T, int kRanks, bool kNorm>
__global__ void __launch_bounds__(kThreads, 1) two_shot(const Arguments<T> a) {
  const Epoch epoch = load(a.epochs + blockIdx.x);
  const size_t offset = slot_offset(epoch, a.slot_bytes);
  Vector<T>* slots[kRanks];
#pragma unroll
  for (int rank = 0; rank < kRanks; ++rank)
    slots[rank] = reinterpret_cast<Vector<T>*>(a.peers[rank] + offset);
  Vector<T>* const slot = reinterpret_cast<Vector<T>*>(a.peers[a.rank] + offset);
  two_shot_phases<T, kRanks, kNorm>(
      a, slot, epoch, [&](int vector) { return sum_slots<T, kRanks>(slots, vector); },
      [&](int vector, const Vector<T>& h) { store(slot + vector, h); },
      [&](int owner, int vector) {
        return load(reinterpret_cast<Vector<T>*>(a.peers[owner] + offset) + vector);
      });
}

// The switch rounds the sum to T before bias and residual are added. With those it is rounded
// twice.
template <typename T, int kRanks, bool kNorm>
__global__ void __launch_bounds__(kThreads, 1) two_shot_multimem(const Arguments<T> a) {
  const Epoch epoch = load(a.epochs + blockIdx.x);
  const size_t offset = slot_offset(epoch, a.slot_bytes);
  Vector<T>* const all_ranks = reinterpret_cast<Vector<T>*>(a.multicast + offset);
  Vector<T>* const slot = reinterpret_cast<Vector<T>*>(a.peers[a.rank] + offset);
  two_shot_phases<T, kRanks, kNorm>(
      a, slot, epoch, [&](int vector) { return Accumulator<T>(multimem_sum(all_ranks + vector)); },
      [&](int vector, const Vector<T>& h) { multimem_store(all_ranks + vector, h); },
      [&](int, int vector) { return load(slot + vector); });
}

}  // namespace tpkernels
