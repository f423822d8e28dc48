#include "harness.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tpkernels/all_reduce.cuh>
#include <tuple>
#include <type_traits>
#include <utility>

#ifndef TEST_RANKS
#define TEST_RANKS 2, 3, 4, 8
#endif
#ifndef TEST_TYPES
#define TEST_TYPES float, __half, __nv_bfloat16
#endif

using namespace tpkernels;

struct World {
  int ranks;
  size_t slot_bytes, bytes;
  std::vector<char*> memory;  // peers[rank]
  std::vector<std::vector<Epoch>> epochs;
  char* multicast;  // addresses nobody can read or write
};

World* world_create(int ranks, size_t slot_bytes, uint64_t epoch) {
  const size_t bytes = buffer_bytes(slot_bytes);
  World* world = new World{ranks, slot_bytes, bytes, {}, {}, nullptr};
  for (int rank = 0; rank < ranks; ++rank) {
    world->memory.push_back(static_cast<char*>(std::aligned_alloc(kVectorBytes, bytes)));
    std::memset(world->memory[rank], 0, kFlagBytes);
    std::memset(world->memory[rank] + kFlagBytes, 0xff, bytes - kFlagBytes);  // NaN
    world->epochs.emplace_back(kMaxBlocks, epoch);
  }
  world->multicast =
      static_cast<char*>(mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  return world;
}

void world_destroy(World* world) {
  for (char* memory : world->memory) std::free(memory);
  munmap(world->multicast, world->bytes);
  delete world;
}

template <typename T>
constexpr int dtype_of() {
  return std::is_same_v<T, float> ? kFloat : std::is_same_v<T, __half> ? kHalf : kBfloat16;
}

template <typename T, int kRanks, bool kNorm>
void call(int kernel, const Arguments<T>& arguments) {
  if (kernel == kOneShot) one_shot<T, kRanks, kNorm>(arguments);
  if (kernel == kTwoShot) two_shot<T, kRanks, kNorm>(arguments);
  if (kernel == kTwoShotMultimem) two_shot_multimem<T, kRanks, kNorm>(arguments);
}

template <typename T, int... kRanks>
void append(World* world, int rank, const Spec& spec, std::vector<simt::Launch>& stream,
            std::integer_sequence<int, kRanks...>) {
  if (spec.dtype != dtype_of<T>()) return;
  const size_t bytes = sizeof(T) * spec.rows * spec.columns;
  const auto copy = [&](void* to, const void* from) {
    if (to && from) stream.push_back({1, 1, [=] { std::memcpy(to, from, bytes); }});
  };
  Arguments<T> a{};
  a.peers = world->memory.data();
  a.multicast = world->multicast;
  a.epochs = world->epochs[rank].data();
  a.slot_bytes = world->slot_bytes;
  a.rank = rank;
  a.rows = spec.rows;
  a.columns = spec.columns;
  a.input = static_cast<const T*>(spec.input);
  a.output = static_cast<T*>(spec.output);
  a.bias = static_cast<const T*>(spec.bias);
  a.residual = static_cast<const T*>(spec.residual);
  a.normed = static_cast<T*>(spec.normed);
  a.weight = static_cast<const T*>(spec.weight);
  a.epsilon = spec.epsilon;
  copy(spec.input, spec.fresh);
  const auto launch = [&](auto ranks) {
    if (world->ranks != ranks) return;
    const int kernel = spec.kernel;
    if (spec.norm) {
      stream.push_back(
          {spec.blocks, spec.threads, [=] { call<T, decltype(ranks)::value, true>(kernel, a); }});
    } else {
      stream.push_back(
          {spec.blocks, spec.threads, [=] { call<T, decltype(ranks)::value, false>(kernel, a); }});
    }
  };
  (launch(std::integral_constant<int, kRanks>{}), ...);
  copy(spec.kept_output, spec.output);
  copy(spec.kept_normed, spec.normed);
}

template <typename... T>
void append_any(World* world, int rank, const Spec& spec, std::vector<simt::Launch>& stream,
                std::tuple<T...>*) {
  const size_t before = stream.size();
  (append<T>(world, rank, spec, stream, std::integer_sequence<int, TEST_RANKS>{}), ...);
  if (stream.size() == before) {
    std::fprintf(stderr, "harness: nothing was compiled for %d ranks, type %d\n", world->ranks,
                 spec.dtype);
    std::abort();
  }
}

bool world_run(World* world, const Spec* specs, int launches, uint64_t seed, uint64_t* trace) {
  simt::set_multicast(world->multicast, world->bytes, world->memory);
  std::vector<std::vector<simt::Launch>> streams(world->ranks);
  for (int i = 0; i < launches; ++i) {
    for (int rank = 0; rank < world->ranks; ++rank) {
      append_any(world, rank, specs[i * world->ranks + rank], streams[rank],
                 static_cast<std::tuple<TEST_TYPES>*>(nullptr));
    }
  }
  const simt::Outcome outcome = simt::run(streams, seed);
  if (trace) *trace = outcome.trace;
  if (!outcome.finished) new auto(std::move(streams));  // the threads that hang still refer to them
  return outcome.finished;
}

int device_grid_size(int64_t rows, int64_t columns, int element_size, bool norm) {
  return grid_size(rows, columns, element_size, norm);
}
size_t device_slot_bytes(int64_t rows, int64_t columns, int element_size) {
  return slot_bytes(rows, columns, element_size);
}
size_t device_buffer_bytes(size_t slot_bytes) { return buffer_bytes(slot_bytes); }
