// SIMD vectors of the variant's width: loads and stores, type conversions and elementwise functions. Written with GCC's
// vector extensions, so that one source serves every variant and the compiler selects the instructions.
//
// Everything in native/ except the entry points of variant.cpp has internal linkage (anonymous namespaces). All
// variants are linked into one library: of an inline function with external linkage the linker would keep one copy,
// compiled for only one of the instruction sets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(NEON)  // of the variants for AArch64, the one with intrinsics; `portable` can do without
#include <arm_neon.h>
#endif

#include "abi.h"

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_REGISTERS = 16;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef float unaligned_vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t unaligned_vh __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int8_t unaligned_vb __attribute__((vector_size(W), aligned(1), may_alias));

#define INLINE inline __attribute__((always_inline))

MIRRORED(enum, Dtype, {F32, BF16});
MIRRORED(enum, Activation, {NONE, ELU, SILU, GELU, GELU_TANH, RELU, TANH});

struct bf16 {
  uint16_t bits;
};

constexpr INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
INLINE long round_up(long a, long b) { return ceil_div(a, b) * b; }

// ---- loads, stores and type conversions

INLINE vf broadcast(float x) { return x - (vf){}; }
INLINE vf load(const float* p) { return *(const unaligned_vf*)p; }
INLINE void store(float* p, vf x) { *(unaligned_vf*)p = x; }

// Distance in bytes from the weights being multiplied to those being prefetched. A panel does not fit in the level-1
// cache, and at its first use it comes from the level-3 cache or from memory.
constexpr long PREFETCH_DISTANCE = 4096;
constexpr size_t CACHE_LINE = 64;

// Prefetches `count` weights at PREFETCH_DISTANCE bytes after `read`; harmless beyond the last weight, where a prefetch
// cannot fault
template <class T>
INLINE void prefetch(const T* read, long count) {
  for (size_t byte = 0; byte < count * sizeof(T); byte += CACHE_LINE)
    __builtin_prefetch((const char*)read + PREFETCH_DISTANCE + byte);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// GCC does not generate the widening and narrowing instructions from __builtin_convertvector: on x86 those of bytes, on
// AArch64 any.
#if defined(NEON)
INLINE vf load(const bf16* p) { return (vf)vshll_n_u16((uint16x4_t) * (const unaligned_vh*)p, 16); }
#else
INLINE vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const unaligned_vh*)p, vu) << 16); }
#endif
#if defined(__AVX512F__)
INLINE vf load(const int8_t* p) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
#elif defined(__AVX2__)
INLINE vf load(const int8_t* p) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#elif defined(NEON)
INLINE vf load(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8((int8x8_t)vdup_n_s32(four)))));
}
#else
INLINE vf load(const int8_t* p) { return __builtin_convertvector(*(const unaligned_vb*)p, vf); }
#endif

// Rounds to nearest even; a NaN stays a NaN
#if defined(__AVX512BF16__)  // subnormal numbers become 0, as in the processor's products of bf16
INLINE void store(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
INLINE void store(bf16* p, vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  vi not_nan = x == x;
  vu kept = not_nan ? rounded : (vu){} + 0x7FC0;
#if defined(NEON)
  *(unaligned_vh*)p = (vh)vmovn_u32((uint32x4_t)kept);
#else
  *(unaligned_vh*)p = __builtin_convertvector(kept, vh);
#endif
}
#endif

// Stores x and then y
INLINE void store_pair(float* p, vf x, vf y) { store(p, x), store(p + W, y); }
#if defined(__AVX512BF16__)
INLINE void store_pair(bf16* p, vf x, vf y) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
}
#else
INLINE void store_pair(bf16* p, vf x, vf y) { store(p, x), store(p + W, y); }
#endif

