// How matrices lie in shared memory for the products of a warpgroup.
//
// Rows of D elements are cut into parts of 128 bytes (64 elements); a part of all rows follows
// the other. Of a part, the 16 bytes at column c of row r lie at column c ^ (r % 8): eight rows at
// one column meet no bank twice. The same layout serves as a matrix whose inner index is the
// dimension (queries, keys) and as one whose inner index is the row (values).
#pragma once

#include "arithmetic.h"

namespace lminf {

constexpr int kPartBytes = 128;
constexpr int kPartElements = kPartBytes / 2;
// Eight rows of a part: what the pattern repeats after, so matrices start at a multiple of it.
constexpr int kPatternBytes = 8 * kPartBytes;

// Where elements 8 chunk ... 8 chunk + 7 of a row lie, in bytes from the start of the matrix.
LMINF_HD constexpr int chunkOffset(int row, int chunk, int rows) {
  return chunk / 8 * (rows * kPartBytes) + row * kPartBytes + (chunk % 8 ^ row % 8) * 16;
}

// Descriptors: bits 0 ... 13 hold the address, 16 ... 29 the distance of parts where columns go
// over several, 32 ... 45 that of groups of 8 rows, all in units of 16 bytes; bits 62 and 63 the
// kind of pattern (1: over 128 bytes).
LMINF_HD std::uint64_t describePattern(std::uint32_t address, int partDistance) {
  return static_cast<std::uint64_t>((address & 0x3ffffu) >> 4) |
         static_cast<std::uint64_t>(partDistance / 16) << 16 |
         static_cast<std::uint64_t>(kPatternBytes / 16) << 32 | std::uint64_t{1} << 62;
}
// Of 16 dimensions of all rows; the distance of parts is not used.
LMINF_HD std::uint64_t describeDimensions(std::uint32_t address) {
  return describePattern(address, 16);
}
// Of all dimensions of 16 rows of a matrix of `rows`.
LMINF_HD std::uint64_t describeRows(std::uint32_t address, int rows) {
  return describePattern(address, rows * kPartBytes);
}

// The descriptor `bytes` further on.
LMINF_HD std::uint64_t advanced(std::uint64_t matrix, int bytes) {
  return matrix + static_cast<std::uint64_t>(bytes / 16);
}

// From one step of 16 inner elements to the next, in bytes.
LMINF_HD constexpr int dimensionStep(int step, int rows) {
  return step / 4 * (rows * kPartBytes) + step % 4 * 32;
}
LMINF_HD constexpr int rowStepBytes(int step) { return step * 16 * kPartBytes; }

}  // namespace lminf
