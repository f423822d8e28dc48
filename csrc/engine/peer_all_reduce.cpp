#include "peer_all_reduce.h"

#include <mutex>
#include <unordered_map>
#include <utility>

namespace tpkernels {

namespace {
std::mutex registry_mutex;
std::unordered_map<std::string, std::shared_ptr<PeerAllReduce>> registry;
}  // namespace

std::shared_ptr<PeerAllReduce> find_peer_all_reduce(const std::string& group) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry.find(group);
  return found == registry.end() ? nullptr : found->second;
}

void set_peer_all_reduce(const std::string& group, std::shared_ptr<PeerAllReduce> peers) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  if (peers) {
    registry[group] = std::move(peers);
  } else {
    registry.erase(group);
  }
}

}  // namespace tpkernels
