#include "collective_log.h"

#include <c10/util/Exception.h>

#include <mutex>
#include <utility>

namespace tpkernels {

namespace {
std::mutex log_mutex;
std::vector<LoggedCollective> log_entries;
}  // namespace

void log_start() {
  std::lock_guard<std::mutex> lock(log_mutex);
  TORCH_CHECK(!logging, "the collective log is already running: logs do not nest");
  log_entries.clear();
  logging = true;
}

std::vector<LoggedCollective> log_stop() {
  std::lock_guard<std::mutex> lock(log_mutex);
  logging = false;
  return std::exchange(log_entries, {});
}

void log_write(LoggedCollective entry) {
  std::lock_guard<std::mutex> lock(log_mutex);
  if (logging) log_entries.push_back(std::move(entry));
}

}  // namespace tpkernels
