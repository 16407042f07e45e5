// The norm as a sum of integers. Integer addition has no order: threads, blocks and devices may add
// in any order, and the sum has the same bits.
//
// A chunk's partial is an fp32 number, maybe times a power of two: 24 significant bits somewhere
// between 2^-321 and 2^270. It is added, exactly, to a fixed-point number of 20 digits of 32 bits.
// Each digit has a 64-bit word of its own, so that 2^31 partials may be added before a carry is
// lost.
#pragma once

#include "platform.h"

namespace fusedopt {

constexpr int kDigits = 20;
constexpr int kLowest = -352;  // digit d counts 2^(32 d + kLowest)

// The words of a step: the digits, then
constexpr int kInfChunks = kDigits;      // chunks with an inf and no NaN
constexpr int kNanChunks = kDigits + 1;  // chunks with a NaN
constexpr int kLargest = kDigits + 2;    // bits of the largest magnitude; combined by the maximum
constexpr int kVotes = kDigits + 3;      // of the ranks: see Vote
constexpr int kWords = kDigits + 4;

// Ranks add up their words, so a rank's vote is a one in a field of the word kVotes.
constexpr int kVoteBits = 21;
enum class Vote : int { kFoundInf = 0, kBadScale = 1, kAbort = 2 };

FUSEDOPT_FN uint64_t vote(Vote about) { return uint64_t{1} << kVoteBits * static_cast<int>(about); }

FUSEDOPT_FN bool voted(const uint64_t* words, Vote about) {
  return (words[kVotes] >> kVoteBits * static_cast<int>(about) & ((1u << kVoteBits) - 1)) != 0;
}

// sum * 2^exponent; the sum of an inf or NaN chunk is its largest magnitude.
struct Partial {
  float sum;
  int exponent;
};

// The numbers that a partial adds to words[at] and words[at + 1].
struct Addend {
  int at;
  uint64_t low, high;
};

// The sum must be normal: not zero, denormal, inf or NaN.
FUSEDOPT_FN Addend addend_of_normal(Partial partial) {
  const uint32_t bits = bits_of(partial.sum);
  const uint32_t lowest_bit =
      (bits >> 23) + static_cast<uint32_t>(partial.exponent - 150 - kLowest);
  const uint64_t shifted = static_cast<uint64_t>((bits & 0x7fffffu) | 0x800000u)
                           << (lowest_bit & 31);
  return {static_cast<int>(lowest_bit >> 5), shifted & 0xffffffffu, shifted >> 32};
}

// Of a chunk that is not counted only inf and NaN are reported.
FUSEDOPT_FN Addend addend_of(Partial partial, bool counted) {
  if (partial.sum == 0.0f) return {0, 0, 0};
  if (partial.sum - partial.sum != 0.0f) {
    return {partial.sum != partial.sum ? kNanChunks : kInfChunks, 1, 0};
  }
  return counted ? addend_of_normal(partial) : Addend{0, 0, 0};
}

// A word of two threads, blocks or devices together.
FUSEDOPT_FN uint64_t combined(int word, uint64_t a, uint64_t b) {
  return word != kLargest ? a + b : a > b ? a : b;
}

// The sum of squares, rounded to nearest even; inf or NaN where a chunk had one.
FUSEDOPT_FN double sum_of_squares(const uint64_t* words) {
  if (words[kNanChunks] != 0) return float_of(0x7fc00000u);
  if (words[kInfChunks] != 0) return float_of(0x7f800000u);
  // The highest digit that is not zero and the two below it have at least 65 significant bits. A
  // double keeps 53 of them. Of all lower bits it matters only whether they are zero.
  uint64_t carry = 0, first = 0, second = 0, third = 0, high = 0, low = 0;
  bool below = false, sticky = false;
  int at = 0;
  for (int d = 0; d <= kDigits; ++d) {
    const uint64_t sum = carry + (d < kDigits ? words[d] : 0);
    below = below || third != 0;
    third = second;
    second = first;
    first = sum & 0xffffffffu;
    carry = sum >> 32;
    if (first != 0) {
      at = d;
      high = first << 32 | second;
      low = third;
      sticky = below;
    }
  }
  if (high == 0) return 0.0;
  int shift = 0;
  while ((high >> (63 - shift)) == 0) ++shift;  // 31 at most, since `first` is not zero
  high = high << shift | low << shift >> 32;
  sticky = sticky || (low << shift & 0xffffffffu) != 0;
  return static_cast<double>(high | (sticky ? 1 : 0)) *
         power_of_two(32 * (at - 1) + kLowest - shift);
}

}  // namespace fusedopt
