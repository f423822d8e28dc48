#include "ring.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tpkernels {

namespace {

using Clock = std::chrono::steady_clock;

// A peer that is running arrives within the spins; one that waits for this core, while we yield it;
// beyond that it computes, and a sleeper costs it nothing.
constexpr int SPINS = 2000;
constexpr auto YIELDING = std::chrono::milliseconds(5), NAP = std::chrono::milliseconds(50);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The low half of a 64-bit counter, which is what a futex takes.
uint32_t* low_half(std::atomic<uint64_t>& counter) {
  static_assert(sizeof(counter) == 8 && std::atomic<uint64_t>::is_always_lock_free);
  auto* halves = reinterpret_cast<uint32_t*>(&counter);
  return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? halves : halves + 1;
}

void sleep_while(std::atomic<uint64_t>& counter, uint64_t value,
                 std::chrono::nanoseconds duration) {
  const timespec time{duration.count() / 1000000000, duration.count() % 1000000000};
  syscall(SYS_futex, low_half(counter), FUTEX_WAIT, static_cast<uint32_t>(value), &time, nullptr,
          0);
}

void wake(std::atomic<uint64_t>& counter) {
  syscall(SYS_futex, low_half(counter), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool has_exited(int process) {
  pollfd entry{process, POLLIN, 0};
  return process >= 0 && poll(&entry, 1, 0) == 1;
}

}  // namespace

Ring::Ring(std::vector<char*> segments, std::vector<int> processes, int rank, int64_t slot_bytes,
           bool oversubscribed, std::string (*describe)(uint64_t), void (*check_interrupt)())
    : segments_(std::move(segments)),
      processes_(std::move(processes)),
      rank_(rank),
      slot_bytes_(slot_bytes),
      spins_(oversubscribed ? 0 : SPINS),
      describe_(describe),
      check_interrupt_(check_interrupt) {}

void Ring::leave() {
  auto& own = header(rank_);
  own.left.store(1, std::memory_order_release);
  wake(own.posted);
}

void Ring::post_and_wait(OpSignature signature, std::chrono::milliseconds timeout) {
  if (!broken_.empty()) throw RingError(broken_);
  auto& own = header(rank_);
  if (own.left.load(std::memory_order_relaxed)) fail(-1, "this rank has left the group");
  const uint64_t packed = signature.packed();
  step_++;
  own.signatures[step_ & 1].store(packed, std::memory_order_relaxed);
  // Sequentially consistent, as is a sleeper's count before its last look at `posted`: one of the
  // two sees the other.
  own.posted.store(step_, std::memory_order_seq_cst);                  // mutant:ring.post
  if (own.sleepers.load(std::memory_order_seq_cst)) wake(own.posted);  // mutant:ring.wake
  bool same = true;
  for (int r = 0; r < size(); r++) {
    if (r == rank_) continue;
    wait_for(r, timeout);
    same = same && header(r).signatures[step_ & 1].load(std::memory_order_relaxed) == packed;
  }
  if (same) return;
  std::string what = "the ranks of the group made different calls:";
  for (int r = 0; r < size(); r++) what += "\n  rank " + std::to_string(r) + ": " + current_step(r);
  fail(-1, what);
}

std::string Ring::current_step(int rank) const {
  return describe_(header(rank).signatures[step_ & 1].load(std::memory_order_relaxed));
}

void Ring::wait_for(int rank, std::chrono::milliseconds timeout) {
  auto& peer = header(rank);
  const auto there = [&] {
    return peer.posted.load(std::memory_order_acquire) >= step_;  // mutant:ring.arrived
  };
  for (int i = 0; i <= spins_; i++) {
    if (there()) return;
    pause();
  }
  const auto start = Clock::now();
  while (Clock::now() - start < YIELDING) {
    sched_yield();
    if (there()) return;
  }
  while (true) {
    peer.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t seen = peer.posted.load(std::memory_order_seq_cst);
    if (seen < step_) sleep_while(peer.posted, seen, NAP);
    peer.sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (there()) return;
    if (header(rank_).left.load(std::memory_order_acquire))
      fail(-1, "this rank has left the group");
    check_alive();
    try {
      check_interrupt_();
    } catch (...) {
      broken_ = "this rank was interrupted in " + current_step(rank_);
      leave();
      throw;
    }
    if (Clock::now() - start > timeout) {
      fail(rank, "rank " + std::to_string(rank) + " did not come to " + current_step(rank_) +
                     " within the timeout of " + std::to_string(timeout.count()) +
                     " ms; its process is alive, and may be doing something else, or be stuck");
    }
  }
}

void Ring::check_alive() {
  const auto gone = [&](int r) {
    return has_exited(processes_[r]) || header(r).left.load(std::memory_order_acquire);
  };
  // Any rank, not only the one that is waited for: that one may itself be waiting for the lost one
  // in vain.
  int lost = -1;
  for (int r = 0; r < size() && lost < 0; r++)
    if (r != rank_ && gone(r) && header(r).posted.load(std::memory_order_acquire) < step_) lost = r;
  if (lost < 0) return;
  const int failed_rank =
      static_cast<int>(header(0).failed_rank.load(std::memory_order_acquire)) - 1;
  if (failed_rank >= 0 && failed_rank != rank_) lost = failed_rank;
  const std::string name = "rank " + std::to_string(lost);
  const std::string waiting =
      " while rank " + std::to_string(rank_) + " waited for it in " + current_step(rank_);
  if (has_exited(processes_[lost]))
    fail(lost, name + " has died (its process has ended)" + waiting);
  fail(lost, name + " has left the group, by destroy_process_group or for an error of its own," +
                 waiting);
}

void Ring::fail(int failed_rank, const std::string& what) {
  broken_ = what;
  uint32_t none = 0;
  if (failed_rank >= 0)
    header(0).failed_rank.compare_exchange_strong(none, failed_rank + 1, std::memory_order_acq_rel);
  leave();
  throw RingError(broken_);
}

}  // namespace tpkernels
