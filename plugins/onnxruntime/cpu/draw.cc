#include "draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "attention.h"

namespace lminf::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kListed = 8192;    // logits that are weighed one by one
constexpr int64_t kTopBlocks = 512;  // whose largest logits are all summed, to guess where p is
constexpr int64_t kBlockStride = 8;  // of the blocks that are asked where those are
constexpr int64_t kSamples = 4096;   // of the others
constexpr int64_t kSorted = 64;
constexpr int32_t kBins = 512;
constexpr int64_t kRoom = 64;  // vectors write behind the last id

struct Member {
  float value;
  int32_t place;
  double weight;
};

// Memory of one thread.
struct Memory {
  std::vector<float> largest, some;
  std::vector<int32_t> ids;
  std::vector<Member> members;
  std::vector<float> values;
  std::vector<double> weights, kept;
};

thread_local Memory memory;

// Kept: logits above the value, and those equal to it up to this place in the list.
struct Cut {
  float value;
  int64_t place;
  bool reached;  // the sum that was asked for

  bool keeps(float logit, int64_t at) const {
    return (logit > value) | ((logit == value) & (at <= place));  // without a branch
  }
};

constexpr Cut kKeepAll = {-kInfinity, std::numeric_limits<int64_t>::max(), false};

// Adds up weights by where their values are between high and low, from the highest bin on until
// `target` is reached. Returns the bin that reaches it; *sum: of those before it.
struct Bins {
  double high, step;

  Bins(float low, float high)
      : high(high), step((kBins - 0.01) / (static_cast<double>(high) - low)) {}
  int32_t at(float value) const { return static_cast<int32_t>((high - value) * step); }

  template <typename At>
  int32_t reaching(int64_t count, At member, double target, double* sum) const {
    double sums[kBins] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Member m = member(i);
      sums[at(m.value)] += m.weight;
    }
    int32_t found = 0;
    for (int32_t i = 0; i < kBins && *sum < target; ++i) {
      if (sums[i] == 0) continue;
      found = i, *sum += sums[i];
    }
    *sum -= sums[found];
    return found;
  }
};

// The shortest run of a list, from its largest value on and of equal ones the first, whose weights
// reach `target`. What is far from the cut is never sorted. All values are in low … high, or any
// where low is −infinity.
Cut cutOf(const float* values, const double* weights, int64_t count, double target, float low,
          float high) {
  auto& members = memory.members;
  members.resize(count);
  int64_t left = 0;
  double sum = 0;
  const auto take = [&](auto wanted) {
    for (int64_t i = 0; i < count; ++i) {
      members[left] = {values[i], static_cast<int32_t>(i), weights[i]};
      left += wanted(members[left]);
    }
  };
  if (low > kLowest && low < high) {
    const Bins bins(low, high);
    const auto member = [&](int64_t i) { return Member{values[i], 0, weights[i]}; };
    const int32_t found = bins.reaching(count, member, target, &sum);
    take([&](const Member& m) { return bins.at(m.value) == found; });
  } else {
    take([](const Member& m) { return m.weight > 0; });
  }
  if (left == 0) return kKeepAll;
  while (left > kSorted) {
    const auto [least, most] =
        std::minmax_element(members.begin(), members.begin() + left,
                            [](const Member& a, const Member& b) { return a.value < b.value; });
    if (least->value == most->value) break;
    const Bins bins(least->value, most->value);
    const auto member = [&](int64_t i) { return members[i]; };
    const int32_t found = bins.reaching(left, member, target, &sum);
    int64_t some = 0;
    for (int64_t i = 0; i < left; ++i) {
      members[some] = members[i];
      some += bins.at(members[some].value) == found;
    }
    left = some;
  }
  if (left <= kSorted) {
    std::stable_sort(members.begin(), members.begin() + left,
                     [](const Member& a, const Member& b) { return a.value > b.value; });
  }
  int64_t last = 0;
  for (sum += members[0].weight; sum < target && last + 1 < left;) sum += members[++last].weight;
  return {members[last].value, members[last].place, sum >= target};
}

