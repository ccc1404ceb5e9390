// Vectors of floats of the variant's width, conversions, and the elementwise functions. GCC's vector extensions: the
// same source serves every variant, and the compiler picks the instructions.
//
// All of native/ has internal linkage but the entry points of variant.cpp: the variants are linked into one library,
// and a function shared between them would be compiled for one of them only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef float loose_vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t loose_vh __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int8_t loose_vb __attribute__((vector_size(W), aligned(1), may_alias));

#define INLINE inline __attribute__((always_inline))

enum Dtype { F32 = 0, BF16 = 1 };
enum Activation { NONE = 0, ELU, SILU, GELU, GELU_TANH, RELU, TANH };

struct bf16 {
  uint16_t bits;
};

constexpr INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
INLINE long round_up(long a, long b) { return ceil_div(a, b) * b; }

// ---- loads, stores, conversions

INLINE vf broadcast(float x) { return x - (vf){}; }
INLINE vf load(const float* p) { return *(const loose_vf*)p; }
INLINE void store(float* p, vf x) { *(loose_vf*)p = x; }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

INLINE vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const loose_vh*)p, vu) << 16); }
#if defined(__AVX512F__)  // which GCC does not find on its own
INLINE vf load(const int8_t* p) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
#elif defined(__AVX2__)
INLINE vf load(const int8_t* p) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#else
INLINE vf load(const int8_t* p) { return __builtin_convertvector(*(const loose_vb*)p, vf); }
#endif

INLINE void store(bf16* p, vf x) {  // round to nearest even; a NaN stays one
  vu bits = (vu)x;
  vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  vi is_number = x == x;
  *(loose_vh*)p = __builtin_convertvector(is_number ? rounded : (vu){} + 0x7FC0, vh);
}

// `count` < W elements
template <class T>
INLINE vf load_some(const T* p, long count) {
  T buffer[W] = {};
  memcpy((void*)buffer, p, count * sizeof(T));
  return load(buffer);
}
template <class T>
INLINE void store_some(T* p, vf x, long count) {
  T buffer[W];
  store(buffer, x);
  memcpy((void*)p, buffer, count * sizeof(T));
}

INLINE float largest_lane(vf x) {
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
#else
INLINE bool any_lane(vi x) {
  int any = 0;
  for (int i = 0; i < W; i++) any |= x[i];
  return any;
}
#endif

#if defined(__AVX512F__)
INLINE float sum_lanes(vf x) { return _mm512_reduce_add_ps((__m512)x); }
#else
INLINE float sum_lanes(vf x) {
  float buffer[W];
  store(buffer, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) buffer[i] += buffer[i + half];
  return buffer[0];
}
#endif

// Lane k: the sum of x[k]. Each step folds pairs of vectors, one half of the lanes onto the other.
template <int N>
INLINE vf sums_of_lanes(vf* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    vi low, high;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) low[i] = i / 2 + i % 2 * W, high[i] = low[i] + W / 2;
#pragma GCC unroll 8
    for (int k = 0; k < N / 2; k++)
      x[k] = __builtin_shuffle(x[k], x[k + N / 2], low) + __builtin_shuffle(x[k], x[k + N / 2], high);
    return sums_of_lanes<N / 2>(x);
  }
}

// The larger, the smaller of a constant and x: x where it is NaN, which a comparison alone would drop
#if defined(__AVX512F__)
INLINE vf at_least(float bound, vf x) { return (vf)_mm512_max_ps((__m512)broadcast(bound), (__m512)x); }
INLINE vf at_most(float bound, vf x) { return (vf)_mm512_min_ps((__m512)broadcast(bound), (__m512)x); }
#else
INLINE vf at_least(float bound, vf x) { return x < bound ? broadcast(bound) : x; }
INLINE vf at_most(float bound, vf x) { return x > bound ? broadcast(bound) : x; }
#endif

// ---- elementwise functions. Each lets a NaN through.

template <int N>
INLINE vf polynomial(const float (&c)[N], vf x) {
  vf y = broadcast(c[N - 1]);
#pragma GCC unroll 8
  for (int i = N - 2; i >= 0; i--) y = y * x + c[i];
  return y;
}

// (e^r - 1) / r for |r| <= ln 2 / 2: a minimax fit, 2e-8
constexpr float EXPM1[] = {1.000000011e+00f, 5.000000081e-01f, 1.666650518e-01f,
                           4.166624059e-02f, 8.369156142e-03f, 1.394858857e-03f};

// x = n ln 2 + r: e^r - 1, and 2^n. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 is the
// bias of the exponent, to which a shift moves them.
INLINE vf expm1_parts(vf x, vf& power) {
  const float magic = 12582912.0f + 127.0f;
  vf shifted = x * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = x - n * 0.693145751953125f - n * 1.42860682030941723212e-6f;
  power = (vf)((vi)shifted << 23);
  return polynomial(EXPM1, r) * r;
}

INLINE vf exp(vf x) {
  vf power, p = expm1_parts(at_most(88.0f, at_least(-87.0f, x)), power);
  return p * power + power;
}

INLINE vf expm1_of_negative(vf x) {
  vf power, p = expm1_parts(at_least(-30.0f, x), power);
  return p * power + (power - 1.0f);
}

INLINE vf elu(vf x) {
  vf y = expm1_of_negative(at_most(0.0f, x));
  return x > 0.0f ? x : y;
}

INLINE vf tanh(vf x) {
  vf size = x < 0.0f ? -x : x;
  vf e = expm1_of_negative(-2.0f * size);
  vf y = -e / (e + 2.0f);
  return x < 0.0f ? -y : y;
}

// |x| < 1: x P(x^2); beyond, 1 - exp(Q(|x|)). Both are minimax fits; 1.4e-7 is the largest error.
constexpr float ERF_P[] = {1.128379166e+00f, -3.761262714e-01f, 1.128360018e-01f, -2.685444459e-02f,
                           5.189535343e-03f, -8.020841305e-04f, 7.889119606e-05f};
constexpr float ERF_Q[] = {1.834514681e-04f, -1.129556868e+00f, -6.332625312e-01f, -1.083725738e-01f,
                           2.517903359e-02f, -4.193637789e-03f, 4.391122643e-04f,  -2.149665814e-05f};

INLINE vf erf(vf x) {
  vf size = x < 0.0f ? -x : x, square = x * x;
  vf inner = x * polynomial(ERF_P, square);
  vf outer = 1.0f - exp(polynomial(ERF_Q, at_most(4.0f, size)));
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

// ---- memory that a thread keeps from call to call: mapping it anew each time costs a page fault for every 4 KB

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
