// Matrix products of activation rows with packed weights, with a fused epilogue. Every op of this library except
// attention and the depthwise convolution is computed by this GEMM.
//
//   y[m, n] = residual[m, n] + scale[n] * post( bias[n] + sum_{tap, c} rows[m, tap, c] * weight[n, tap, c] )
//
// Weights are packed in panels of P = 2 W outputs, [N / P, taps, C, P], padded with zeros to a multiple of P. `Rows`
// addresses its elements with explicit steps between rows and between taps, and rows may overlap in memory: a
// convolution over channels-last input is this product without an im2col copy, since row m begins `stride` time steps
// after row m - 1. The micro-kernel computes a register tile of at most R rows by one panel and keeps its sums in
// registers over all taps and channels. A panel is multiplied with all rows before the next panel is started.
//
// Strides in memory are called steps here, because `stride` is that of a convolution. They are counted in elements.
#pragma once
#include <climits>
#include <type_traits>
#include <utility>

#include "digits.h"
#include "simd.h"

namespace {

constexpr int P = 2 * W;  // outputs per panel
// The most rows of a register tile: 2 R accumulators, two vectors of weights and one broadcast input fill the vector
// registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int R = 12;  // of 32 registers
#else
constexpr int R = 6;  // of 16
#endif
constexpr long MAX_SINGLE_OUTPUT_DEPTH = 1024;  // channels in multiply_single_output
constexpr int MAX_SHALLOW_DEPTH = 8;            // values of a row in multiply_shallow

// The type of a row's values before quantization: that of the row, except for rows of digits
template <class Row>
struct ValueOf {
  typedef Row Type;
};
template <>
struct ValueOf<uint8_t> {
  typedef float Type;
};

// A kind of product: the storage types of activation rows and weights
MIRRORED(enum, Kind, {FULL, HALF, INT8, PAIRS, DIGITS});

template <class RowType, class WeightType, long CHANNELS, int MAX_ROWS>
struct KindOf {
  typedef RowType Row;
  typedef WeightType Weight;
  static constexpr long GROUP = CHANNELS;              // channels per iteration of the inner loop
  static constexpr int ROWS = MAX_ROWS;                // of a register tile
  static constexpr bool QUANTIZED = sizeof(Row) == 1;  // rows are written as fp32, then quantized (digits.h)
  typedef typename ValueOf<Row>::Type Value;
  // Elements of type Row that a row with this many channels occupies
  static constexpr long row_elements(long channels) {
    return QUANTIZED ? 3 * channels + (long)sizeof(Trailer) : channels;
  }
};
struct Full : KindOf<float, float, 1, R> {};
struct Half : KindOf<float, bf16, 1, R> {};         // weights are widened to fp32 when they are loaded
struct Int8 : KindOf<float, int8_t, 1, R> {};       // the same, with a quantization step per output
struct Pairs : KindOf<bf16, bf16, 2, R> {};         // dot products of channel pairs: [N / P, taps, C / 2, P, 2]
struct Digits : KindOf<uint8_t, uint8_t, 4, 4> {};  // VNNI, digits.h: [N / P, taps, C / 4, P, 4]

template <class T>
struct Rows {
  const T* start;
  long row_step, tap_step;
  long taps, depth;  // depth: channels per tap, a multiple of GROUP
};

// Where the product is written, and the epilogue that is applied to it
MIRRORED(struct, Output, {
  void* y = nullptr;
  int dtype = F32;
  long row_step = 0;
  const float* bias = nullptr;
  int post = NONE;                    // activation of the whole, the residual included
  const float* scale = nullptr;       // LayerScale
  const float* dequantize = nullptr;  // quantization step of each output's int8 weights
  const void* residual = nullptr;
  int residual_dtype = F32;
  long residual_row_step = 0;
});

#if defined(__AVX512BF16__)
INLINE vf multiply_pairs(vf sum, const bf16* row, const bf16* weight) {
  int32_t pair;
  memcpy(&pair, row, 4);
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(weight));
}
#else
INLINE vf multiply_pairs(vf, const bf16*, const bf16*) { abort(); }  // Pairs is never selected in this variant
#endif