constexpr auto kDescending = [](float a, float b) { return a > b; };

float largestOf(const std::vector<float>& values) {
  constexpr int64_t kLanes = 16;  // independent ones, to be vectors
  float most[kLanes];
  std::fill(most, most + kLanes, -kInfinity);
  const int64_t count = static_cast<int64_t>(values.size());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float x = values[i + lane];
      most[lane] = x > most[lane] ? x : most[lane];
    }
  }
  for (; i < count; ++i) most[0] = std::max(most[0], values[i]);
  return *std::max_element(most, most + kLanes);
}

float nthLargest(std::vector<float>* some, int64_t n) {
  std::nth_element(some->begin(), some->begin() + (n - 1), some->end(), kDescending);
  return (*some)[n - 1];
}

// One logit of each of kSamples stretches, at places that follow no pattern.
void sample(const Draw& d, std::vector<float>* out) {
  const int64_t stretch = d.count / kSamples;
  uint32_t place = 1;
  out->resize(kSamples);
  for (int64_t i = 0; i < kSamples; ++i) {
    place = place * 1664525u + 1013904223u;
    (*out)[i] = d.logits[i * stretch + (place >> 8) % stretch];
  }
}

// Copies the logits from `low` on, and their ids.
int64_t listFrom(const Draw& d, const DrawKernels& kernels, float low, std::vector<float>* out) {
  const int32_t* ids = memory.ids.data();
  const int64_t found =
      kernels.from(d.logits, d.count, memory.largest.data(), low, memory.ids.data());
  out->resize(found);
  for (int64_t i = 0; i < found; ++i) (*out)[i] = d.logits[ids[i]];
  return found;
}

// The k-th largest logit.
float kthLargest(const Draw& d, const DrawKernels& kernels) {
  auto& some = memory.some;
  float low = -kInfinity;
  if (d.topK <= static_cast<int64_t>(memory.largest.size())) {
    // As many blocks have one at least as large as their k-th largest, so it is among those.
    some = memory.largest;
    low = nthLargest(&some, d.topK);
  } else if (d.count > kListed) {
    sample(d, &some);
    const double share = static_cast<double>(d.topK) / static_cast<double>(d.count);
    const double rank = share * kSamples;
    const int64_t likely = static_cast<int64_t>(rank + 4 * std::sqrt(rank)) + 4;
    if (likely < kSamples) low = nthLargest(&some, likely);
  }
  if (listFrom(d, kernels, low, &some) < d.topK) listFrom(d, kernels, -kInfinity, &some);
  return nthLargest(&some, d.topK);
}

// Floats as integers of the same order, and back.
int32_t orderOf(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? std::numeric_limits<int32_t>::min() - bits : bits;
}

float floatAt(int32_t order) {
  const int32_t bits = order < 0 ? std::numeric_limits<int32_t>::min() - order : order;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The least logit whose weight min-p keeps.
float floorOf(const Draw& d, Scale scale) {
  if (d.leastExponent == -std::numeric_limits<double>::infinity()) return -kInfinity;
  int64_t below = int64_t{orderOf(kLowest)} - 1, kept = orderOf(scale.largest);
  while (kept - below > 1) {
    const int64_t middle = below + (kept - below) / 2;
    const double logit = floatAt(static_cast<int32_t>(middle));
    const bool keeps = (logit - scale.largest) * scale.inverse >= d.leastExponent;
    (keeps ? kept : below) = middle;
  }
  return floatAt(static_cast<int32_t>(kept));
}

// Draws among ids in order, by their weights.
int64_t drawListed(const Draw& d, const DrawKernels& kernels, Scale scale, int64_t count) {
  const auto& ids = memory.ids;
  auto& values = memory.values;
  auto& weights = memory.weights;
  values.resize(count), weights.resize(count);
  for (int64_t i = 0; i < count; ++i) values[i] = d.logits[ids[i]];
  kernels.weights(values.data(), count, scale, weights.data());
  Cut cut = kKeepAll;
  if (d.topP < 1) {
    const double all = std::accumulate(weights.begin(), weights.end(), 0.0);
    cut = cutOf(values.data(), weights.data(), count, d.topP * all, -kInfinity, kInfinity);
  }
  const float floor = floorOf(d, scale);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!cut.keeps(values[i], i) || values[i] < floor) weights[i] = 0;
    sum += weights[i];
  }
  const double target = d.uniform * sum;
  int64_t last = kNoToken;
  double before = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] == 0) continue;
    before += weights[i], last = ids[i];
    if (before > target) break;
  }
  return last;
}

