// window_attention: RoPE on q and k, then attention over the last `window` positions, with ring caches when streaming.
//
// A thread takes one key/value head of one row at a time, and lets blocks of queries run over the keys and values in
// order of position: the two stretches of the ring, where they lie, then the new ones, rotated.
#pragma once
#include "gemm.h"

namespace {

constexpr int QUERIES = 4;  // in a block

struct Attention {
  const void *q, *k, *v;  // [B, T, H, D] by steps, D contiguous
  void* y;                // [B, T, H, D] contiguous
  int dtype;
  long batch, heads, kv_heads, length, dim;
  long q_batch, q_head, q_step, k_batch, k_head, k_step, v_batch, v_head, v_step;
  const float* inv_freq;  // [D / 2]
  float rope_scale;
  bool interleaved;
  long window;
  const int64_t* offset;    // [B], or null offline
  void *cache_k, *cache_v;  // [B, H_kv, window, D]
  const bool* active;       // [B]
};

thread_local Arena attention_scratch;

template <class T>
void rotate(float* to, const T* x, const float* cosines, long dim, bool interleaved) {
  const float* sines = cosines + dim / 2;
  for (long i = 0; i < dim / 2; i++) {
    long left = interleaved ? 2 * i : i, right = interleaved ? 2 * i + 1 : i + dim / 2;
    float a = to_float(x[left]), b = to_float(x[right]);
    to[left] = a * cosines[i] - b * sines[i];
    to[right] = b * cosines[i] + a * sines[i];
  }
}

template <class To, class From>
void convert(To* to, const From* x, long count) {
  long i = 0;
  for (; i + W <= count; i += W) store(to + i, load(x + i));
  if (i < count) store_some(to + i, load_some(x + i, count - i), count - i);
}

// Positions [from, to) of keys and values that lie one behind another, `wide` apart
template <class T>
struct Span {
  const T *keys, *values;
  long from, to;
};

// Scores of COUNT queries [COUNT, wide] with W keys or, if not FULL, `count` of them
template <int COUNT, bool FULL, class T>
INLINE void score_block(float* scores, long row, const float* q, const T* keys, long wide, long count) {
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++) {
    vf sum[W] = {};
    for (long d = 0; d < wide; d += W) {
      vf x = load(q + i * wide + d);
      if (FULL)
#pragma GCC unroll 16
        for (int k = 0; k < W; k++) sum[k] += load(keys + k * wide + d) * x;
      else
        for (int k = 0; k < count; k++) sum[k] += load(keys + k * wide + d) * x;
    }
    store_up_to(scores + i * row, sums_of_lanes<W>(sum), count);
  }
}

template <int COUNT, class T>
void scores_of(float* scores, long row, const float* q, const Span<T>& span, long wide, long first, long last) {
  long j = max(first, span.from), end = min(last, span.to);
  const T* keys = span.keys - span.from * wide;
  for (; j + W <= end; j += W) score_block<COUNT, true>(scores + j, row, q, keys + j * wide, wide, W);
  if (j < end) score_block<COUNT, false>(scores + j, row, q, keys + j * wide, wide, end - j);
}

// y [COUNT, wide] = weights times values, V vectors of each row at a time, summed in order of position
template <int COUNT, int V, class T>
INLINE void weigh_columns(float* y, const float* weights, long row, const Span<T>* spans, int count, long wide,
                          long first, long last) {
  vf sum[COUNT][V] = {};
  for (const Span<T>* span = spans; span < spans + count; span++)
    for (long j = max(first, span->from); j < min(last, span->to); j++) {
      const T* value = span->values + (j - span->from) * wide;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        vf x = load(value + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) sum[i][v] += x * weights[i * row + j];
      }
    }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(y + i * wide + v * W, sum[i][v]);
}

template <class T>
Span<T> from_column(Span<T> span, long d) {
  return {span.keys, span.values + d, span.from, span.to};
}

template <int COUNT, class T>
void weigh_values(float* y, const float* weights, long row, const Span<T> (&spans)[3], int count, long wide, long first,
                  long last) {
  constexpr int V = W == 16 ? 4 : 2;  // COUNT * V sums in registers
  for (long d = 0; d < wide;) {
    Span<T> columns[3] = {from_column(spans[0], d), from_column(spans[1], d), from_column(spans[2], d)};
    if (d + V * W <= wide) {
      weigh_columns<COUNT, V>(y + d, weights, row, columns, count, wide, first, last);
      d += V * W;
    } else {
      weigh_columns<COUNT, 1>(y + d, weights, row, columns, count, wide, first, last);
      d += W;
    }
  }
}

// exp(score - largest) in [first, last), 0 elsewhere in [begin, end); their sum
INLINE float softmax(float* scores, long begin, long first, long last, long end) {
  vf most = broadcast(-INFINITY);
  long j = first;
  for (; j + W <= last; j += W) {
    vf x = load(scores + j);
    most = x > most ? x : most;
  }
  float largest = largest_lane(most);
  for (; j < last; j++) largest = scores[j] > largest ? scores[j] : largest;
  vf total = (vf){};
  for (j = first; j < last; j += W) {
    long count = min(W, last - j);
    vf x = exp(load_up_to(scores + j, count) - largest);
    store_up_to(scores + j, x, count);
    if (count < W) x = load_some(scores + j, count);
    total += x;
  }
  for (j = begin; j < first; j++) scores[j] = 0.0f;
  for (j = last; j < end; j++) scores[j] = 0.0f;
  return sum_lanes(total);
}

