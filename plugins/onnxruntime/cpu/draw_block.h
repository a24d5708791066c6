// Passes over the logits of a vocabulary, compiled once per instruction set.
#pragma once

#include <algorithm>
#include <limits>

#include "draw.h"
#include "simd.h"

namespace {

using lminf::cpu::DrawCuts;
using lminf::cpu::DrawSums;
using lminf::cpu::kDrawBlock;
using lminf::cpu::Scale;

constexpr int kDoubles = kWidth / 2;
typedef double DoubleVec __attribute__((vector_size(8 * kDoubles)));
typedef int64_t LongVec __attribute__((vector_size(8 * kDoubles)));
typedef float HalfVec __attribute__((vector_size(4 * kDoubles)));

constexpr float kNever = -std::numeric_limits<float>::infinity();

inline DoubleVec splatDouble(double x) { return x - DoubleVec{}; }

inline DoubleVec loadDoubles(const float* p) {
  HalfVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, DoubleVec);
}

inline double sumOfDoubles(DoubleVec v) {
  double lanes[kDoubles];
  std::memcpy(lanes, &v, sizeof v);
  for (int count = kDoubles / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) lanes[i] += lanes[i + count];
  }
  return lanes[0];
}

// y · 2ⁿ, where `shifted` has n in its low bits.
inline DoubleVec timesPower(DoubleVec y, DoubleVec n, DoubleVec shifted) {
#if defined(__AVX512F__)
  (void)shifted;
  return reinterpret_cast<DoubleVec>(
      _mm512_scalef_pd(reinterpret_cast<__m512d>(y), reinterpret_cast<__m512d>(n)));
#else
  LongVec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4338000000000000 + 1023) << 52;
  DoubleVec power;
  std::memcpy(&power, &exponent, sizeof power);
  return n < -1020.0 ? DoubleVec{} : y * power;
#endif
}

// eˣ for x ≤ 0 to about one unit in the last place; 0 far below −700.
inline DoubleVec expOf(DoubleVec x) {
  const DoubleVec floor = splatDouble(-800.0);
#if defined(__AVX512F__)
  x = reinterpret_cast<DoubleVec>(
      _mm512_max_pd(reinterpret_cast<__m512d>(floor), reinterpret_cast<__m512d>(x)));
#else
  x = x < floor ? floor : x;
#endif
  // Adding 1.5·2⁵² leaves the nearest integer in the low bits of the sum.
  const DoubleVec shifted = x * 1.44269504088896340736 + 6755399441055744.0;
  const DoubleVec n = shifted - 6755399441055744.0;
  // ln 2 in two pieces, the first of few bits, so that n·ln 2 loses nothing.
  const DoubleVec r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // (eʳ − 1 − r) / r² interpolated at Chebyshev's points for |r| ≤ ln 2 / 2: exact to 2e-17.
  DoubleVec y = splatDouble(2.5100375832561233664e-8);
  y = y * r + 2.7620075879983366586e-7;
  y = y * r + 2.7557268480310025526e-6;
  y = y * r + 2.4801521322368693266e-5;
  y = y * r + 1.9841269863040545271e-4;
  y = y * r + 1.3888888917196719077e-3;
  y = y * r + 8.3333333333300644495e-3;
  y = y * r + 4.1666666666624161903e-2;
  y = y * r + 0.16666666666666667452;
  y = y * r + 0.50000000000000010211;
  y = y * (r * r) + r + 1.0;
  return timesPower(y, n, shifted);
}

inline DoubleVec weightsOf(DoubleVec logits, Scale s) {
  return expOf((logits - static_cast<double>(s.largest)) * s.inverse);
}

// Calls body(start of 64 logits, their number, their block); what is left comes from a copy with
// minus infinity behind.
template <typename Body>
inline void forBlocks(const float* logits, int64_t count, Body body) {
  int64_t first = 0, block = 0;
  for (; first + kDrawBlock <= count; first += kDrawBlock, ++block) {
    body(logits + first, kDrawBlock, block);
  }
  if (first == count) return;
  float rest[kDrawBlock];
  std::fill(rest, rest + kDrawBlock, kNever);
  std::memcpy(rest, logits + first, (count - first) * sizeof(float));
  body(rest, count - first, block);
}

bool largest(const float* logits, int64_t count, float* out) {
  IntVec numbers = ~IntVec{};
  forBlocks(logits, count, [&](const float* x, int64_t, int64_t block) {
    Vec most = load(x);
    numbers &= most == most;
    for (int64_t i = kWidth; i < kDrawBlock; i += kWidth) {
      const Vec v = load(x + i);
      numbers &= v == v;
      most = maximum(most, v);
    }
    out[block] = maximumOf(most);
  });
  for (int i = 0; i < kWidth; ++i) {
    if (numbers[i] == 0) return false;
  }
  return true;
}

