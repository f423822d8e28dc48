// Philox4x32-7, the counter-based generator of dropout masks: Salmon, Moraes, Dror, Shaw: "Parallel
// random numbers: as easy as 1, 2, 3" (SC11), with the 7 rounds that pass BigCrush.
#pragma once

#include <cmath>
#include <cstdint>

namespace tpkernels::philox {

constexpr int ROUNDS = 7;
constexpr uint32_t MULTIPLIER[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t KEY_STEP[2] = {0x9E3779B9, 0xBB67AE85};

// Dropout keeps an element if its random number is at least this.
inline uint64_t dropout_threshold(double p) {
  return static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
}

}  // namespace tpkernels::philox
