// The bias of keys that lie in a ring of int8 without it. Compiled once per instruction set.
//
// A query q meets R_p(k − b) + R_p b at position p. For many rows of queries R_p b is added to the
// keys. For a few, its products are: with b = (b₁, b₂) in one pair of rotated dimensions and
// q = (q₁, q₂), q · R_p b = u·cos pθ + w·sin pθ, u = q₁b₁ + q₂b₂ and w = q₂b₁ − q₁b₂. Over all
// pairs that is a product of (u, w) with a row of cos and sin that no layer, head or step changes.
// Keys come in blocks of kBiasKeys: (u, w) turned to where a block begins meets one small table.
#pragma once

#include <algorithm>
#include <cstring>

#include "matrix_product.h"
#include "rotate.h"

namespace {

using lminf::kDigitBase;

constexpr int64_t kRowsTogether = 6;  // of a product in registers
constexpr int64_t kBiasKeys = 32;     // a block's table stays in the first-level cache
static_assert(kDigitBase % kBiasKeys == 0 && kBiasKeys % kWidth == 0);

// Memory of one item for its bias; R dimensions are rotated.
struct BiasScratch {
  float* bias;      // (D)
  float* turned;    // (D), at a multiple of kDigitBase
  float* far;       // (R): cos and sin of that multiple
  float* products;  // (rows, R): u and w
  float* aligned;   // (rows, R): at that multiple
  float* block;     // (rows, R): where a block begins
  float* constant;  // (rows): products of dimensions that are not rotated
  float* table;     // (R, kBiasKeys): cos and sin of 0 … kBiasKeys − 1
  float* logits;    // (rows, kBiasKeys)
};

class KeyBias {
 public:
  KeyBias(const Params& p, const BiasScratch& s, int64_t rows)
      : p_(p), s_(s), rows_(rows), half_(p.rotaryDim / 2) {}

  template <typename T>
  void read(int64_t kvHead) {
    const T* bias = static_cast<const T*>(p_.keyBias) + kvHead * p_.headDim;
    for (int64_t i = 0; i < p_.headDim; ++i) s_.bias[i] = toFloat(bias[i]);
  }

  // u, w and the constant of every row; queries are rotated and scaled.
  void readQueries(const float* query, int64_t stride) {
    // Rows of the last digit carry the attention factor, which a product must have once.
    const float once = half_ == 0 ? 1.0f : 1.0f / p_.cosTable[0];
    for (int64_t r = 0; r < rows_; ++r) {
      const float* q = query + r * stride;
      float *u = s_.products + r * 2 * half_, *w = u + half_;
      for (int64_t i = 0; i < half_; ++i) {
        const int64_t a = first(i), b = second(i);
        u[i] = (q[a] * s_.bias[a] + q[b] * s_.bias[b]) * once;
        w[i] = (q[b] * s_.bias[a] - q[a] * s_.bias[b]) * once;
      }
      float rest = 0.0f;
      for (int64_t i = 2 * half_; i < p_.headDim; ++i) rest += q[i] * s_.bias[i];
      s_.constant[r] = rest;
    }
    makeTable(p_.cosTable, s_.table);
    makeTable(p_.sinTable, s_.table + half_ * kBiasKeys);
  }

  // logits[r][k] += q_r · R_p b for keys at positions p = position + k.
  void addProducts(int64_t position, int64_t count, float* logits, int64_t stride) {
    const int64_t end = position + count;
    for (int64_t p = position; p < end;) {
      const int64_t start = p / kBiasKeys * kBiasKeys, next = std::min(end, start + kBiasKeys);
      if (p == position || start % kDigitBase == 0) turnProducts(start / kDigitBase);
      if (half_ > 0) blockProducts(start % kDigitBase);
      for (int64_t r = 0; r < rows_; ++r) {
        float* to = logits + r * stride + (p - position);
        const float* from = s_.logits + r * kBiasKeys + (p - start);
        for (int64_t k = 0; k < next - p; ++k) {
          to[k] += half_ > 0 ? from[k] + s_.constant[r] : s_.constant[r];
        }
      }
      p = next;
    }
  }

  // keys[k] += R_p b for keys (count, D) at positions p = position + k.
  void addTo(float* keys, int64_t position, int64_t count) {
    for (int64_t k = 0; k < count; ++k, keys += p_.headDim) {
      const int64_t p = position + k, near = p % kDigitBase;
      if (k == 0 || near == 0) turnBias(p / kDigitBase);
      const auto at = [&](int64_t i) { return s_.turned[i]; };
      visitRotated(p_, at, p_.cosTable + near * half_, p_.sinTable + near * half_,
                   [&](int64_t i, float value) { keys[i] += value; });
    }
  }