#if defined(NEON)
// Loads 4 W elements
template <class T>
INLINE void load_four(const T* p, vf (&x)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) x[i] = load(p + i * W);
}
INLINE void load_four(const int8_t* p, vf (&x)[4]) {
  int8x16_t bytes = vld1q_s8(p);
  int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  x[0] = (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
  x[1] = (vf)vcvtq_f32_s32(vmovl_high_s16(low));
  x[2] = (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
  x[3] = (vf)vcvtq_f32_s32(vmovl_high_s16(high));
}
#endif

// Loads and stores of `count` < W elements; the other lanes of a load are 0
template <class T>
INLINE vf load_partial(const T* p, long count) {
  T buffer[W] = {};
  memcpy((void*)buffer, p, count * sizeof(T));
  return load(buffer);
}
template <class T>
INLINE void store_partial(T* p, vf x, long count) {
  T buffer[W];
  store(buffer, x);
  memcpy((void*)p, buffer, count * sizeof(T));
}

INLINE float max_lane(vf x) {
  float buffer[W], y;
  store(buffer, x);
  y = buffer[0];
  for (int i = 1; i < W; i++) y = buffer[i] > y ? buffer[i] : y;
  return y;
}

#if defined(__AVX512F__)
INLINE bool any_lane(vi x) { return _mm512_movepi32_mask((__m512i)x); }
#elif defined(__AVX2__)
INLINE bool any_lane(vi x) { return _mm256_movemask_ps((__m256)x); }
#elif defined(NEON)
INLINE bool any_lane(vi x) { return vmaxvq_u32((uint32x4_t)x); }
#else
INLINE bool any_lane(vi x) {
  int any = 0;
  for (int i = 0; i < W; i++) any |= x[i];
  return any;
}
#endif

#if defined(__AVX512F__)
INLINE float sum_lanes(vf x) { return _mm512_reduce_add_ps((__m512)x); }
#elif defined(NEON)
INLINE float sum_lanes(vf x) { return vaddvq_f32((float32x4_t)x); }
#else
INLINE float sum_lanes(vf x) {
  float buffer[W];
  store(buffer, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) buffer[i] += buffer[i + half];
  return buffer[0];
}
#endif

// Reduces N vectors to one: lane k of the result is the sum of the lanes of x[k]. Each recursion step adds the halves
// of two vectors and interleaves them into one, or on NEON adds neighbouring lanes. Overwrites x.
template <int N>
INLINE vf sum_lanes_of_each(vf* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
#if defined(NEON)
#pragma GCC unroll 8
    for (int k = 0; k < N / 2; k++) x[k] = (vf)vpaddq_f32((float32x4_t)x[2 * k], (float32x4_t)x[2 * k + 1]);
#else
    vi low, high;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) low[i] = i / 2 + i % 2 * W, high[i] = low[i] + W / 2;
#pragma GCC unroll 8
    for (int k = 0; k < N / 2; k++)
      x[k] = __builtin_shuffle(x[k], x[k + N / 2], low) + __builtin_shuffle(x[k], x[k + N / 2], high);
#endif
    return sum_lanes_of_each<N / 2>(x);
  }
}

// max(bound, x) and min(bound, x), which propagate a NaN in x: the operands are ordered so that x is the result where
// the comparison is unordered
#if defined(__AVX512F__)
INLINE vf clamp_min(float bound, vf x) { return (vf)_mm512_max_ps((__m512)broadcast(bound), (__m512)x); }
INLINE vf clamp_max(float bound, vf x) { return (vf)_mm512_min_ps((__m512)broadcast(bound), (__m512)x); }
#elif defined(NEON)  // whose instructions propagate any NaN
INLINE vf clamp_min(float bound, vf x) { return (vf)vmaxq_f32(vdupq_n_f32(bound), (float32x4_t)x); }
INLINE vf clamp_max(float bound, vf x) { return (vf)vminq_f32(vdupq_n_f32(bound), (float32x4_t)x); }
#else
INLINE vf clamp_min(float bound, vf x) { return x < bound ? broadcast(bound) : x; }
INLINE vf clamp_max(float bound, vf x) { return x > bound ? broadcast(bound) : x; }
#endif

// ---- elementwise functions; all propagate NaN

template <int N>
INLINE vf polynomial(const float (&c)[N], vf x) {
  vf y = broadcast(c[N - 1]);
#pragma GCC unroll 8
  for (int i = N - 2; i >= 0; i--) y = y * x + c[i];
  return y;
}

