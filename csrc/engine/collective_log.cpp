#include "collective_log.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <mutex>
#include <utility>

namespace tpkernels {

namespace {
std::atomic<bool> logging{false};  // read on every collective; the mutex guards the entries
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

bool log_enabled() { return logging.load(std::memory_order_relaxed); }

void log_write(LoggedCollective entry) {
  std::lock_guard<std::mutex> lock(log_mutex);
  if (logging) log_entries.push_back(std::move(entry));
}

}  // namespace tpkernels
