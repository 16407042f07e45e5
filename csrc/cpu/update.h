// Updates one chunk of params and states in place, by the rules of ../rules.h. For one element:
//
//   for each chunk, by one thread:                           update_chunk()
//     g = grad[i]                                            fp32 in place, or widened into L1
//     p = master[i], or param[i] where there is none         likewise
//     if (param[i] != narrowed(p)) p = widened(param[i])     someone wrote to the param; not with
//                                                            a remainder, which is beside it
//     s[k] = state[k][i]
//     for each element, vectorised:                          run()
//       g = clip(g * grad_mult, max_grad_value)              unscale, clip, maximize: one factor
//       R::update(hyper, kind, g, p, s...)                   the rule, in registers
//     master[i] = p, param[i] = narrowed(p)                  a remainder holds what is left of p
//     state[k][i] = narrowed(s[k])                           nothing to do where it is fp32
//
// Included by kernels.cpp alone, which is compiled once per instruction set; hence the anonymous
// namespace: nothing in here may be shared between the copies.
#pragma once

#include <utility>

#include "../rules.h"
#include "convert.h"

namespace fusedopt {
namespace {

// One contiguous run of a tensor as the rule sees it: fp32, in memory or in a buffer in L1.
struct Run {
  int64_t n;
  const float* grad;
  float* param;
  float* state[kMaxStates];
};

template <class R>
using RunFn = void (*)(const typename R::Hyper&, const Run&, float grad_mult, float max_grad_value);

// kNumber is that of a kind: decay * kVariants + variant.
template <class R, int kNumber, size_t... k>
void run(const typename R::Hyper& hyper, const Run& run, float grad_mult, float max_grad_value,
         std::index_sequence<k...>) {
  constexpr Kind kKind = {static_cast<Decay>(kNumber / R::kVariants), kNumber % R::kVariants};
  constexpr size_t kThere = R::states(kKind.variant);
  const typename R::Hyper h = hyper;
  const float* __restrict grad = run.grad;
  float* __restrict param = run.param;
  float* const state[] = {run.state[k]...};
  for (int64_t first = 0; first < run.n; first += kSlice) {
    if (run.n > kSlice) {
      prefetch<Fetch::kNear>(grad + first, kSlice);
      prefetch<Fetch::kNear>(param + first, kSlice);
      ((k < kThere ? prefetch<Fetch::kNear>(state[k] + first, kSlice) : void()), ...);
    }
    const int64_t last = min(first + kSlice, run.n);
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      const float g = clipped(grad[i], grad_mult, max_grad_value);
      float p = param[i];
      float s[] = {(k < kThere ? state[k][i] : 0.0f)...};
      R::template update<static_cast<int>(kThere)>(h, kKind, g, p, s[k]...);
      param[i] = p;
      ((k < kThere ? void(state[k][i] = s[k]) : void()), ...);
    }
  }
}

template <class R, int kNumber>
void run_kind(const typename R::Hyper& hyper, const Run& r, float grad_mult, float max_grad_value) {
  run<R, kNumber>(hyper, r, grad_mult, max_grad_value, std::make_index_sequence<R::kStates>());
}

template <class R, int... kNumber>
RunFn<R> run_of(Kind kind, std::integer_sequence<int, kNumber...>) {
  static constexpr RunFn<R> kRuns[] = {run_kind<R, kNumber>...};
  return kRuns[static_cast<int>(kind.decay) * R::kVariants + kind.variant];
}

// Where a param is not the rounding of its master, someone wrote to it since the last step, and the
// master takes that value. The param's cache lines are loaded for the write anyway, so on a CPU the
// comparison costs no bandwidth.
void follow_external_writes(const uint16_t* param, Codec codec, int64_t n, float* master) {
  if (n <= 0) __builtin_unreachable();
  alignas(64) uint16_t expected[kBlock];
  alignas(64) float written[kBlock];
  narrow(master, codec, n, expected);
  if (__builtin_memcmp(expected, param, static_cast<size_t>(n) * sizeof *param) == 0) return;
  widen<Fetch::kNear>(param, codec, n, written);
  for (int64_t i = 0; i < n; ++i) {
    if (expected[i] != param[i]) master[i] = written[i];
  }
}

// A stream of the row that is read and written, from element `begin` on.
class Stream {
 public:
  Stream(const Row& row, int number, int64_t begin, float step)
      : data_(static_cast<char*>(row.data[number]) + begin * bytes_of(row.codec(number))),
        codec_(row.codec(number)),
        row_(row),
        number_(number),
        begin_(begin),
        step_(step) {}

  // param: of a master that is a remainder, else ignored.
  float* load(int64_t n, float* buffer, const Stream& param) const {
    if (codec_ == Codec::kFloat32) return static_cast<float*>(data_);
    if (codec_ <= Codec::kBFloat16) {
      widen<Fetch::kNear>(half(), codec_, n, buffer);
    } else {
      decode(n, buffer, param);
    }
    return buffer;
  }

  // x: the result of this stream's load(), or of another's. A remainder writes the param, too.
  void store(int64_t n, const float* x, const Stream& param) const {
    if (codec_ == Codec::kFloat32) return;  // x is where the data lies
    if (codec_ <= Codec::kBFloat16) {
      narrow(x, codec_, n, half());
    } else {
      encode(n, x, param);
    }
  }

  uint16_t* half() const { return static_cast<uint16_t*>(data_); }
  Codec codec() const { return codec_; }
  bool is_remainder() const {
    return codec_ == Codec::kRemainder16 || codec_ == Codec::kRemainder8;
  }