// Where the cut of top-p is, by an estimate: the largest logits are summed, of the others some.
DrawCuts guessCuts(const Draw& d, const DrawKernels& kernels, Scale scale) {
  auto& some = memory.some;
  // Any value would do for `top`: some of the blocks say well enough where it is.
  const int64_t blocks = static_cast<int64_t>(memory.largest.size());
  some.clear();
  for (int64_t i = 0; i < blocks; i += kBlockStride) some.push_back(memory.largest[i]);
  const int64_t rank = std::min<int64_t>(kTopBlocks, blocks / 4) / kBlockStride;
  const float top = nthLargest(&some, std::max<int64_t>(rank, 1));
  const int64_t found = listFrom(d, kernels, top, &some);
  memory.weights.resize(std::max(found, kSamples));
  double* weights = memory.weights.data();
  kernels.weights(some.data(), found, scale, weights);
  const double sum = std::accumulate(weights, weights + found, 0.0);
  sample(d, &some);
  kernels.weights(some.data(), kSamples, scale, weights);
  // The others, by how far they are below `top`; what is 700 / inverse below has no weight.
  const double each = static_cast<double>(d.count) / kSamples, deepest = 700 / scale.inverse;
  float least = top;
  for (const float x : some) least = std::min(least, x);
  const double step = (kBins - 0.01) / std::max(std::min(double{top} - least, deepest), 1e-30);
  double sums[kBins] = {}, squares[kBins] = {}, all = sum;
  for (int64_t i = 0; i < kSamples; ++i) {
    if (some[i] >= top) continue;
    const double weight = each * weights[i];
    const double at = std::min((double{top} - some[i]) * step, kBins - 1.0);
    sums[static_cast<int32_t>(at)] += weight, squares[static_cast<int32_t>(at)] += weight * weight;
    all += weight;
  }
  // The error of what is above the cut less p times all.
  const double target = d.topP * all;
  double above = sum, variance = 0;
  for (int32_t i = 0; i < kBins; ++i) {
    above += sums[i];
    const double part = above < target ? 1 - d.topP : d.topP;
    variance += part * part * squares[i];
  }
  const double error = 3 * std::sqrt(variance);
  DrawCuts cuts = {sum >= target + error ? top : kLowest, kInfinity, -kInfinity};
  above = sum;
  for (int32_t i = 0; i < kBins; ++i) {
    above += sums[i];
    const float below = static_cast<float>(top - (i + 1) / step);
    if (above < target - error) cuts.high = below;
    if (above >= target + error && cuts.low == kLowest) cuts.low = below;
  }
  return cuts;
}

