// The ranges' header alone: how often 100 ranges call operator new, after one that lets NVTX look
// for a tool. Prints the count.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "nvtx.h"

static int allocations = 0;
void* operator new(std::size_t size) {
  allocations++;
  return std::malloc(size);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

int main() {
  try {
    const tpkernels::NvtxRange outer("outer", "step"), inner("inner", "step", 2, 8);
    throw std::runtime_error("both ranges end");
  } catch (const std::exception&) {
  }
  const int before = allocations;
  for (int i = 0; i < 100; i++)
    const tpkernels::NvtxRange range("longer than the buffer inside a std::string", "all_reduce", i,
                                     100);
  std::printf("%d\n", allocations - before);
}
