// NVTX ranges in a domain of their own, "tpkernels", for Nsight Systems and other tools. A range is
// one branch, and its name is not built, where no tool is attached or the build had no nvtx3
// headers.
#pragma once

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#endif

#include <cstdint>
#include <string>
#include <string_view>

namespace tpkernels {

// "row[3/8] gemm" for chunk 2 of 8, "loss all_reduce" where chunks is 0.
inline std::string range_name(std::string_view of, std::string_view step, int64_t chunk = 0,
                              int64_t chunks = 0) {
  std::string name(of);
  if (chunks)
    name.append("[")
        .append(std::to_string(chunk + 1))
        .append("/")
        .append(std::to_string(chunks))
        .append("]");
  return name.append(" ").append(step);
}

#ifdef NVTX_VERSION
// Null unless a tool is attached: nvtx3 looks for one at the process's first call, and hands out
// handles only if it found one.
inline nvtxDomainHandle_t range_domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("tpkernels");
  return domain;
}
inline bool ranges_enabled() { return range_domain() != nullptr; }
inline void range_push(const std::string& name) {
  nvtxEventAttributes_t event{};
  event.version = NVTX_VERSION;
  event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  event.messageType = NVTX_MESSAGE_TYPE_ASCII;
  event.message.ascii = name.c_str();
  nvtxDomainRangePushEx(range_domain(), &event);
}
inline void range_pop() { nvtxDomainRangePop(range_domain()); }
#else
inline bool ranges_enabled() { return false; }
inline void range_push(const std::string&) {}
inline void range_pop() {}
#endif

// Open from its construction to its destruction, on one thread.
class NvtxRange {
 public:
  NvtxRange(std::string_view of, std::string_view step, int64_t chunk = 0, int64_t chunks = 0)
      : open_(ranges_enabled()) {
    if (open_) range_push(range_name(of, step, chunk, chunks));
  }
  explicit NvtxRange(const std::string& name) : open_(!name.empty() && ranges_enabled()) {
    if (open_) range_push(name);
  }
  NvtxRange(const NvtxRange&) = delete;
  ~NvtxRange() {
    if (open_) range_pop();
  }

 private:
  const bool open_;
};

}  // namespace tpkernels
