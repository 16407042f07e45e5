// The update of update.cuh for states and masters in fewer bits than fp32, a block of 128 elements
// after the other:
//
//   for 128 elements, by one warp, four in each thread:        update_blocks()
//     bits of grad, param, master and states                   load(); all of them first
//     to fp32, each by its codec                               widen_primary(), widen_stream()
//     the rule, in registers                                   apply()
//     back to bits, each by its codec, and to memory           narrow_*(), store()
#pragma once

#include "coded.cuh"
#include "update.cuh"

namespace fusedopt {

template <class K>
struct CodedWork {
  int64_t chunk;  // negative: the block is done
  CodedStream grad;
  CodedStream primary;  // the values to update: param or master
  CodedStream half;     // the fp16 or bf16 param beside a master
  CodedStream state[K::kStates];
  typename K::R::Hyper hyper;
  Kind kind;
  float grad_mult, max_grad_value;
  int n;
  int whole;  // elements in whole blocks with all streams but the gradient aligned
  bool grad_aligned;

  FUSEDOPT_DEVICE bool has_state(int k) const { return k < K::R::kAlways || state[k].data; }
};

FUSEDOPT_DEVICE CodedStream coded_stream_at(const Row& row, int stream, int64_t begin, float step) {
  const Codec codec = row.codec(stream);
  uint8_t* const scales = row.scales[stream];
  const auto number = static_cast<uint32_t>(stream < kStates ? 0 : stream - kStates + 1);
  const uint32_t seed = dither_seed(static_cast<uint32_t>(row.first), step, number);
  return {stream_at(row.data[stream], codec, begin).data,
          scales ? scales + begin / kScaleBlock : nullptr,
          dither(seed, static_cast<uint32_t>(begin)), codec, static_cast<int32_t>(bytes_of(codec))};
}

template <class K>
FUSEDOPT_DEVICE void prepare(const DeviceStep& step, const Chunk& chunk, CodedWork<K>& w) {
  using R = typename K::R;
  const Grad& grad = step.plan.grads[chunk.row];
  const Row& row = step.plan.rows[chunk.row];
  const float count = static_cast<const RowStep<R>*>(step.plan.row_steps)[chunk.row].step;
  const int64_t begin = chunk.index * kChunk;
  const int64_t left = grad.present ? row.numel - begin : 0;
  const bool has_master = row.data[kMaster] != nullptr;
  w.n = static_cast<int>(left < kChunk ? left : kChunk);
  w.grad = {stream_at(grad.data, grad.codec, begin).data, nullptr, 0, grad.codec,
            static_cast<int32_t>(bytes_of(grad.codec))};
  w.grad_aligned = w.grad.aligned();
  w.primary = coded_stream_at(row, has_master ? kMaster : kParam, begin, count);
  w.half = has_master ? coded_stream_at(row, kParam, begin, count) : CodedStream{};
  bool aligned = w.primary.aligned() && (!has_master || w.half.aligned());
  for (int k = 0; k < K::kStates; ++k) {
    w.state[k] = coded_stream_at(row, kStates + k, begin, count);
    aligned = aligned && w.state[k].aligned();
  }
  w.whole = aligned ? w.n / kScaleBlock * kScaleBlock : 0;
  prepare_numbers<R>(step, chunk, row, w);
}

// The bits of a block in a thread's registers, and later the values.
template <class K>
struct CodedGroup {
  uint32_t grad[4], primary[4], half[2], state[K::kStates][4];
};

template <bool kWhole, class K>
FUSEDOPT_DEVICE void load(const CodedWork<K>& w, const Place& at, CodedGroup<K>& x) {
  if (kWhole && w.grad_aligned) {
    load_bits<true>(w.grad, at, x.grad);
  } else {
    load_bits<false>(w.grad, at, x.grad);
  }
  load_bits<kWhole>(w.primary, at, x.primary);
  if (w.half.data) load_bits<kWhole>(w.half, at, x.half);
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
    if (w.has_state(k)) {
      load_bits<kWhole>(w.state[k], at, x.state[k]);
    } else {
      for (uint32_t& bits : x.state[k]) bits = bits_of(K::R::absent(k));
    }
  }
}

template <class K>
FUSEDOPT_DEVICE void update_group(const CodedWork<K>& w, CodedGroup<K>& x) {
  widen_stream(w.grad, x.grad);
  widen_primary(w.primary, w.half, x.half, x.primary);
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
    if (w.has_state(k)) widen_stream(w.state[k], x.state[k]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float p = float_of(x.primary[j]);
    float state[K::R::kStates] = {};
#pragma unroll
    for (int k = 0; k < K::kStates; ++k) state[k] = float_of(x.state[k][j]);
    apply<K>(w, float_of(x.grad[j]), p, state);
    x.primary[j] = bits_of(p);
#pragma unroll
    for (int k = 0; k < K::kStates; ++k) x.state[k][j] = bits_of(state[k]);
  }
}

template <bool kWhole, class K>
FUSEDOPT_DEVICE void store(const CodedWork<K>& w, const Place& at, CodedGroup<K>& x) {
  narrow_primary(w.primary, w.half, at, x.primary, x.half);
  store_bits<kWhole>(w.primary, at, x.primary);
  if (w.half.data) store_bits<kWhole>(w.half, at, x.half);
#pragma unroll
  for (int k = 0; k < K::kStates; ++k) {
    if (!w.has_state(k)) continue;
    narrow_state(w.state[k], at, x.state[k]);
    store_bits<kWhole>(w.state[k], at, x.state[k]);
  }
}

// Elements [begin, end) of the chunk, from the first of a block on.
template <bool kWhole, class K>
FUSEDOPT_DEVICE void update_blocks(const CodedWork<K>& w, int t, int begin, int end) {
  const int of_warp = t / kWarp * kScaleBlock;
  for (int at = begin + of_warp; at < end; at += kWarps * kScaleBlock) {
    const int first = at + t % kWarp * 4;
    const int left = end - first < 0 ? 0 : end - first;
    const Place place = {first, at / kScaleBlock, kWhole || left > 4 ? 4 : left};
    CodedGroup<K> x = {};
    load<kWhole>(w, place, x);
    update_group(w, x);
    store<kWhole>(w, place, x);
  }
}

template <class K>
FUSEDOPT_DEVICE void update_chunk(const CodedWork<K>& w, int t) {
  update_blocks<true>(w, t, 0, w.whole);
  update_blocks<false>(w, t, w.whole, w.n);
}

}  // namespace fusedopt
