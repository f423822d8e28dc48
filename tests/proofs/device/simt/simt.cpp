// The scheduler. Built without -fsanitize=thread, so that ThreadSanitizer knows of nothing here but
// what it is told. What runs on a fiber must not allocate nor copy with memmove: ThreadSanitizer
// sees those whoever calls them.
#include "simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
#ifdef SIMT_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
}
#endif

namespace simt {
Thread* current = nullptr;

namespace {
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32, kMaxRanks = 8, kMaxBlocks = 64;
constexpr size_t kSharedBytes = 1024;
char arenas[kMaxRanks][kMaxBlocks][kSharedBytes];  // not from malloc, which ThreadSanitizer takes
                                                   // for a write by who asks first

struct Fiber;
struct Rank;

// A pair, used in turn: who is late at one meeting must not learn what others did after it.
struct Meeting {
  char clocks[2];
  unsigned count = 0;
  int arrived = 0;
  Fiber* waiting = nullptr;
};

struct Warp {
  Meeting meeting;
  float values[2][kWarp];
};

struct Shared {
  const void* key;
  size_t end;
};

struct Block {
  Rank* rank;
  int alive;
  char* arena;
  Meeting meeting;
  std::vector<Warp> warps;
  Shared shared[4];
};

struct Fiber : Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block = nullptr;
  Fiber* next = nullptr;  // in a list of those who wait
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

struct Rank {
  int id;
  const std::vector<Launch>* launches;
  size_t next = 0;
  int alive = 0;
  char clocks[2];  // the stream's order: launch k takes [k % 2], gives [(k + 1) % 2]
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber*> runnable;
};

ucontext_t scheduler;
void* scheduler_tsan;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
std::vector<std::unique_ptr<Rank>> ranks;
std::vector<std::unique_ptr<Fiber>>
    fibers[kMaxRanks];  // a rank's next launch uses them again: its stream orders them too
Fiber* spinning = nullptr;
uint64_t random_state;
const char* multicast_base;
size_t multicast_bytes;
std::vector<char*> multicast_ranks;

uint64_t draw() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1dull >> 16;
}

Fiber* self() { return static_cast<Fiber*>(current); }

void make_runnable(Fiber* fiber) { fiber->block->rank->runnable.push_back(fiber); }

void to_scheduler() {
  Fiber* fiber = self();
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&fiber->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(scheduler_tsan, 1);  // 1: no happens-before
#endif
  swapcontext(&fiber->context, &scheduler);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void to_fiber(Fiber* fiber) {
  current = fiber;
#ifdef SIMT_ASAN
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber->stack.get(), kStackBytes);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(fiber->tsan, 1);
#endif
  swapcontext(&scheduler, &fiber->context);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void wait_in(Fiber*& list) {
  self()->next = list;
  list = self();
  to_scheduler();
}

void wake(Fiber*& list) {
  for (; list != nullptr; list = list->next) make_runnable(list);
}

void release_all(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.count;
  wake(meeting.waiting);
}

// Waits for the others. Returns which of the pair of slots this meeting uses.
int meet(Meeting& meeting, int others) {
  const int slot = meeting.count % 2;
  if (++meeting.arrived == others) {
    release_all(meeting);
    make_runnable(self());
    to_scheduler();
  } else {
    wait_in(meeting.waiting);
  }
  return slot;
}

void entry() {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  for (;;) {
    Fiber* fiber = self();
    Rank& rank = *fiber->block->rank;
    const size_t launch = rank.next - 1;
    __tsan_acquire(&rank.clocks[launch % 2]);
    (*rank.launches)[launch].body();
    __tsan_release(&rank.clocks[(launch + 1) % 2]);
    Block& block = *fiber->block;
    --rank.alive;
    if (--block.alive > 0 && block.meeting.arrived == block.alive)
      release_all(block.meeting);  // who has left counts as arrived
    to_scheduler();
  }
}

void start_next(Rank& rank) {
  const Launch& launch = (*rank.launches)[rank.next++];
  rank.alive = launch.blocks * launch.threads;
  rank.blocks.clear();
  rank.runnable.reserve(rank.alive);
  for (int b = 0; b < launch.blocks; ++b) {
    rank.blocks.emplace_back(new Block{&rank, launch.threads, arenas[rank.id][b], {}, {}, {}});
    rank.blocks.back()->warps.resize((launch.threads + kWarp - 1) / kWarp);
    std::fill_n(static_cast<volatile char*>(arenas[rank.id][b]), kSharedBytes,
                '\xff');  // NaN; volatile: no memset for TSan to see
    for (int t = 0; t < launch.threads; ++t) {
      const size_t index = static_cast<size_t>(b) * launch.threads + t;
      if (index == fibers[rank.id].size()) {
        Fiber* fiber = new Fiber;
        fibers[rank.id].emplace_back(fiber);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = kStackBytes;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, entry, 0);
#ifdef SIMT_TSAN
        fiber->tsan = __tsan_create_fiber(0);
#endif
      }
      Fiber* fiber = fibers[rank.id][index].get();
      fiber->thread_index = {static_cast<unsigned>(t), 0, 0};
      fiber->block_index = {static_cast<unsigned>(b), 0, 0};
      fiber->block_dim = dim3(launch.threads);
      fiber->grid_dim = dim3(launch.blocks);
      fiber->block = rank.blocks.back().get();
      make_runnable(fiber);
    }
  }
  __tsan_release(&rank.clocks[(rank.next - 1) % 2]);  // what was set up here
}

bool all_finished() {
  return std::all_of(ranks.begin(), ranks.end(), [](const auto& rank) { return rank->alive == 0; });
}
}  // namespace