 private:
  // Codecs of states and masters: apart, so that plans without them do not carry their code.
  __attribute__((noinline)) void decode(int64_t n, float* buffer, const Stream& param) const {
    switch (codec_) {
      case Codec::kDithered:
        widen<Fetch::kNear>(half(), Codec::kBFloat16, n, buffer);
        break;
      case Codec::kLog8:
        widen_log8<Log8<true>>(bytes(), scales(), n, buffer);
        break;
      case Codec::kLog8Positive:
        widen_log8<Log8<false>>(bytes(), scales(), n, buffer);
        break;
      case Codec::kRemainder16:
        HalfCodecs::with(param.codec_, [=, &param](auto p) {
          join16<decltype(p)>(param.half(), static_cast<int16_t*>(data_), n, buffer);
        });
        break;
      default:  // kRemainder8
        join8(param.half(), static_cast<int8_t*>(data_), n, buffer);
    }
  }

  __attribute__((noinline)) void encode(int64_t n, const float* x, const Stream& param) const {
    switch (codec_) {
      case Codec::kDithered:
        narrow_dithered(x, seed(), at(), n, half());
        break;
      case Codec::kLog8:
        narrow_log8<Log8<true>>(x, seed(), at(), n, bytes(), scales());
        break;
      case Codec::kLog8Positive:
        narrow_log8<Log8<false>>(x, seed(), at(), n, bytes(), scales());
        break;
      case Codec::kRemainder16:
        HalfCodecs::with(param.codec_, [=, &param](auto p) {
          split16<decltype(p)>(x, n, param.half(), static_cast<int16_t*>(data_));
        });
        break;
      default:  // kRemainder8
        split8(x, seed(), at(), n, param.half(), static_cast<int8_t*>(data_));
    }
  }

  uint8_t* bytes() const { return static_cast<uint8_t*>(data_); }
  uint8_t* scales() const { return row_.scales[number_] + begin_ / kScaleBlock; }
  uint32_t at() const { return static_cast<uint32_t>(begin_); }
  uint32_t seed() const {
    const int stream = number_ < kStates ? 0 : number_ - kStates + 1;
    return dither_seed(static_cast<uint32_t>(row_.first), step_, static_cast<uint32_t>(stream));
  }

  void* const data_;
  const Codec codec_;
  const Row& row_;
  const int number_;
  const int64_t begin_;
  const float step_;
};

// For any codecs: streams that are not fp32 go through buffers.
template <class RunRule>
void update_block(const Row& row, const Grad& grad, float step, int64_t begin, int64_t n,
                  int n_states, const RunRule& run_rule) {
  alignas(64) float buffers[kStreams][kBlock];
  alignas(64) float grad_buffer[kBlock];
  const bool has_master = row.data[kMaster] != nullptr;
  const Stream param(row, kParam, begin, step);
  const Stream primary(row, has_master ? kMaster : kParam, begin, step);
  const bool follows = has_master && !primary.is_remainder();  // the param is a rounded copy
  Run run = {n, as_float<Fetch::kNear>(grad.data, grad.codec, begin, n, grad_buffer), nullptr, {}};
  for (int s = 0; s < n_states; ++s) {
    run.state[s] = Stream(row, kStates + s, begin, step).load(n, buffers[kStates + s], param);
  }
  run.param = primary.load(n, buffers[kParam], param);
  if (follows) follow_external_writes(param.half(), param.codec(), n, run.param);
  run_rule(run);
  primary.store(n, run.param, param);
  if (follows) param.store(n, run.param, param);
  for (int s = 0; s < n_states; ++s) {
    Stream(row, kStates + s, begin, step).store(n, run.state[s], param);
  }
}

template <class R>
void update_chunk(const PlanView& plan, const Chunk& chunk, const StepRecord& step) {
  const Row& row = plan.rows[chunk.row];
  const Grad& grad = plan.grads[chunk.row];
  if (!grad.present) return;
  const auto& options = static_cast<const typename R::Options*>(plan.options)[row.group];
  const auto& row_step = static_cast<const RowStep<R>*>(plan.row_steps)[chunk.row];
  const auto& hyper = row_step.hyper;
  const Kind kind = kind_of<R>(options);
  const RunFn<R> fn = run_of<R>(kind, std::make_integer_sequence<int, kDecays * R::kVariants>());
  const float grad_mult = options.maximize ? -step.scalars->grad_mult : step.scalars->grad_mult;
  const float max_grad_value = static_cast<float>(step.max_grad_value);
  const int n_states = R::states(kind.variant);

  const int64_t first = chunk.index * kChunk;
  const int64_t n = min(kChunk, row.numel - first);
  if (row.codecs == 0 && grad.codec == Codec::kFloat32) {
    Run run = {n, static_cast<const float*>(grad.data) + first, row.as_float(kParam) + first, {}};
    for (int s = 0; s < n_states; ++s) run.state[s] = row.as_float(kStates + s) + first;
    return fn(hyper, run, grad_mult, max_grad_value);
  }
  const auto run_rule = [=, &hyper](const Run& run) { fn(hyper, run, grad_mult, max_grad_value); };
  for (int64_t at = 0; at < n; at += kBlock) {
    update_block(row, grad, row_step.step, first + at, min(kBlock, n - at), n_states, run_rule);
  }
}

}  // namespace
}  // namespace fusedopt