#if defined(NEON)
// Adds to sum[r] the products of two channels of row r with weights b [2, P]. Their values are one load, since FMLA
// multiplies a vector by a lane of another: 14 loads to 48 FMLA in a tile of 12 rows, where one channel at a time would
// have 13 to 24. The weights of more channels do not fit in registers beside 24 sums.
template <int ROWS, class T>
INLINE void multiply_two_channels(const float* row, long step, const T* b, vf (&sum)[ROWS][2]) {
  vf weight[4];
  load_four(b, weight);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
    float32x2_t x = vld1_f32((const float*)((const char*)row + r * step * 4));
    // Else GCC loads each lane by itself or, if not volatile, all rows before the first product, and spills
    asm volatile("" : "+w"(x));
    sum[r][0] = (vf)vfmaq_lane_f32((float32x4_t)sum[r][0], (float32x4_t)weight[0], x, 0);
    sum[r][1] = (vf)vfmaq_lane_f32((float32x4_t)sum[r][1], (float32x4_t)weight[1], x, 0);
    sum[r][0] = (vf)vfmaq_lane_f32((float32x4_t)sum[r][0], (float32x4_t)weight[2], x, 1);
    sum[r][1] = (vf)vfmaq_lane_f32((float32x4_t)sum[r][1], (float32x4_t)weight[3], x, 1);
  }
}
#endif

// Channels that are summed before the partial sum is added to the total: shorter chains of fp32 additions have a
// smaller rounding error
constexpr long SUM_BLOCK = 256;

// sum[r] = row r times weights b [depth / GROUP, P, GROUP], for a register tile of ROWS rows by one panel
template <class Kind, int ROWS>
INLINE void multiply_block(const typename Kind::Row* row, long step, const typename Kind::Weight* b, long depth,
                           vf (&sum)[ROWS][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = (vf){};
  long c = 0;
#if defined(NEON)
  for (; c + 2 <= depth; c += 2, b += 2 * P) {
    prefetch(b, 2 * P);
    multiply_two_channels(row + c, step, b, sum);
  }
#endif
  for (; c < depth; c += Kind::GROUP, b += P * Kind::GROUP) {
    prefetch(b, P * Kind::GROUP);
    if constexpr (Kind::GROUP == 2) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        sum[r][0] = multiply_pairs(sum[r][0], row + r * step + c, b);
        sum[r][1] = multiply_pairs(sum[r][1], row + r * step + c, b + P);
      }
    } else {
      vf left = load(b), right = load(b + W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        vf x = broadcast(row[r * step + c]);
        sum[r][0] += x * left;
        sum[r][1] += x * right;
      }
    }
  }
}

// total[r] = row r times a panel of weights b, summed over all taps and channels
template <class Kind, int ROWS>
INLINE void multiply(const Rows<typename Kind::Row>& a, const typename Kind::Weight* b, vf (&total)[ROWS][2]) {
  if constexpr (Kind::QUANTIZED) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) total[r][0] = total[r][1] = (vf){};
    for (long tap = 0; tap < a.taps; tap++, b += a.depth * P)
      multiply_digits<ROWS>(a.start + tap * a.tap_step, a.row_step, b, a.depth, total);
  } else {
    bool begun = false;
    for (long tap = 0; tap < a.taps; tap++)
      for (long c = 0; c < a.depth; c += SUM_BLOCK) {
        long depth = min(SUM_BLOCK, a.depth - c);
        vf sum[ROWS][2];
        multiply_block<Kind, ROWS>(a.start + tap * a.tap_step + c, a.row_step, b, depth, sum);
        b += depth * P;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) total[r][half] = begun ? total[r][half] + sum[r][half] : sum[r][half];
        begun = true;
      }
  }
}

// Loads and stores of min(count, W) elements
template <class T>
INLINE vf load_up_to(const T* p, long count) {
  return count >= W ? load(p) : load_partial(p, count);
}
template <class T>
INLINE void store_up_to(T* p, vf x, long count) {
  if (count >= W)
    store(p, x);
  else
    store_partial(p, x, count);
}

// Applies the epilogue to x, outputs [n, n + W) of row m, and stores the first `count` of them
INLINE void apply_epilogue(vf x, const Output& out, long m, long n, long count) {
  if (out.dequantize) x *= load(out.dequantize + n);
  if (out.bias) x += load(out.bias + n);
  if (out.scale) x *= load(out.scale + n);
  if (out.residual) {
    long i = m * out.residual_row_step + n;
    x += out.residual_dtype == F32 ? load_up_to((const float*)out.residual + i, count)
                                   : load_up_to((const bf16*)out.residual + i, count);
  }
  x = activate(x, out.post);
  long i = m * out.row_step + n;
  if (out.dtype == F32)
    store_up_to((float*)out.y + i, x, count);
  else
    store_up_to((bf16*)out.y + i, x, count);
}

