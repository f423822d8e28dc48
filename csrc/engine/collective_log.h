// The log of collectives behind tpk.collective_log: which op ran for which tag, how many bytes,
// which chunk.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tpkernels {

// One line of the log. A collective that is not chunked is chunk 0 of 1.
struct LoggedCollective {
  std::string op, tag, group;
  int64_t bytes, chunk, chunks;
};

// The log is off until started. Fake kernels write to it too, so that a traced model's volumes can
// be counted.
void log_start();
std::vector<LoggedCollective> log_stop();
bool log_enabled();
void log_write(LoggedCollective entry);

}  // namespace tpkernels