void syncthreads() {
  Block& block = *self()->block;
  char* clock = &block.meeting.clocks[block.meeting.count % 2];
  __tsan_release(clock);
  meet(block.meeting, block.alive);
  __tsan_acquire(clock);
}

float shuffle_xor(unsigned mask, float value, int lane_mask) {
  const int lane = self()->thread_index.x % kWarp;
  Warp& warp = self()->block->warps[self()->thread_index.x / kWarp];
  warp.values[warp.meeting.count % 2][lane] = value;
  return warp.values[meet(warp.meeting, __builtin_popcount(mask))][lane ^ lane_mask];
}

void* shared_memory(const void* key, size_t bytes) {
  Block& block = *self()->block;
  size_t begin = 0;
  for (Shared& piece : block.shared) {
    if (piece.key == key) return block.arena + begin;
    if (piece.key == nullptr) {
      piece = {key, begin + (bytes + 15) / 16 * 16};
      if (piece.end > kSharedBytes) break;
      return block.arena + begin;
    }
    begin = piece.end;
  }
  std::fputs("simt: more shared memory than the shim has\n", stderr);
  std::abort();
}

void preempt() {
  if (draw() % 4) return;
  make_runnable(self());
  to_scheduler();
}

void stored() {
  wake(spinning);
  preempt();
}

void wait_for_store() { wait_in(spinning); }

void set_multicast(const char* base, size_t bytes, const std::vector<char*>& memory) {
  multicast_base = base;
  multicast_bytes = bytes;
  multicast_ranks = memory;
}

Multicast multicast(const void* address) {
  const size_t offset = static_cast<const char*>(address) - multicast_base;
  if (offset >= multicast_bytes) {
    std::fprintf(stderr, "simt: %p is not a multicast address\n", address);
    std::abort();
  }
  Multicast result{{}, static_cast<int>(multicast_ranks.size())};
  const uint64_t first = draw();
  for (int i = 0; i < result.ranks; ++i)
    result.memory[i] = multicast_ranks[(first + i) % result.ranks] + offset;
  return result;
}

Outcome run(const std::vector<std::vector<Launch>>& streams, uint64_t seed) {
  random_state = (seed + 1) * 0x9e3779b97f4a7c15ull;
#ifdef SIMT_TSAN
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (const auto& launches : streams) {
    ranks.emplace_back(new Rank{});
    ranks.back()->id = ranks.size() - 1;
    ranks.back()->launches = &launches;
    if (!launches.empty()) start_next(*ranks.back());
  }
  // How long a rank runs on while it can: seeds range from ranks in step to one that is as far
  // ahead as the protocol lets it be.
  const uint64_t patience[] = {1, 16, 512, 1 << 20};
  const uint64_t leave = patience[seed % 4];
  Outcome outcome{true, 14695981039346656037ull};
  Rank* rank = nullptr;
  std::vector<Rank*> ready;
  for (;;) {
    if (rank == nullptr || rank->runnable.empty() || draw() % leave == 0) {
      ready.clear();
      for (const auto& each : ranks) {
        if (!each->runnable.empty()) ready.push_back(each.get());
      }
      if (ready.empty()) break;
      rank = ready[draw() % ready.size()];
    }
    std::swap(rank->runnable[draw() % rank->runnable.size()], rank->runnable.back());
    Fiber* fiber = rank->runnable.back();
    rank->runnable.pop_back();
    const uint64_t who =
        (fiber->block_index.x * 1024 + fiber->thread_index.x) * kMaxRanks + rank->id;
    outcome.trace = (outcome.trace ^ who) * 1099511628211ull;
    to_fiber(fiber);
    if (rank->alive == 0 && rank->next < rank->launches->size()) start_next(*rank);
  }
  outcome.finished = all_finished();
  for (const auto& rank : ranks) {
    __tsan_acquire(&rank->clocks[rank->next % 2]);
    if (!outcome.finished)
      new auto(std::move(fibers[rank->id]));  // they are in the middle of something: never to be
                                              // used again, nor freed
  }
  ranks.clear();
  spinning = nullptr;
  return outcome;
}

}  // namespace simt