// A faster epilogue for full panels with an activation known at compile time and an optional residual of the output's
// type. It is for the convolutions, whose sums are so short that the epilogue takes a noticeable part of the time.
template <class T, int POST, bool RESIDUAL>
INLINE void apply_fast_epilogue(const vf (*sum)[2], long rows, const Output& out, long m, long n) {
  vf left = out.bias ? load(out.bias + n) : (vf){}, right = out.bias ? load(out.bias + n + W) : (vf){};
  T* y = (T*)out.y + m * out.row_step + n;
  const T* residual = (const T*)out.residual + m * out.residual_row_step + n;
  for (long r = 0; r < rows; r++, y += out.row_step, residual += out.residual_row_step) {
    vf a = sum[r][0] + left, b = sum[r][1] + right;
    if (RESIDUAL) a += load(residual), b += load(residual + W);
    store_pair(y, activate(a, POST), activate(b, POST));
  }
}

template <class T>
INLINE void choose_fast_epilogue(const vf (*sum)[2], long rows, const Output& out, long m, long n) {
  bool elu = out.post == ELU;
  if (out.residual)
    elu ? apply_fast_epilogue<T, ELU, true>(sum, rows, out, m, n)
        : apply_fast_epilogue<T, NONE, true>(sum, rows, out, m, n);
  else
    elu ? apply_fast_epilogue<T, ELU, false>(sum, rows, out, m, n)
        : apply_fast_epilogue<T, NONE, false>(sum, rows, out, m, n);
}

// Epilogue of a register tile: outputs [n, n + P), of `width` in all, of rows [m, m + rows). Not inlined, so that it is
// compiled once and not again in each of the many instances of the micro-kernel, which call it once per tile.
__attribute__((noinline)) void tile_epilogue(const vf (*sum)[2], long rows, const Output& out, long m, long n,
                                             long width) {
  bool plain = width - n >= P && !out.scale && !out.dequantize && (out.post == NONE || out.post == ELU);
  if (plain && (!out.residual || out.residual_dtype == out.dtype))
    return out.dtype == F32 ? choose_fast_epilogue<float>(sum, rows, out, m, n)
                            : choose_fast_epilogue<bf16>(sum, rows, out, m, n);
  for (long r = 0; r < rows; r++) {
    apply_epilogue(sum[r][0], out, m + r, n, width - n);
    if (width - n > W) apply_epilogue(sum[r][1], out, m + r, n + W, width - n - W);
  }
}

// Sums of the products of `depth` channels, a multiple of 2 W, in W or more parts
INLINE vf multiply_channels(const float* row, const float* weight, long depth) {
  vf sum[2] = {};
  for (long c = 0; c < depth; c += 2 * W) {
    sum[0] += load(row + c) * load(weight + c);
    sum[1] += load(row + c + W) * load(weight + c + W);
  }
  return sum[0] + sum[1];
}
#if defined(__AVX512BF16__)
INLINE vf multiply_channels(const bf16* row, const bf16* weight, long depth) {
  vf sum = {};
  for (long c = 0; c < depth; c += 2 * W)
    sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(row + c),
                               (__m512bh)_mm512_loadu_si512(weight + c));
  return sum;
}
#else
INLINE vf multiply_channels(const bf16*, const bf16*, long) { abort(); }  // Pairs is never selected in this variant
#endif

INLINE void copy_weight(float& to, float from) { to = from; }
INLINE void copy_weight(float& to, bf16 from) { to = to_float(from); }
INLINE void copy_weight(bf16& to, bf16 from) { to = from; }

// Product with a single output: vectorized along the channels, since a panel would consist almost entirely of padding.
// W rows are reduced together, and the epilogue treats their results as W outputs of one row.
template <class Kind>
__attribute__((noinline)) void multiply_single_output(Rows<typename Kind::Row> a, long count,
                                                      const typename Kind::Weight* packed, Output out) {
  typename Kind::Row weight[MAX_SINGLE_OUTPUT_DEPTH];
  for (long c = 0; c < a.depth; c++)
    copy_weight(weight[c], packed[c / Kind::GROUP * P * Kind::GROUP + c % Kind::GROUP]);
  float bias = out.bias ? *out.bias : 0.0f;
  out.bias = nullptr;
  for (long m = 0; m < count; m += W) {
    vf sum[W] = {};
    for (long r = 0; r < min(W, count - m); r++, a.start += a.row_step)
      sum[r] = multiply_channels(a.start, weight, a.depth);
    apply_epilogue(sum_lanes_of_each<W>(sum) + bias, out, 0, m, count - m);
  }
}

