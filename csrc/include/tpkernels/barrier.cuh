// A barrier between the ranks' blocks: flags in peer memory, counted in epochs.
// docs/device-kernels.md argues the protocol.
#pragma once

#include "platform.cuh"

namespace tpkernels {

constexpr int kMaxRanks = 8;
constexpr int kMaxBlocks = 36;
constexpr int kThreads = 512;

// A rank's symmetric buffer is [flags | slot 0 | slot 1]; flag [lane][p] is written by rank p's
// block `lane` and zero at first.
constexpr size_t kFlagBytes = (kMaxBlocks * kMaxRanks * sizeof(Epoch) + 127) / 128 * 128;

// Every launch takes two epochs, one-shot too though it has one barrier: so the second bit is the
// count of launches modulo 2.
constexpr Epoch kEpochsPerLaunch = 2;

// Offset of the slot that a launch uses. Launches take the slots in turn, and that spares a
// barrier at the end of each: launch k + 2 of a rank writes the slot of launch k, which peers read
// in their launch k. It starts after all blocks of the rank's launch k + 1 have ended, and at least
// one of them has passed a barrier there. So every peer has begun its launch k + 1, hence, by the
// order of its stream, ended its launch k in all blocks: nobody reads that slot any more. This
// needs the same slot in all blocks of a launch, whatever the grids before (see advance_epochs),
// and says nothing of which kernels, shapes or grids the launches have.
__device__ __forceinline__ size_t slot_offset(Epoch epoch, size_t slot_bytes) {
  return kFlagBytes + (epoch / kEpochsPerLaunch % 2) * slot_bytes;
}

// All threads of block b of every rank call it with the same epoch. What all of them wrote before
// is visible to all of them after. A flag only grows, and is never reset: a fast peer that has
// already signalled its next epoch satisfies this wait too.
template <int kRanks>
__device__ __forceinline__ void barrier(char* const* peers, int rank, Epoch epoch) {
  static_assert(2 <= kRanks && kRanks <= kMaxRanks, "there are flags for 2 to 8 ranks");
  __syncthreads();
  if (threadIdx.x < kRanks) {
    const int peer = threadIdx.x, lane = blockIdx.x * kMaxRanks;
    store_release(reinterpret_cast<Epoch*>(peers[peer]) + lane + rank, epoch);
    Epoch* seen = reinterpret_cast<Epoch*>(peers[rank]) + lane + peer;
    while (load_acquire(seen) < epoch) spin();
  }
  __syncthreads();
}

// Block b also moves the lanes that this grid does not have, so that the next launch, whatever its
// grid, finds one epoch everywhere. It must be called after a barrier: all threads have read the
// block's epoch by then.
__device__ __forceinline__ void advance_epochs(Epoch* epochs, Epoch epoch) {
  const int lane = blockIdx.x + threadIdx.x * gridDim.x;
  if (lane < kMaxBlocks) epochs[lane] = epoch + kEpochsPerLaunch;
}

}  // namespace tpkernels