// Adds the ids of x (64) with low ≤ x < high; without a branch that data decide.
inline int64_t addIds(const float* x, int64_t count, int64_t first, float low, float high,
                      int32_t* out) {
  int64_t found = 0;
#if defined(__AVX512F__)
  const __m512 from = _mm512_set1_ps(low), to = _mm512_set1_ps(high);
  uint64_t wanted = 0;
  for (int i = 0; i < kDrawBlock; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __mmask16 mask =
        _mm512_cmp_ps_mask(v, from, _CMP_GE_OQ) & _mm512_cmp_ps_mask(v, to, _CMP_LT_OQ);
    wanted |= uint64_t{mask} << i;
  }
  if (count < kDrawBlock) wanted &= (uint64_t{1} << count) - 1;
  if (wanted == 0) return 0;
  __m512i ids = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  ids = _mm512_add_epi32(ids, _mm512_set1_epi32(static_cast<int>(first)));
  for (int i = 0; i < kDrawBlock; i += 16, ids = _mm512_add_epi32(ids, _mm512_set1_epi32(16))) {
    const __mmask16 mask = static_cast<__mmask16>(wanted >> i);
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(mask, ids));
    found += __builtin_popcount(mask);
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    out[found] = static_cast<int32_t>(first + i);
    found += (x[i] >= low) & (x[i] < high);
  }
#endif
  return found;
}

int64_t from(const float* logits, int64_t count, const float* largest, float low, int32_t* out) {
  const float high = std::numeric_limits<float>::infinity();
  int64_t found = 0;
  forBlocks(logits, count, [&](const float* x, int64_t some, int64_t block) {
    if (largest[block] >= low) {
      found += addIds(x, some, block * kDrawBlock, low, high, out + found);
    }
  });
  return found;
}

void weights(const float* logits, int64_t count, Scale scale, double* out) {
  forBlocks(logits, count, [&](const float* x, int64_t some, int64_t block) {
    double found[kDrawBlock];
    for (int64_t i = 0; i < some; i += kDoubles) {
      const DoubleVec w = weightsOf(loadDoubles(x + i), scale);
      std::memcpy(found + i, &w, sizeof w);
    }
    std::memcpy(out + block * kDrawBlock, found, some * sizeof(double));
  });
}

// What is kept: all weights, those from `least` on, or those of top-p's search, for which all are
// summed as well and ids are found, and where `least` is above `high` those from there on.
enum class Pass { kAll, kLeast, kHigh, kHighLeast };

template <Pass pass>
void sumBlocks(const float* logits, int64_t count, Scale scale, DrawCuts cuts, DrawSums* sums) {
  constexpr bool kSearches = pass == Pass::kHigh || pass == Pass::kHighLeast;
  const double least = std::max(cuts.high, cuts.floor);
  DoubleVec all{}, high{};
  double keptSum = 0;
  sums->found = 0;
  forBlocks(logits, count, [&](const float* x, int64_t some, int64_t block) {
    DoubleVec kept{};
    for (int64_t i = 0; i < kDrawBlock; i += kDoubles) {
      const DoubleVec v = loadDoubles(x + i), w = weightsOf(v, scale);
      if constexpr (pass == Pass::kAll) {
        kept += w;
      } else {
        kept += v >= least ? w : DoubleVec{};
      }
      if constexpr (kSearches) all += w;
      if constexpr (pass == Pass::kHighLeast) {
        high += v >= static_cast<double>(cuts.high) ? w : DoubleVec{};
      }
    }
    const double sum = sumOfDoubles(kept);
    sums->kept[block] = sum, keptSum += sum;
    if constexpr (kSearches) {
      sums->found +=
          addIds(x, some, block * kDrawBlock, cuts.low, cuts.high, sums->ids + sums->found);
    }
  });
  sums->all = sumOfDoubles(all);
  sums->high = pass == Pass::kHighLeast ? sumOfDoubles(high) : keptSum;
}

void sums(const float* logits, int64_t count, Scale scale, DrawCuts cuts, DrawSums* sums) {
  const bool searches = sums->ids != nullptr;
  const auto pass =
      searches ? (cuts.floor > cuts.high ? sumBlocks<Pass::kHighLeast> : sumBlocks<Pass::kHigh>)
               : (cuts.floor == kNever ? sumBlocks<Pass::kAll> : sumBlocks<Pass::kLeast>);
  pass(logits, count, scale, cuts, sums);
}

}  // namespace
