// The log of collectives behind tpk.collective_log: which op ran for which tag, how many bytes,
// which chunk.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace tpkernels {

// One line of the log. A collective that is not chunked is chunk 0 of 1.
struct LoggedCollective {
  std::string op, tag, group;
  int64_t bytes, chunk, chunks;
};

// Read on every collective; a mutex guards the entries.
inline std::atomic<bool> logging{false};

// The log is off until started. Fake kernels write to it too, so that a traced model's volumes can
// be counted.
void log_start();
std::vector<LoggedCollective> log_stop();
inline bool log_enabled() { return logging.load(std::memory_order_relaxed); }
void log_write(LoggedCollective entry);

}  // namespace tpkernels
