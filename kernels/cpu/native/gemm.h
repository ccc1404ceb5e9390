// Products of rows with packed weights: the one inner loop that every op of this library ends in.
//
//   y[m, n] = residual[m, n] + scale[n] * post( bias[n] + sum_{tap, c} rows[m, tap, c] * weight[n, tap, c] )
//
// Weights are packed in panels of P = 2 W outputs: [N / P, taps, C, P], zeros beyond N. `Rows` walks memory by steps,
// so that a convolution over time-major input is this product without any copy of overlapping windows: row m begins
// `stride` time steps after row m - 1. A tile is at most R rows by one panel; its sums stay in registers over all taps
// and channels; a panel is used for all rows before the next one is begun.
#pragma once
#include <climits>
#include <utility>

#include "digits.h"
#include "simd.h"

namespace {

constexpr int P = 2 * W;  // outputs in a panel
// Rows in a tile, at most: 2 R sums, two vectors of weights and one input fill the vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int R = 12;  // of 32 registers
#else
constexpr int R = 6;  // of 16
#endif
// Bytes from the weights being multiplied to those being prefetched. A panel is larger than a level-1 cache, and comes
// from level 3 or memory at its first use.
constexpr long AHEAD = 2048;
constexpr size_t CACHE_LINE = 64;
constexpr long MOST_DEPTH_OF_ONE = 1024;

template <class Row>
struct PlainOf {
  typedef Row Type;
};
template <>
struct PlainOf<uint8_t> {
  typedef float Type;
};

// How weights are stored, and what rows they multiply
template <class RowType, class WeightType, long CHANNELS, int MOST_ROWS>
struct KindOf {
  typedef RowType Row;
  typedef WeightType Weight;
  static constexpr long GROUP = CHANNELS;        // that one step of the inner loop takes
  static constexpr int ROWS = MOST_ROWS;         // in a tile: as many as the registers hold sums of
  static constexpr bool CUT = sizeof(Row) == 1;  // rows are written plain, and cut when they are whole
  typedef typename PlainOf<Row>::Type Plain;
  // elements of a row that has so many channels
  static constexpr long row_of(long channels) { return CUT ? 3 * channels + (long)sizeof(Trailer) : channels; }
};
struct Full : KindOf<float, float, 1, R> {};
struct Half : KindOf<float, bf16, 1, R> {};    // widened on the way
struct Int8 : KindOf<float, int8_t, 1, R> {};  // widened on the way, a step for each output
struct Pairs : KindOf<bf16, bf16, 2, R> {};    // bf16 times bf16, two channels at a time: [N / P, taps, C / 2, P, 2]
struct Digits : KindOf<uint8_t, uint8_t, 4, 4> {};  // int8 and rows of digits: [N / P, taps, C / 4, P, 4]

template <class T>
struct Rows {
  const T* start;
  long row, tap;     // steps between rows and between taps, in elements
  long taps, depth;  // depth: channels, a multiple of GROUP
};

struct Output {
  void* y = nullptr;
  int dtype = F32;
  long row = 0;  // step between rows of y
  const float* bias = nullptr;
  int post = NONE;
  const float* scale = nullptr;
  const float* dequantize = nullptr;  // of int8 weights
  const void* residual = nullptr;
  int residual_dtype = F32;
  long residual_row = 0;
  long rows = LONG_MAX;   // rows from this one on go, as plain sums, to
  float* tail = nullptr;  // which has the same row step
};

#if defined(__AVX512BF16__)
INLINE vf multiply_pairs(vf sum, const bf16* row, const bf16* weight) {
  int32_t pair;
  memcpy(&pair, row, 4);
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(weight));
}
#else
INLINE vf multiply_pairs(vf, const bf16*, const bf16*) { abort(); }  // the variant never chooses Pairs
#endif

