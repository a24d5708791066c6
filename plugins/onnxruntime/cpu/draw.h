// Drawing a token from logits: top-k, top-p, min-p and temperature, as runtime/sampling.py has
// them.
//
// A weight is e^((logit − the largest logit) / temperature) in double. A vocabulary is read a few
// times from the cache and never sorted: only what lies around a cut is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lminf::cpu {

struct Draw {
  const float* logits;
  int64_t count;         // V
  double inverse;        // of the temperature, above 0 and finite
  int64_t topK;          // 0 for all
  double topP;           // in (0, 1]
  double leastExponent;  // of a weight that min-p keeps; −infinity for all
  double uniform;        // in [0, 1): where the token is drawn
};

// Logits that stand together in what is summed.
constexpr int64_t kDrawBlock = 64;

struct Scale {
  float largest;
  double inverse;
};

// What a pass over all weights looks for. Low and high are about top-p, floor about min-p.
struct DrawCuts {
  float low, high, floor;
};

struct DrawSums {
  double all;     // of every weight
  double high;    // of those of logits from `high` on
  double* kept;   // of each block: those of logits from `high` and from `floor` on
  int32_t* ids;   // of logits from `low` to below `high`
  int64_t found;  // how many
};

// The same functions compiled for one instruction set.
struct DrawKernels {
  const char* name;
  // The largest logit of each block. Returns whether every logit is a number.
  bool (*largest)(const float* logits, int64_t count, float* out);
  // Ids of logits from `low` on, in order; out: room for `count`. Returns how many.
  int64_t (*from)(const float* logits, int64_t count, const float* largest, float low,
                  int32_t* out);
  void (*weights)(const float* logits, int64_t count, Scale, double* out);
  void (*sums)(const float* logits, int64_t count, Scale, DrawCuts, DrawSums*);
};

extern const DrawKernels kDrawPortable;
#if defined(__x86_64__)
extern const DrawKernels kDrawAvx2;
extern const DrawKernels kDrawAvx512;
#endif

// The ones of the instruction set in use (`activeKernels`).
const DrawKernels& activeDraw();

// No token: a logit is not a number, or none is finite; no memory.
constexpr int64_t kNoToken = -1, kNoDrawMemory = -2;

// Returns the token's id, kNoToken or kNoDrawMemory.
int64_t drawToken(const Draw&, const DrawKernels&);

}  // namespace lminf::cpu
