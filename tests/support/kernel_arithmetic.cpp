// The arithmetic shared by host and device, for test_kernels_launcher.py.
#include "arithmetic.h"

extern "C" {

void keySpan(std::int64_t past, int realSteps, int firstStep, int lastStep, std::int64_t window,
             int sinks, int capacity, int* result) {
  const lminf::KeySpan span =
      lminf::keySpan(past, realSteps, firstStep, lastStep, window, sinks,
                     lminf::divisorOf(capacity));
  result[0] = span.sinkCount;
  result[1] = span.ringCount;
  result[2] = span.firstSlot;
  result[3] = span.firstRelative;
}

std::int64_t floorMod(std::int64_t value, std::int64_t modulus) {
  return lminf::floorMod(value, modulus);
}

int ringSlot(int firstSlot, int number, int capacity) {
  return lminf::ringSlot(firstSlot, number, capacity);
}

int splitBegin(int tiles, int split, int splits) {
  return lminf::splitBegin(tiles, split, lminf::divisorOf(splits));
}

// How many of the dividends have a quotient or a rest that C++ has otherwise.
int wrongQuotients(const int* dividends, int count, int value) {
  const lminf::Divisor divisor = lminf::divisorOf(value);
  int wrong = 0;
  for (int index = 0; index < count; ++index) {
    const int dividend = dividends[index];
    wrong += dividend / divisor != dividend / value || dividend % divisor != dividend % value;
  }
  return wrong;
}

void rotaryPair(int dim, int rotaryDim, int interleaved, int* result) {
  const lminf::RotaryPair pair = lminf::rotaryPair(dim, rotaryDim, interleaved != 0);
  result[0] = pair.partner;
  result[1] = pair.pair;
  result[2] = static_cast<int>(pair.sign);
}
}
