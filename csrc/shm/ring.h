// The protocol of the shared-memory transport, without torch.
//
// Each rank owns a segment that all ranks have mapped: a header and two slots of data. A collective
// is a number of steps; the steps of all ranks are the same, and each is
//
//     local_slot()     where this rank puts the data that the others read in this step
//     post_and_wait()  says that it is there, and waits until every rank's is
//     remote_slot(r)   rank r's data, to be read until this rank's next post_and_wait()
//
// Step s uses slot s % 2. A rank that writes its slot again, for step s + 2, has seen every rank's
// step s + 1; and those had finished reading step s before. So one counter a rank, and one wait a
// step, are all the synchronisation there is.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace tpkernels {

// Another rank is gone, silent, or does something else.
class RingError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The signature of a step. A mismatch raises on all ranks.
struct OpSignature {
  uint8_t kind;     // index into Ring's names
  uint8_t dtype;    // c10::ScalarType
  uint16_t detail;  // the reduction, or the root
  int64_t bytes;    // of the whole collective, up to 2^40

  uint64_t packed() const {
    return uint64_t(kind) << 60 | uint64_t(dtype & 63) << 54 | uint64_t(detail & 1023) << 44 |
           uint64_t(bytes);
  }
};

class Ring {
 public:
  struct Header {
    alignas(128) std::atomic<uint64_t> posted;  // steps whose data is in place; a futex
    std::atomic<uint64_t> signatures[2];        // of the last two steps
    std::atomic<uint32_t> sleepers;             // ranks that sleep until `posted` moves
    alignas(128) std::atomic<uint32_t> left;    // this rank takes no more steps
    std::atomic<uint32_t> failed_rank;  // in the first rank's: 1 + the rank that broke the group
    char token[64];                     // of the group
  };
  static constexpr int64_t HEADER_BYTES = 4096;
  static constexpr int64_t bytes_of(int64_t slot_bytes) { return HEADER_BYTES + 2 * slot_bytes; }

  // `segments` are every rank's, zeroed but for the token. `processes` are their pidfds, -1 where
  // there is none to watch. `describe` puts a packed signature in words. `oversubscribed` says that
  // there are more ranks than cores, so that spinning only keeps a peer from its work. A rank that
  // waits for long calls `check_interrupt`, which may raise.
  Ring(
      std::vector<char*> segments, std::vector<int> processes, int rank, int64_t slot_bytes,
      bool oversubscribed, std::string (*describe)(uint64_t signature),
      void (*check_interrupt)() = [] {});
  Ring(const Ring&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(segments_.size()); }
  int64_t slot_bytes() const { return slot_bytes_; }

  char* local_slot() const { return slot(rank_, step_ + 1); }
  // Waits for `timeout` at most, and raises RingError; the ring is then broken, and every later
  // post_and_wait raises it again.
  void post_and_wait(OpSignature signature, std::chrono::milliseconds timeout);
  const char* remote_slot(int rank) const { return slot(rank, step_); }
  // Takes this rank out. Whoever waits for it raises, this rank itself included. Any thread may
  // call it.
  void leave();

 private:
  Header& header(int rank) const { return *reinterpret_cast<Header*>(segments_[rank]); }
  char* slot(int rank, uint64_t step) const {
    return segments_[rank] + HEADER_BYTES + (step & 1) * slot_bytes_;  // mutant:ring.slot
  }
  // The rank's step in words.
  std::string current_step(int rank) const;
  void wait_for(int rank, std::chrono::milliseconds timeout);
  // Raises if a rank that has not come yet never will.
  void check_alive();
  // Breaks the ring for this rank, and names the rank that failed (-1: none) to those that come
  // later.
  [[noreturn]] void fail(int failed_rank, const std::string& what);

  const std::vector<char*> segments_;
  const std::vector<int> processes_;
  const int rank_;
  const int64_t slot_bytes_;
  const int spins_;
  std::string (*const describe_)(uint64_t);
  void (*const check_interrupt_)();
  uint64_t step_ = 0;
  std::string broken_;
};

}  // namespace tpkernels
