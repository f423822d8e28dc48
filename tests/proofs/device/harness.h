// Ranks with symmetric memory, and launches on them. Used from Python through ctypes and from
// check.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

enum Kernel { kOneShot, kTwoShot, kTwoShotMultimem };
enum Dtype { kFloat, kHalf, kBfloat16 };

// One rank's part of one launch. Before it `fresh` is copied into `input`, after it the results are
// copied to where they are kept, all in the order of the rank's stream: so launches with the same
// arguments see changing data with no synchronisation between ranks.
struct Spec {
  int kernel, dtype, norm, blocks, threads, rows, columns;
  float epsilon;
  const void *bias, *residual, *weight, *fresh;
  void *input, *output, *normed, *kept_output, *kept_normed;
};

struct World;
// epoch: even; flags start at zero all the same, as they stay in lanes that no grid has used.
World* world_create(int ranks, size_t slot_bytes, uint64_t epoch);
void world_destroy(World* world);
// specs [launches][ranks]. Whether all ranks came to the end; if not the process can only give up.
bool world_run(World* world, const Spec* specs, int launches, uint64_t seed, uint64_t* trace);

int device_grid_size(int64_t rows, int64_t columns, int element_size, bool norm);
size_t device_slot_bytes(int64_t rows, int64_t columns, int element_size);
size_t device_buffer_bytes(size_t slot_bytes);
}
