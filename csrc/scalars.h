// The scalars of a step: norm, clip coefficient, and the decision to skip.
#pragma once

#include "records.h"
#include "words.h"

namespace fusedopt {

constexpr double kClipEpsilon = 1e-6;  // torch.nn.utils.clip_grad_norm_

FUSEDOPT_FN float inverse_scale(const float* grad_scale) {
  return grad_scale ? static_cast<float>(1.0 / static_cast<double>(*grad_scale)) : 1.0f;
}

// Whether the sum of squares of a chunk neither over- nor underflowed fp32; false for NaN.
FUSEDOPT_FN bool in_range(float sum) { return sum >= 0x1p-80f && sum <= 0x1.fffffep127f; }

// Otherwise the chunk is summed once more, with elements scaled by a power of two to around one. So
// finite elements have a finite sum, and only an inf or NaN element makes a partial non-finite.
struct Rescale {
  float scale;
  int exponent;  // the sum is to be multiplied by 2^exponent, which is 1 / scale^2
};

FUSEDOPT_FN Rescale rescale_for(float largest) {
  int exponent = static_cast<int>(bits_of(largest) >> 23) - 127;
  exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
  return {float_of(static_cast<uint32_t>(127 - exponent) << 23), 2 * exponent};
}

FUSEDOPT_FN bool is_finite(double x) { return x - x == 0.0; }

// The norm of all gradients: finite if all elements are finite, else inf or NaN.
FUSEDOPT_FN double norm_of(const StepRecord& step, const uint64_t* words) {
  if (!step.has(StepRecord::kNormIsTwo)) return float_of(static_cast<uint32_t>(words[kLargest]));
  return sqrt(sum_of_squares(words));
}

// `!= 0`, not `== 1`: GradScaler passes the sum of one flag per device.
FUSEDOPT_FN bool scaler_found_inf(const StepRecord& step) {
  return step.found_inf && *step.found_inf != 0.0f;
}

// What a rank adds to its words, before the ranks add them up. Fingerprints are sums and are alike
// if the sum is a multiple of one's own: each is a hash, so no other case is expected. Where words
// are combined by their maximum, a fingerprint and its complement are.
constexpr uint64_t kFingerprints = uint64_t{1} << 32;

FUSEDOPT_FN uint64_t word_of_rank(const StepRecord& step, int word) {
  if (step.n_ranks == 0) return 0;
  if (word == kVotes) {
    const bool bad_scale = !is_finite(static_cast<double>(inverse_scale(step.grad_scale)));
    return (scaler_found_inf(step) ? vote(Vote::kFoundInf) : 0) |
           (bad_scale ? vote(Vote::kBadScale) : 0);
  }
  if (step.has(StepRecord::kNormIsTwo)) {
    return word == kLargest ? kFingerprints << 8 | step.fingerprint : 0;
  }
  return word == kDigits - 2   ? step.fingerprint
         : word == kDigits - 1 ? kFingerprints - step.fingerprint
                               : 0;
}

// Why no rank may do this step; the values of *StepRecord::refusal.
enum class Refusal : int { kNone = 0, kAbort = 1, kOptions = 2 };

FUSEDOPT_FN Refusal refusal(const StepRecord& step, const uint64_t* words) {
  if (step.n_ranks == 0) return Refusal::kNone;
  if (voted(words, Vote::kAbort)) return Refusal::kAbort;
  const bool alike = step.has(StepRecord::kNormIsTwo)
                         ? words[kLargest] == step.n_ranks * word_of_rank(step, kLargest)
                         : words[kLargest] < kFingerprints &&
                               words[kDigits - 2] + words[kDigits - 1] == kFingerprints;
  return alike ? Refusal::kNone : Refusal::kOptions;
}

// A loss scale without a finite reciprocal (up to 2^-128, or NaN) would make every param NaN, so it
// always skips the step. The update counts the skipped step: no error can follow there.
FUSEDOPT_FN void decide(const StepRecord& step, const uint64_t* words, StepScalars& s) {
  const Refusal refused = refusal(step, words);
  if (refused != Refusal::kNone) {
    *step.refusal = static_cast<int32_t>(refused);
    s.skip = 2.0f;
    if (step.inf_flag) *step.inf_flag = 0.0f;  // as after any step that fails
    return;
  }
  const bool measured = step.has(StepRecord::kMeasured);
  const double norm = measured ? norm_of(step, words) : 0.0;
  s.inv_scale = inverse_scale(step.grad_scale);
  s.grad_norm = measured ? static_cast<float>(norm) : float_of(0x7fc00000u);
  s.clip_coef = 1.0f;
  if (measured && step.max_grad_norm >= 0.0) {
    const float coef = static_cast<float>(step.max_grad_norm / (norm + kClipEpsilon));
    s.clip_coef = coef > 1.0f ? 1.0f : coef;  // NaN stays NaN
  }
  s.grad_mult =
      static_cast<float>(static_cast<double>(s.clip_coef) * static_cast<double>(s.inv_scale));
  const bool alone = step.n_ranks == 0;
  const bool bad_scale =
      alone ? !is_finite(static_cast<double>(s.inv_scale)) : voted(words, Vote::kBadScale);
  const bool found = alone ? scaler_found_inf(step) : voted(words, Vote::kFoundInf);
  const bool bad = bad_scale || !is_finite(norm) || found;
  s.found_inf = bad ? 1.0f : 0.0f;
  s.skip = bad_scale || (bad && step.has(StepRecord::kSkipNonfinite)) ? 1.0f : 0.0f;
  if (step.inf_flag) *step.inf_flag = s.found_inf;
}

}  // namespace fusedopt
