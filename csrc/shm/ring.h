// The protocol of the shared-memory transport, without torch.
//
// Each rank owns a segment that all ranks have mapped: a header and two halves of data. A
// collective is a number of steps; the steps of all ranks are the same, and each is
//
//     mine()      where this rank puts what the others shall read in this step
//     exchange()  says that it is there, and waits until every rank's is
//     part(r)     what rank r put there, to be read until this rank's next exchange()
//
// Step s uses half s % 2. A rank that writes its half again, for step s + 2, has seen every rank's
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

// What a rank is doing in a step; ranks that do different things are told so.
struct Deed {
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
    alignas(128) std::atomic<uint64_t> posted;  // steps whose part is in place; a futex
    std::atomic<uint64_t> deeds[2];             // what they were
    std::atomic<uint32_t> sleepers;             // ranks that sleep until `posted` moves
    alignas(128) std::atomic<uint32_t> left;    // this rank takes no more steps
    std::atomic<uint32_t> culprit;  // in the first rank's: 1 + the rank that broke the group
    char token[64];                 // of the group
  };
  static constexpr int64_t HEADER_BYTES = 4096;
  static constexpr int64_t bytes_of(int64_t half_bytes) { return HEADER_BYTES + 2 * half_bytes; }

  // `segments`: every rank's, zeroed but for the token; `processes`: their pidfds, -1 where there
  // is none to watch. `describe` puts a packed deed in words. `crowded`: there are more ranks than
  // cores, so that spinning only keeps a peer from its work.
  Ring(std::vector<char*> segments, std::vector<int> processes, int rank, int64_t half_bytes,
       bool crowded, std::string (*describe)(uint64_t deed));
  ~Ring();
  Ring(const Ring&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(segments_.size()); }
  int64_t half_bytes() const { return half_bytes_; }

  char* mine() const { return half(rank_, step_ + 1); }
  // Waits for `timeout` at most, and raises RingError; the ring is then broken, and every later
  // exchange raises it again.
  void exchange(Deed deed, std::chrono::milliseconds timeout);
  const char* part(int rank) const { return half(rank, step_); }
  // Takes this rank out: whoever waits for it raises, this rank itself included. From any thread.
  void leave();

 private:
  Header& header(int rank) const { return *reinterpret_cast<Header*>(segments_[rank]); }
  char* half(int rank, uint64_t step) const {
    return segments_[rank] + HEADER_BYTES + (step & 1) * half_bytes_;
  }
  void wait_for(int rank, std::chrono::milliseconds timeout);
  // Raises if a rank that has not come yet never will.
  void check_alive();
  [[noreturn]] void fail(int culprit, const std::string& what);

  const std::vector<char*> segments_;
  const std::vector<int> processes_;
  const int rank_;
  const int64_t half_bytes_;
  const int spins_;
  std::string (*const describe_)(uint64_t);
  uint64_t step_ = 0;
  std::string broken_;
};

}  // namespace tpkernels