// COUNT queries [COUNT, wide] in a row, the first at position `at` -> y, softmax(q k) v
template <int COUNT, class T>
void attend_queries(float* y, const float* q, float* scores, long row, const Span<T> (&spans)[3], int count, long wide,
                    long at, long window) {
  long begin = max(0, at - window + 1), end = at + COUNT;
  for (int s = 0; s < count; s++) scores_of<COUNT>(scores, row, q, spans[s], wide, begin, end);
  float inverse[COUNT];
  for (int i = 0; i < COUNT; i++)
    inverse[i] = 1.0f / softmax(scores + i * row, begin, max(0, at + i + 1 - window), at + i + 1, end);
  weigh_values<COUNT>(y, scores, row, spans, count, wide, begin, end);
  for (int i = 0; i < COUNT; i++)
    for (long d = 0; d < wide; d++) y[i * wide + d] *= inverse[i];
}

// One key/value head of one row, all queries that share it. Key: how keys and values are kept, T where the ring is read
// as it lies, else fp32.
template <class T, class Key>
void attend(const Attention& a, long b, long kv_head, const float* angles) {
  long dim = a.dim, wide = round_up(dim, W), group = a.heads / a.kv_heads;
  long offset = a.offset ? a.offset[b] : 0;
  long past = a.offset ? min(offset, a.window - 1) : 0;
  bool in_place = wide == dim && sizeof(T) == sizeof(Key);
  long copied = in_place ? 0 : past, rows = copied + a.length, row = round_up(past + a.length, W);
  float* q = attention_scratch.take<float>(2 * rows * wide + QUERIES * (2 * wide + row));
  float *y = q + QUERIES * wide, *scores = y + QUERIES * wide;
  Key *keys = (Key*)(scores + QUERIES * row), *values = keys + rows * wide;
  if (wide != dim) {
    memset(q, 0, QUERIES * wide * sizeof(float));
    memset((void*)keys, 0, 2 * rows * wide * sizeof(Key));
  }

  Span<Key> spans[3] = {};
  int count = 0;
  T *ring_k = nullptr, *ring_v = nullptr;
  if (a.offset) {
    long base = (b * a.kv_heads + kv_head) * a.window * dim;
    ring_k = (T*)a.cache_k + base, ring_v = (T*)a.cache_v + base;
    long oldest = (offset - past) % a.window, head = min(past, a.window - oldest);
    if (in_place) {
      spans[count++] = {(Key*)ring_k + oldest * dim, (Key*)ring_v + oldest * dim, 0, head};
      spans[count++] = {(Key*)ring_k, (Key*)ring_v, head, past};
    }
    for (long j = 0; j < copied; j++) {
      long slot = (oldest + j) % a.window;
      convert(keys + j * wide, ring_k + slot * dim, dim);
      convert(values + j * wide, ring_v + slot * dim, dim);
    }
  }
  spans[count++] = {keys, values, past - copied, past + a.length};
  Key *new_keys = keys + copied * wide, *new_values = values + copied * wide;
  const T* k = (const T*)a.k + b * a.k_batch + kv_head * a.k_head;
  const T* v = (const T*)a.v + b * a.v_batch + kv_head * a.v_head;
  angles += a.offset ? b * a.length * dim : 0;
  for (long t = 0; t < a.length; t++) {
    T* rounded = (T*)y;  // what the ring would give back
    rotate(q, k + t * a.k_step, angles + t * dim, dim, a.interleaved);
    convert(rounded, q, dim);
    convert(new_keys + t * wide, rounded, dim);
    convert(new_values + t * wide, v + t * a.v_step, dim);
  }
  float scale = 1.0f / sqrtf((float)dim);
  for (long h = kv_head * group; h < (kv_head + 1) * group; h++)
    for (long t = 0; t < a.length;) {
      int queries = (int)min(QUERIES, a.length - t);
      const T* x = (const T*)a.q + b * a.q_batch + h * a.q_head + t * a.q_step;
      for (int i = 0; i < queries; i++)
        rotate(q + i * wide, x + i * a.q_step, angles + (t + i) * dim, dim, a.interleaved);
      for (long d = 0; d < queries * wide; d++) q[d] *= scale;
      switch (queries) {
        case 1:
          attend_queries<1>(y, q, scores, row, spans, count, wide, past + t, a.window);
          break;
        case 2:
          attend_queries<2>(y, q, scores, row, spans, count, wide, past + t, a.window);
          break;
        case 3:
          attend_queries<3>(y, q, scores, row, spans, count, wide, past + t, a.window);
          break;
        default:
          attend_queries<QUERIES>(y, q, scores, row, spans, count, wide, past + t, a.window);
      }
      for (int i = 0; i < queries; i++, t++)
        convert((T*)a.y + ((b * a.length + t) * a.heads + h) * dim, y + i * wide, dim);
    }
  if (a.offset && a.active[b])
    for (long t = max(0, a.length - a.window); t < a.length; t++) {
      long slot = (offset + t) % a.window;
      convert(ring_k + slot * dim, new_keys + t * wide, dim);
      convert(ring_v + slot * dim, new_values + t * wide, dim);
    }
}

// cos and sin of the angle at position t of the flattened [B or 1, T], [2, D / 2]
void fill_angles(float* angles, const Attention& a, long t) {
  long position = t % a.length + (a.offset ? a.offset[t / a.length] : 0);
  angles += t * a.dim;
  for (long i = 0; i < a.dim / 2; i++) {
    float angle = (float)position * a.inv_freq[i];
    angles[i] = cosf(angle) * a.rope_scale;
    angles[i + a.dim / 2] = sinf(angle) * a.rope_scale;
  }
}

void attend_head(const Attention& a, long b, long kv_head, const float* angles) {
  if (a.dtype == F32) return attend<float, float>(a, b, kv_head, angles);
  if (a.offset) return attend<bf16, bf16>(a, b, kv_head, angles);
  attend<bf16, float>(a, b, kv_head, angles);
}

}  // namespace