// The `count` weights that come AHEAD of those at `read`; beyond the last weight this does nothing
template <class T>
INLINE void prefetch(const T* read, long count) {
  for (size_t byte = 0; byte < count * sizeof(T); byte += CACHE_LINE)
    __builtin_prefetch((const char*)read + AHEAD + byte);
}

constexpr long BLOCK = 256;  // steps summed before they join the total: fp32's error grows with the length of a sum

template <class Kind, int ROWS>
INLINE void multiply_block(const typename Kind::Row* row, long step, const typename Kind::Weight* b, long depth,
                           vf (&sum)[ROWS][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = (vf){};
  for (long c = 0; c < depth; c += Kind::GROUP, b += P * Kind::GROUP) {
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

template <class Kind, int ROWS>
INLINE void multiply(const Rows<typename Kind::Row>& a, const typename Kind::Weight* b, vf (&total)[ROWS][2]) {
  if constexpr (Kind::CUT) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) total[r][0] = total[r][1] = (vf){};
    for (long tap = 0; tap < a.taps; tap++, b += a.depth * P)
      multiply_digits<ROWS>(a.start + tap * a.tap, a.row, b, a.depth, total);
  } else {
    bool begun = false;
    for (long tap = 0; tap < a.taps; tap++)
      for (long c = 0; c < a.depth; c += BLOCK) {
        long depth = min(BLOCK, a.depth - c);
        vf sum[ROWS][2];
        multiply_block<Kind, ROWS>(a.start + tap * a.tap + c, a.row, b, depth, sum);
        b += depth * P;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) total[r][half] = begun ? total[r][half] + sum[r][half] : sum[r][half];
        begun = true;
      }
  }
}

template <class T>
INLINE vf load_up_to(const T* p, long count) {
  return count >= W ? load(p) : load_some(p, count);
}
template <class T>
INLINE void store_up_to(T* p, vf x, long count) {
  if (count >= W)
    store(p, x);
  else
    store_some(p, x, count);
}

// One vector of output n of row m, `count` of it inside
INLINE void finish(vf x, const Output& out, long m, long n, long count) {
  if (out.dequantize) x *= load(out.dequantize + n);
  if (m >= out.rows) return store_up_to(out.tail + (m - out.rows) * out.row + n, x, count);
  if (out.bias) x += load(out.bias + n);
  x = activate(x, out.post);
  if (out.scale) x *= load(out.scale + n);
  if (out.residual) {
    long i = m * out.residual_row + n;
    x += out.residual_dtype == F32 ? load_up_to((const float*)out.residual + i, count)
                                   : load_up_to((const bf16*)out.residual + i, count);
  }
  long i = m * out.row + n;
  if (out.dtype == F32)
    store_up_to((float*)out.y + i, x, count);
  else
    store_up_to((bf16*)out.y + i, x, count);
}

// Whole vectors of fp32 with a bias: the convolutions, whose sums are short enough for this to count
template <int POST, bool RESIDUAL>
INLINE void finish_plainly(const vf (*sum)[2], long rows, const Output& out, long m, long n) {
  vf left = load(out.bias + n), right = load(out.bias + n + W);
  float* y = (float*)out.y + m * out.row + n;
  const float* residual = (const float*)out.residual + m * out.residual_row + n;
  for (long r = 0; r < rows; r++, y += out.row, residual += out.residual_row) {
    vf a = activate(sum[r][0] + left, POST), b = activate(sum[r][1] + right, POST);
    store(y, RESIDUAL ? a + load(residual) : a);
    store(y + W, RESIDUAL ? b + load(residual + W) : b);
  }
}