// Draws among all logits: a pass over their weights, then one block.
int64_t drawAll(const Draw& d, const DrawKernels& kernels, Scale scale) {
  const int64_t blocks = static_cast<int64_t>(memory.largest.size());
  memory.kept.resize(blocks);
  DrawSums sums{0, 0, memory.kept.data(), nullptr, 0};
  DrawCuts cuts = {-kInfinity, -kInfinity, floorOf(d, scale)};
  Cut cut = kKeepAll;
  if (d.topP < 1) {
    const float floor = cuts.floor;
    const DrawCuts guess = guessCuts(d, kernels, scale);
    cuts = {guess.low, guess.high, floor};
    // Where min-p cuts higher, it is enough to know that the sum from there on does not reach p.
    if (floor > cuts.high) cuts.low = cuts.high = floor;
    sums.ids = memory.ids.data();
    auto& values = memory.values;
    auto& weights = memory.weights;
    for (;;) {
      kernels.sums(d.logits, d.count, scale, cuts, &sums);
      const double target = d.topP * sums.all - sums.high;
      if (cuts.low == cuts.high) {
        if (target > 0) break;
        cuts = {guess.low, guess.high, floor};
        continue;
      }
      const bool everything = cuts.low == kLowest && cuts.high == kInfinity;
      if (target > 0 || everything) {
        values.resize(sums.found), weights.resize(sums.found);
        for (int64_t i = 0; i < sums.found; ++i) values[i] = d.logits[sums.ids[i]];
        kernels.weights(values.data(), sums.found, scale, weights.data());
        cut = cutOf(values.data(), weights.data(), sums.found, target, cuts.low,
                    std::min(cuts.high, scale.largest));
      }
      if (cut.reached || everything) break;
      cuts.low = kLowest, cuts.high = kInfinity;
    }
    if (cut.place < sums.found) cut.place = sums.ids[cut.place];
    for (int64_t i = 0; i < sums.found; ++i) {  // a product has no branch
      weights[i] *= cut.keeps(values[i], sums.ids[i]) & (values[i] >= floor);
    }
    for (int64_t i = 0; i < sums.found;) {
      const int64_t block = sums.ids[i] / kDrawBlock;
      double sum = 0;
      for (; i < sums.found && sums.ids[i] / kDrawBlock == block; ++i) sum += weights[i];
      sums.kept[block] += sum;
    }
  } else {
    kernels.sums(d.logits, d.count, scale, cuts, &sums);
  }
  const double sum = std::accumulate(memory.kept.begin(), memory.kept.end(), 0.0);
  if (!(sum > 0)) return kNoToken;
  const double target = d.uniform * sum;
  double before = 0;
  int64_t last = kNoToken;
  for (int64_t block = 0; block < blocks; ++block) {
    if (sums.kept[block] == 0) continue;
    const int64_t first = block * kDrawBlock;
    last = block;
    if (before + sums.kept[block] > target || first + kDrawBlock >= d.count) break;
    before += sums.kept[block];
  }
  const int64_t first = last * kDrawBlock, count = std::min(kDrawBlock, d.count - first);
  double weights[kDrawBlock];
  kernels.weights(d.logits + first, count, scale, weights);
  int64_t found = kNoToken;
  for (int64_t i = 0; i < count; ++i) {
    const float logit = d.logits[first + i];
    if (weights[i] == 0 || logit < cuts.floor || !cut.keeps(logit, first + i)) continue;
    before += weights[i], found = first + i;
    if (before > target) break;
  }
  return found;
}

int64_t drawWithin(const Draw& d, const DrawKernels& kernels) {
  const int64_t blocks = (d.count + kDrawBlock - 1) / kDrawBlock;
  memory.largest.resize(blocks);
  memory.ids.resize(d.count + kRoom);
  if (!kernels.largest(d.logits, d.count, memory.largest.data())) return kNoToken;
  const Scale scale = {largestOf(memory.largest), d.inverse};
  if (!std::isfinite(scale.largest)) return kNoToken;
  const bool cutsTop = d.topK > 0 && d.topK < d.count;
  if (!cutsTop && d.count > kListed) return drawAll(d, kernels, scale);
  const float low = cutsTop ? kthLargest(d, kernels) : -kInfinity;
  const int64_t count =
      kernels.from(d.logits, d.count, memory.largest.data(), low, memory.ids.data());
  return drawListed(d, kernels, scale, count);
}

}  // namespace

const DrawKernels& activeDraw() {
#if defined(__x86_64__)
  const char* name = activeKernels().name;
  if (std::strncmp(name, "avx512", 6) == 0) return kDrawAvx512;
  if (std::strcmp(name, "avx2") == 0) return kDrawAvx2;
#endif
  return kDrawPortable;
}

int64_t drawToken(const Draw& d, const DrawKernels& kernels) {
  try {
    return drawWithin(d, kernels);
  } catch (const std::bad_alloc&) {
    return kNoDrawMemory;
  }
}

}  // namespace lminf::cpu