// Coefficients of (e^r - 1) / r for |r| <= ln 2 / 2: a minimax polynomial with an error of 2e-8
constexpr float EXPM1[] = {1.000000011e+00f, 5.000000081e-01f, 1.666650518e-01f,
                           4.166624059e-02f, 8.369156142e-03f, 1.394858857e-03f};

// Range reduction x = n ln 2 + r; returns e^r - 1 and sets power = 2^n, so that e^x = (e^r - 1) * power + power.
// Adding 1.5 * 2^23 to x / ln 2 rounds it to an integer n, which is then in the low bits of the float. With the
// exponent bias 127 added as well, shifting those bits left by 23 gives the float 2^n.
INLINE vf expm1_parts(vf x, vf& power) {
  const float magic = 12582912.0f + 127.0f;
  vf shifted = x * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = x - n * 0.693145751953125f - n * 1.42860682030941723212e-6f;
  power = (vf)((vi)shifted << 23);
  return polynomial(EXPM1, r) * r;
}

INLINE vf exp(vf x) {
  vf power, p = expm1_parts(clamp_max(88.0f, clamp_min(-87.0f, x)), power);
  return p * power + power;
}

INLINE vf expm1_of_negative(vf x) {
  vf power, p = expm1_parts(clamp_min(-30.0f, x), power);
  return p * power + (power - 1.0f);
}

INLINE vf elu(vf x) {
  vf y = expm1_of_negative(clamp_max(0.0f, x));
  return x > 0.0f ? x : y;
}

INLINE vf tanh(vf x) {
  vf magnitude = x < 0.0f ? -x : x;
  vf e = expm1_of_negative(-2.0f * magnitude);
  vf y = -e / (e + 2.0f);
  return x < 0.0f ? -y : y;
}

// erf(x) = x P(x^2) for |x| < 1, and sign(x) (1 - exp(Q(|x|))) elsewhere. P and Q are minimax polynomials; the largest
// error is 1.4e-7.
constexpr float ERF_P[] = {1.128379166e+00f, -3.761262714e-01f, 1.128360018e-01f, -2.685444459e-02f,
                           5.189535343e-03f, -8.020841305e-04f, 7.889119606e-05f};
constexpr float ERF_Q[] = {1.834514681e-04f, -1.129556868e+00f, -6.332625312e-01f, -1.083725738e-01f,
                           2.517903359e-02f, -4.193637789e-03f, 4.391122643e-04f,  -2.149665814e-05f};

INLINE vf erf(vf x) {
  vf magnitude = x < 0.0f ? -x : x, square = x * x;
  vf inner = x * polynomial(ERF_P, square);
  vf outer = 1.0f - exp(polynomial(ERF_Q, clamp_max(4.0f, magnitude)));
  return square < 1.0f ? inner : x < 0.0f ? -outer : outer;
}

INLINE vf activate(vf x, int activation) {
  switch (activation) {
    case ELU:
      return elu(x);
    case SILU:
      return x / (1.0f + exp(-x));
    case GELU:
      return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f));
    case GELU_TANH:
      return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case RELU:
      return x < 0.0f ? (vf){} : x;
    case TANH:
      return tanh(x);
  }
  return x;
}

// ---- scratch memory

// A scratch buffer that grows and is kept from call to call, one per thread and purpose (thread_local): memory
// allocated anew for each call would cost a page fault for every 4 KB. An arena holds a single buffer: take() returns
// the same memory each time, uninitialized, and invalidates what it returned before.
struct Arena {
  char* memory = nullptr;
  size_t size = 0;
  ~Arena() { free(memory); }
  template <class T>
  T* take(size_t count) {
    size_t bytes = round_up(count * sizeof(T) + 64, 4096);
    if (bytes > size) {
      free(memory);
      memory = (char*)aligned_alloc(4096, bytes);
      if (!memory) abort();
      size = bytes;
    }
    return (T*)memory;
  }
};

}  // namespace