 private:
  int64_t first(int64_t i) const { return p_.rotaryInterleaved != 0 ? 2 * i : i; }
  int64_t second(int64_t i) const { return p_.rotaryInterleaved != 0 ? 2 * i + 1 : i + half_; }

  // Rows of cos and sin of the position multiple · kDigitBase.
  void findFar(int64_t multiple) {
    float *cos = s_.far, *sin = s_.far + half_;
    std::fill_n(cos, half_, 1.0f);
    std::fill_n(sin, half_, 0.0f);
    for (int64_t digit = 1; multiple != 0; ++digit, multiple /= kDigitBase) {
      const int64_t row = (digit * kDigitBase + multiple % kDigitBase) * half_;
      const float *c = p_.cosTable + row, *s = p_.sinTable + row;
      for (int64_t i = 0; i < half_; ++i) {
        const float before = cos[i];
        cos[i] = before * c[i] - sin[i] * s[i];
        sin[i] = sin[i] * c[i] + before * s[i];
      }
    }
  }

  void turnBias(int64_t multiple) {
    findFar(multiple);
    visitRotated(
        p_, [&](int64_t i) { return s_.bias[i]; }, s_.far, s_.far + half_,
        [&](int64_t i, float value) { s_.turned[i] = value; });
  }

  void turnProducts(int64_t multiple) {
    findFar(multiple);
    turn(s_.products, s_.far, s_.far + half_, s_.aligned);
  }

  // (u, w) of every row from position p to p + d, whose row cos and sin are.
  void turn(const float* from, const float* cos, const float* sin, float* to) {
    for (int64_t r = 0; r < rows_; ++r, from += 2 * half_, to += 2 * half_) {
      for (int64_t i = 0; i < half_; ++i) to[i] = from[i] * cos[i] + from[half_ + i] * sin[i];
      for (int64_t i = 0; i < half_; ++i) {
        to[half_ + i] = from[half_ + i] * cos[i] - from[i] * sin[i];
      }
    }
  }

  void blockProducts(int64_t near) {
    turn(s_.aligned, p_.cosTable + near * half_, p_.sinTable + near * half_, s_.block);
    // A product of fewer rows would wait for its sums.
    const int64_t rest = rows_ % kRowsTogether, lone = rest < 3 ? rest : 0, many = rows_ - lone;
    if (many > 0) {
      product<false>(s_.block, 2 * half_, many, s_.table, kBiasKeys, 2 * half_, s_.logits,
                     kBiasKeys, kBiasKeys);
    }
    for (int64_t r = many; r < rows_; ++r) {
      productOfRow(s_.block + r * 2 * half_, s_.logits + r * kBiasKeys);
    }
  }

  void productOfRow(const float* row, float* out) {
    Vec sum[2][kBiasKeys / kWidth] = {};
    const float* table = s_.table;
    for (int64_t i = 0; i < 2 * half_; i += 2, table += 2 * kBiasKeys) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const Vec factor = splat(row[i + odd]);
        for (int c = 0; c < kBiasKeys / kWidth; ++c) {
          sum[odd][c] += factor * load(table + odd * kBiasKeys + c * kWidth);
        }
      }
    }
    for (int c = 0; c < kBiasKeys / kWidth; ++c) store(out + c * kWidth, sum[0][c] + sum[1][c]);
  }

  // Positions 0 … kBiasKeys − 1 of a table of digits, turned to columns.
  void makeTable(const float* digits, float* out) {
    const int64_t aligned = half_ / 4 * 4;
    for (int64_t i = 0; i < aligned; i += 4) {
      for (int64_t k = 0; k < kBiasKeys; k += 4) {
        Vec4 rows[4];
        for (int j = 0; j < 4; ++j) std::memcpy(rows + j, digits + (k + j) * half_ + i, 16);
        transpose4(rows, rows + 1, rows + 2, rows + 3);
        for (int j = 0; j < 4; ++j) std::memcpy(out + (i + j) * kBiasKeys + k, rows + j, 16);
      }
    }
    for (int64_t i = aligned; i < half_; ++i) {
      for (int64_t k = 0; k < kBiasKeys; ++k) out[i * kBiasKeys + k] = digits[k * half_ + i];
    }
  }

  const Params& p_;
  const BiasScratch& s_;
  const int64_t rows_, half_;
};

}  // namespace
