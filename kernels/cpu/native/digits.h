// int8 weights times activations that are quantized to 24 bits, for processors with int8 dot products (AVX-512 VNNI:
// each 32-bit lane accumulates four products of bytes). Weights are not widened to fp32, and four of them take
// three multiply instructions, one per digit of the activations, where fp32 takes four.
//
// Each activation row of `depth` fp32 values is quantized with one scale of its own: n = round(x / scale), |n| < 2^23.
// The integer is stored as three signed base-256 digits, n = 2^16 d2 + 2^8 d1 + d0 with -128 <= d < 128. The error is
// at most 2.5e-7 of the row's largest magnitude. A row that contains a NaN or an infinity becomes NaN.
//
// A quantized row in memory: [depth] d2, [depth] d1, [depth] d0, then a Trailer. The instruction multiplies unsigned by
// signed bytes, so weights are stored as w + 128, and 128 times the sum of the digits is subtracted from each product.
#pragma once
#include "simd.h"

namespace {

struct Trailer {
  float scale;
  int32_t sums[3];  // sums of the row's digits d2, d1, d0
};
constexpr float MAX_QUANTIZED = 8355000.0f;  // below 127 * (2^16 + 2^8 + 1), with a margin for rounding
constexpr float MIN_MAGNITUDE = 1e-30f;      // a row whose values are all smaller is treated as zeros

#if defined(__AVX512VNNI__)
void quantize_to_digits(uint8_t* to, const float* x, long depth) {
  vf max_abs = (vf){}, not_finite = (vf){};  // NaN if any value is NaN or infinite, else 0
  for (long c = 0; c < depth; c += W) {
    vf value = depth - c >= W ? load(x + c) : load_partial(x + c, depth - c);
    vf magnitude = value < 0.0f ? -value : value;
    max_abs = magnitude > max_abs ? magnitude : max_abs;
    not_finite += value * 0.0f;
  }
  float largest = max_lane(max_abs), inverse = largest > MIN_MAGNITUDE ? MAX_QUANTIZED / largest : 0.0f;
  vi sums[3] = {};
  for (long c = 0; c < depth; c += W) {
    long count = min(W, depth - c);
    vf value = count == W ? load(x + c) : load_partial(x + c, count);
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
  trailer->scale = (largest > MIN_MAGNITUDE ? largest / MAX_QUANTIZED : 0.0f) + sum_lanes(not_finite);
  for (int plane = 0; plane < 3; plane++) trailer->sums[plane] = _mm512_reduce_add_epi32((__m512i)sums[plane]);
}

// Adds to each 32-bit lane of `sum` the dot product of its four weights with the same four digits of the row
INLINE vi multiply_bytes(vi sum, const uint8_t* weights, const uint8_t* digits) {
  int32_t four;
  memcpy(&four, digits, 4);
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
}
#else
INLINE void quantize_to_digits(uint8_t*, const float*, long) { abort(); }  // Digits is never selected in this variant
INLINE vi multiply_bytes(vi, const uint8_t*, const uint8_t*) { abort(); }
#endif

// total[r] += quantized row r, which starts at rows + r * step, times a panel of weights b [depth / 4, 2 W, 4]
template <int ROWS>
INLINE void multiply_digits(const uint8_t* rows, long step, const uint8_t* b, long depth, vf (&total)[ROWS][2]) {
  vi sum[3][ROWS][2] = {};
  for (long c = 0; c < depth; c += 4, b += 8 * W) {
    prefetch(b, 8 * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (int plane = 0; plane < 3; plane++) {
        const uint8_t* digits = rows + r * step + plane * depth + c;
        sum[plane][r][0] = multiply_bytes(sum[plane][r][0], b, digits);
        sum[plane][r][1] = multiply_bytes(sum[plane][r][1], b + 4 * W, digits);
      }
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
