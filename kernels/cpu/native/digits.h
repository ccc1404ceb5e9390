// Rows as integers of three digits, for int8 weights where the processor multiplies and adds bytes four at a time: no
// weight is widened, and a weight costs three quarters of what it costs in fp32.
//
// A row of `depth` fp32 values becomes n = round(x / scale), |n| < 2^23, of digits -128 <= d < 128,
// n = 2^16 d2 + 2^8 d1 + d0: as near as 2.5e-7 of its largest value; a row with an infinity becomes NaN. In memory:
// [depth] d2, [depth] d1, [depth] d0, then a Trailer. Weights are stored as w + 128, since the instruction takes bytes
// without sign on one side; the sums of the digits take that back.
#pragma once
#include "simd.h"

namespace {

struct Trailer {
  float scale;
  int32_t sums[3];  // of d2, d1, d0
};
constexpr float MOST_DIGITS = 8355000.0f;  // below 127 * (2^16 + 2^8 + 1), with room for rounding
constexpr float LEAST = 1e-30f;            // rows that are nowhere larger count as zero

#if defined(__AVX512VNNI__)
void cut_into_digits(uint8_t* to, const float* x, long depth) {
  vf most = (vf){}, poison = (vf){};  // the poison is NaN if a value is not finite
  for (long c = 0; c < depth; c += W) {
    vf value = depth - c >= W ? load(x + c) : load_some(x + c, depth - c);
    vf size = value < 0.0f ? -value : value;
    most = size > most ? size : most;
    poison += value * 0.0f;
  }
  float largest = largest_lane(most), inverse = largest > LEAST ? MOST_DIGITS / largest : 0.0f;
  vi sums[3] = {};
  for (long c = 0; c < depth; c += W) {
    long count = min(W, depth - c);
    vf value = count == W ? load(x + c) : load_some(x + c, count);
    vi n = (vi)_mm512_cvtps_epi32((__m512)(value * inverse));
    for (int plane = 2; plane >= 0; plane--) {
      vi digit = (n << 24) >> 24;
      n = (n - digit) >> 8;
      sums[plane] += digit;
      __m128i bytes = _mm512_cvtepi32_epi8((__m512i)digit);
      memcpy(to + plane * depth + c, &bytes, count);
    }
  }
  Trailer* trailer = (Trailer*)(to + 3 * depth);
  trailer->scale = (largest > LEAST ? largest / MOST_DIGITS : 0.0f) + sum_lanes(poison);
  for (int plane = 0; plane < 3; plane++) trailer->sums[plane] = _mm512_reduce_add_epi32((__m512i)sums[plane]);
}

// sums + four products of bytes in each lane
INLINE vi multiply_bytes(vi sum, const uint8_t* weights, const uint8_t* digits) {
  int32_t four;
  memcpy(&four, digits, 4);
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
}
#else
INLINE void cut_into_digits(uint8_t*, const float*, long) { abort(); }  // the variant never chooses Digits
INLINE vi multiply_bytes(vi, const uint8_t*, const uint8_t*) { abort(); }
#endif

// sum[r] += row r, which begins at rows + r * step, times a panel's weights [depth / 4, 2 W, 4]
template <int ROWS>
INLINE void multiply_digits(const uint8_t* rows, long step, const uint8_t* b, long depth, vf (&total)[ROWS][2]) {
  vi sum[3][ROWS][2] = {};
  for (long c = 0; c < depth; c += 4, b += 8 * W)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (int plane = 0; plane < 3; plane++) {
        const uint8_t* digits = rows + r * step + plane * depth + c;
        sum[plane][r][0] = multiply_bytes(sum[plane][r][0], b, digits);
        sum[plane][r][1] = multiply_bytes(sum[plane][r][1], b + 4 * W, digits);
      }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    const Trailer* trailer = (const Trailer*)(rows + r * step + 3 * depth);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      vf parts[3];
#pragma GCC unroll 3
      for (int plane = 0; plane < 3; plane++)
        parts[plane] = __builtin_convertvector(sum[plane][r][half] - 128 * trailer->sums[plane], vf);
      total[r][half] += (parts[0] * 65536.0f + (parts[1] * 256.0f + parts[2])) * trailer->scale;
    }
  }
}

}  // namespace