// Outputs [n, n + P) of rows [m, m + rows), of `width` in all. Called once for each tile: kept out of the tiles, whose
// inner loops are many, so that it is compiled once.
__attribute__((noinline)) void finish_tile(const vf (*sum)[2], long rows, const Output& out, long m, long n,
                                           long width) {
  if (width - n >= P && out.bias && out.dtype == F32 && !out.scale && !out.dequantize && m + rows <= out.rows) {
    if (out.post == NONE && !out.residual) return finish_plainly<NONE, false>(sum, rows, out, m, n);
    if (out.post == ELU && !out.residual) return finish_plainly<ELU, false>(sum, rows, out, m, n);
    if (out.post == NONE && out.residual_dtype == F32) return finish_plainly<NONE, true>(sum, rows, out, m, n);
  }
  for (long r = 0; r < rows; r++) {
    finish(sum[r][0], out, m + r, n, width - n);
    if (width - n > W) finish(sum[r][1], out, m + r, n + W, width - n - W);
  }
}

// A single output: sums along the channels, where a panel would multiply zeros
__attribute__((noinline)) void multiply_by_one(Rows<float> a, long count, const float* packed, const Output& out) {
  long depth = a.depth;
  float weight[MOST_DEPTH_OF_ONE];
  for (long c = 0; c < depth; c++) weight[c] = packed[c * P];
  for (long m = 0; m < count; m++, a.start += a.row) {
    vf sum[2] = {};
    for (long c = 0; c < depth; c += 2 * W) {
      sum[0] += load(a.start + c) * load(weight + c);
      sum[1] += load(a.start + c + W) * load(weight + c + W);
    }
    finish(broadcast(sum_lanes(sum[0] + sum[1])), out, m, 0, 1);
  }
}

template <class Function, int... N>
INLINE void with_constant(long value, const Function& function, std::integer_sequence<int, N...>) {
  ((value == N + 1 ? function(std::integral_constant<int, N + 1>()) : void()), ...);
}

// Calls tile(rows, first) with the rows of each tile, 1 to MOST as a constant, for `count` rows in tiles of equal
// height
template <int MOST, class Tile>
INLINE void in_tiles(long count, const Tile& tile) {
  for (long m = 0, tiles = ceil_div(count, MOST); m < count; tiles--) {
    long rows = ceil_div(count - m, tiles);
    with_constant(rows, [&](auto constant) { tile(constant, m); }, std::make_integer_sequence<int, MOST>());
    m += rows;
  }
}

template <class Kind, int ROWS>
__attribute__((noinline)) void tile(const Rows<typename Kind::Row>& a, const typename Kind::Weight* b,
                                    const Output& out, long m, long n, long width) {
  vf sum[ROWS][2];
  multiply<Kind, ROWS>(a, b, sum);
  finish_tile(sum, ROWS, out, m, n, width);
}

// Rows [0, count) times panels [first, last), of `width` outputs in all
template <class Kind>
void multiply_rows(Rows<typename Kind::Row> a, long count, const void* weights, long first, long last, long width,
                   const Output& out) {
  if constexpr (__is_same(Kind, Full)) {
    if (width == 1 && a.taps == 1 && a.depth % (2 * W) == 0 && a.depth <= MOST_DEPTH_OF_ONE)
      return multiply_by_one(a, count, (const float*)weights, out);
  }
  const typename Kind::Row* start = a.start;
  for (long panel = first; panel < last; panel++) {
    const auto* b = (const typename Kind::Weight*)weights + panel * a.taps * a.depth * P;
    in_tiles<Kind::ROWS>(count, [&](auto rows, long m) {
      a.start = start + m * a.row;
      tile<Kind, rows.value>(a, b, out, m, panel * P, width);
    });
  }
}

// A step between time steps of `channels`, such that rows `stride` steps apart do not all fall into the same cache sets
INLINE long pitch_of(long channels, long stride, size_t size) {
  return channels * stride * size % 2048 ? channels : channels + 64 / size;
}

// The rows of a convolution over scratch of that pitch: taps next to each other are one long tap
template <class T>
INLINE Rows<T> rows_of(const T* start, long pitch, long stride, long dilation, long taps, long channels) {
  if (dilation == 1 && pitch == channels) return {start, stride * pitch, 0, 1, taps * channels};
  return {start, stride * pitch, dilation * pitch, taps, channels};
}

}  // namespace