// Calls function with `value`, which is in [1, sizeof...(N)], as a compile-time constant
template <class Function, int... N>
INLINE void with_constant(long value, const Function& function, std::integer_sequence<int, N...>) {
  ((value == N + 1 ? function(std::integral_constant<int, N + 1>()) : void()), ...);
}

// Divides `count` rows into tiles of at most MAX_HEIGHT rows and nearly equal height, and calls tile(rows, first) for
// each, where `rows` is a compile-time constant
template <int MAX_HEIGHT, class Tile>
INLINE void for_each_tile(long count, const Tile& tile) {
  for (long m = 0, tiles = ceil_div(count, MAX_HEIGHT); m < count; tiles--) {
    long rows = ceil_div(count - m, tiles);
    with_constant(rows, [&](auto constant) { tile(constant, m); }, std::make_integer_sequence<int, MAX_HEIGHT>());
    m += rows;
  }
}

// The product and epilogue of one register tile: rows [m, m + ROWS) by the panel of outputs [n, n + P)
template <class Kind, int ROWS>
__attribute__((noinline)) void micro_kernel(const Rows<typename Kind::Row>& a, const typename Kind::Weight* b,
                                            const Output& out, long m, long n, long width) {
  vf sum[ROWS][2];
  multiply<Kind, ROWS>(a, b, sum);
  tile_epilogue(sum, ROWS, out, m, n, width);
}

// Product with a panel where a row has at most MAX_SHALLOW_DEPTH values, as in a convolution of mono audio: the weights
// stay in registers from row to row
template <int DEPTH>
__attribute__((noinline)) void multiply_shallow(const Rows<float>& a, long count, const float* b, const Output& out,
                                                long n, long width) {
  vf weight[DEPTH][2];
#pragma GCC unroll 8
  for (int c = 0; c < DEPTH; c++) weight[c][0] = load(b + c * P), weight[c][1] = load(b + c * P + W);
  const float* row = a.start;
  for (long m = 0; m < count; m += R) {
    long rows = min(R, count - m);
    vf sum[R][2];
    for (long r = 0; r < rows; r++, row += a.row_step) {
      vf left = {}, right = {};
#pragma GCC unroll 8
      for (int c = 0; c < DEPTH; c++) {
        vf x = broadcast(row[c]);
        left += x * weight[c][0];
        right += x * weight[c][1];
      }
      sum[r][0] = left, sum[r][1] = right;
    }
    tile_epilogue(sum, rows, out, m, n, width);
  }
}

// Multiplies rows [0, count) with panels [first, last) of weights with `width` outputs in all, and applies the epilogue
template <class Kind>
void multiply_rows(Rows<typename Kind::Row> a, long count, const void* weights, long first, long last, long width,
                   const Output& out) {
  if constexpr (sizeof(typename Kind::Weight) > 1) {
    bool contiguous = out.row_step == 1 && (!out.residual || out.residual_row_step == 1);
    if (width == 1 && contiguous && !out.scale && a.taps == 1 && a.depth % (2 * W) == 0 &&
        a.depth <= MAX_SINGLE_OUTPUT_DEPTH)
      return multiply_single_output<Kind>(a, count, (const typename Kind::Weight*)weights, out);
  }
  const typename Kind::Row* start = a.start;
  for (long panel = first; panel < last; panel++) {
    const auto* b = (const typename Kind::Weight*)weights + panel * a.taps * a.depth * P;
    if constexpr (std::is_same_v<Kind, Full>)
      if (a.taps == 1 && a.depth <= MAX_SHALLOW_DEPTH) {
        with_constant(
            a.depth, [&](auto depth) { multiply_shallow<depth.value>(a, count, b, out, panel * P, width); },
            std::make_integer_sequence<int, MAX_SHALLOW_DEPTH>());
        continue;
      }
    for_each_tile<Kind::ROWS>(count, [&](auto rows, long m) {
      a.start = start + m * a.row_step;
      micro_kernel<Kind, rows.value>(a, b, out, m, panel * P, width);
    });
  }
}

// The pitch (step between time steps) of scratch with this many channels: padded where rows, `stride` time steps apart,
// would all map to the same few cache sets
INLINE long pitch_of(long channels, long stride, size_t size) {
  return channels * stride * size % 2048 ? channels : channels + 64 / size;
}

// The rows of a convolution over scratch with this pitch. Taps that are adjacent in memory are treated as one long tap.
template <class T>
INLINE Rows<T> conv_rows(const T* start, long pitch, long stride, long dilation, long taps, long channels) {
  if (dilation == 1 && pitch == channels) return {start, stride * pitch, 0, 1, taps * channels};
  return {start, stride * pitch, dilation * pitch, taps, channels};
}

}  // namespace
