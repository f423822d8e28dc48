// The shared memory of a group's ranks on one host: made, exchanged through the group's store,
// mapped.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>
#include <vector>

#include "ring.h"

namespace tpkernels {

// Owns a file descriptor.
class File {
 public:
  explicit File(int descriptor = -1) : descriptor_(descriptor) {}
  File(File&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  File& operator=(File other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~File();
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

// Every rank's segment, mapped, and a descriptor of its process. A segment never has a name in
// /dev/shm: it is an unnamed file (O_TMPFILE, mode 0600), which the other ranks open through its
// owner's /proc/PID/fd. So however a process ends nothing is left, and no other user's process, nor
// another job's, can come upon it.
class Segments {
 public:
  // Collective: every rank of the group must call it. It raises on all of them, in the same words,
  // where any of them cannot: they are not on one host, or /dev/shm has no room. Slots have
  // `max_slot_bytes`, or less (by powers of two) where /dev/shm is small.
  Segments(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
           int64_t max_slot_bytes);

  std::vector<char*> addresses() const;
  std::vector<int> processes() const;  // pidfds; -1 for this rank's own
  int64_t slot_bytes() const { return slot_bytes_; }
  bool oversubscribed() const { return oversubscribed_; }
  int threads() const { return threads_; }  // the most that any rank computes with

 private:
  using Mapping = std::unique_ptr<char, std::function<void(char*)>>;
  static Mapping map(const File& file, int64_t length);
  File create(int rank, const std::string& token);
  // Opens the other ranks' segments, and learns their threads and cores. Each rank says its
  // process, its segment's descriptor, its threads and its cores.
  void open_all(int own_rank, const std::vector<std::string>& processes, const std::string& token);
  void open(int rank, int64_t process, int64_t descriptor, const std::string& token);

  std::vector<Mapping> mappings_;
  std::vector<File> processes_;
  int64_t slot_bytes_ = 0;
  bool oversubscribed_ = false;  // more ranks than cores that they may run on
  int threads_ = 1;
};

// Ranks that can share memory agree in this text.
std::string shm_host();
// Bytes that are free in /dev/shm.
int64_t shm_free_bytes();
// The fewest bytes of /dev/shm that a group of `size` ranks needs.
int64_t shm_least_bytes(int size);

}  // namespace tpkernels
