// Ranks as threads over one memory, for ThreadSanitizer: what a rank reads must be ordered after
// what its peers wrote, and what it overwrites after their reading. Arguments: ranks, steps. Exits
// with 1 where a value is wrong.
#include "../../../csrc/shm/ring.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

using tpkernels::Ring;

static std::string describe(uint64_t) { return "a step"; }

int main(int, char** arguments) {
  const int ranks = std::atoi(arguments[1]), steps = std::atoi(arguments[2]);
  constexpr int64_t SLOT = 4096, COUNT = SLOT / sizeof(int64_t);
  std::vector<char*> segments;
  for (int r = 0; r < ranks; r++) {
    auto* memory = static_cast<char*>(std::aligned_alloc(4096, Ring::bytes_of(SLOT)));
    std::memset(memory, 0, Ring::bytes_of(SLOT));
    new (memory) Ring::Header{};
    segments.push_back(memory);
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; r++) {
    threads.emplace_back([&, r] {
      Ring ring(segments, std::vector<int>(ranks, -1), r, SLOT, /*oversubscribed=*/r % 2 == 0,
                &describe);
      unsigned random = r + 1;
      for (int step = 0; step < steps; step++) {
        auto* local = reinterpret_cast<int64_t*>(ring.local_slot());
        const int64_t n = 1 + (step * 37) % COUNT;
        for (int64_t i = 0; i < n; i++) local[i] = step * 1000 + r;
        random = random * 1664525 + 1013904223;
        if (random >> 28 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
        ring.post_and_wait({1, 2, 3, n}, std::chrono::seconds(60));
        for (int peer = 0; peer < ranks; peer++) {
          const auto* theirs = reinterpret_cast<const int64_t*>(ring.remote_slot(peer));
          for (int64_t i = 0; i < n; i++) wrong += theirs[i] != step * 1000 + peer;
        }
      }
      ring.post_and_wait({2, 0, 0, 0},
                         std::chrono::seconds(60));  // nobody leaves while another may wait
    });
  }
  for (auto& thread : threads) thread.join();
  std::printf("%d wrong\n", wrong.load());
  return wrong.load() != 0;
}
