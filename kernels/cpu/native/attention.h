// window_attention: RoPE on q and k, then causal attention over the last `window` positions, with ring-buffer key/value
// caches when streaming.
//
// A thread processes one key/value head of one batch row at a time. Blocks of queries visit the keys and values in
// order of position, in up to three contiguous spans: the two parts of the ring, read in place where possible, and the
// new positions, whose keys have been rotated.
#pragma once
#include "gemm.h"

namespace {

constexpr int QUERIES = 4;  // per block

MIRRORED(struct, Attention, {
  const void *q, *k, *v;  // [B, T, H, D] with the steps below, D contiguous
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
  const int64_t* rows;      // [B], the rows of the four above, or null: those of the batch
});

// The row of the state that batch row b continues
INLINE long state_row(const Attention& a, long b) { return a.rows ? a.rows[b] : b; }

thread_local Arena attention_scratch;

// RoPE of one head: x [D] is rotated by the angles whose cosines [D / 2], followed by their sines [D / 2], are given. The
// result must not overlap them: else the compiler could not vectorize.
template <class T>
void rotate(float* __restrict__ to, const T* x, const float* cosines, long dim, bool interleaved) {
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
  if (i < count) store_partial(to + i, load_partial(x + i, count - i), count - i);
}

// Keys and values of positions [from, to), contiguous in memory with `padded_dim` elements per position. Positions are
// counted from the oldest one that is visible to the first query.
template <class T>
struct Span {
  const T *keys, *values;
  long from, to;
};

// Scores of COUNT queries [COUNT, padded_dim] with W keys or, if not FULL, with the first `count` of them
template <int COUNT, bool FULL, class T>
INLINE void score_block(float* scores, long score_step, const float* q, const T* keys, long padded_dim, long count) {
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++) {
    vf sum[W] = {};
    for (long d = 0; d < padded_dim; d += W) {
      vf x = load(q + i * padded_dim + d);
      if (FULL)
#pragma GCC unroll 16
        for (int k = 0; k < W; k++) sum[k] += load(keys + k * padded_dim + d) * x;
      else
        for (int k = 0; k < count; k++) sum[k] += load(keys + k * padded_dim + d) * x;
    }
    store_up_to(scores + i * score_step, sum_lanes_of_each<W>(sum), count);
  }
}

// Scores of COUNT queries with the keys of a span at positions [first, last)
template <int COUNT, class T>
void score_span(float* scores, long score_step, const float* q, const Span<T>& span, long padded_dim, long first,
                long last) {
  long j = max(first, span.from), end = min(last, span.to);
  const T* keys = span.keys - span.from * padded_dim;
  for (; j + W <= end; j += W)
    score_block<COUNT, true>(scores + j, score_step, q, keys + j * padded_dim, padded_dim, W);
  if (j < end) score_block<COUNT, false>(scores + j, score_step, q, keys + j * padded_dim, padded_dim, end - j);
}

// V vectors of columns of y [COUNT, padded_dim] = weights [COUNT, positions] times values [positions, padded_dim],
// summed in order of position
template <int COUNT, int V, class T>
INLINE void sum_value_columns(float* y, const float* weights, long score_step, const Span<T>* spans, int span_count,
                              long padded_dim, long first, long last) {
  vf sum[COUNT][V] = {};
  for (const Span<T>* span = spans; span < spans + span_count; span++)
    for (long j = max(first, span->from); j < min(last, span->to); j++) {
      const T* value = span->values + (j - span->from) * padded_dim;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        vf x = load(value + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) sum[i][v] += x * weights[i * score_step + j];
      }
    }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(y + i * padded_dim + v * W, sum[i][v]);
}

template <class T>
Span<T> at_column(Span<T> span, long d) {
  return {span.keys, span.values + d, span.from, span.to};
}

template <int COUNT, class T>
void sum_values(float* y, const float* weights, long score_step, const Span<T> (&spans)[3], int span_count,
                long padded_dim, long first, long last) {
  constexpr int V = VECTOR_REGISTERS == 32 ? 4 : 2;  // COUNT * V accumulators stay in registers
  for (long d = 0; d < padded_dim;) {
    Span<T> columns[3] = {at_column(spans[0], d), at_column(spans[1], d), at_column(spans[2], d)};
    if (d + V * W <= padded_dim) {
      sum_value_columns<COUNT, V>(y + d, weights, score_step, columns, span_count, padded_dim, first, last);
      d += V * W;
    } else {
      sum_value_columns<COUNT, 1>(y + d, weights, score_step, columns, span_count, padded_dim, first, last);
      d += W;
    }
  }
}

// Unnormalized softmax in place: exp(score - largest score) in [first, last), 0 elsewhere in [begin, end); returns the
// sum
INLINE float softmax(float* scores, long begin, long first, long last, long end) {
  vf running_max = broadcast(-INFINITY);
  long j = first;
  for (; j + W <= last; j += W) {
    vf x = load(scores + j);
    running_max = x > running_max ? x : running_max;
  }
  float largest = max_lane(running_max);
  for (; j < last; j++) largest = scores[j] > largest ? scores[j] : largest;
  vf total = (vf){};
  for (j = first; j < last; j += W) {
    long count = min(W, last - j);
    vf x = exp(load_up_to(scores + j, count) - largest);
    store_up_to(scores + j, x, count);
    if (count < W) x = load_partial(scores + j, count);
    total += x;
  }
  for (j = begin; j < first; j++) scores[j] = 0.0f;
  for (j = last; j < end; j++) scores[j] = 0.0f;
  return sum_lanes(total);
}

// Attention of COUNT consecutive queries [COUNT, padded_dim], the first at position `at`: y [COUNT, padded_dim] =
// softmax(q k) v
template <int COUNT, class T>
void attend_queries(float* y, const float* q, float* scores, long score_step, const Span<T> (&spans)[3], int span_count,
                    long padded_dim, long at, long window) {
  long begin = max(0, at - window + 1), end = at + COUNT;
  for (int s = 0; s < span_count; s++) score_span<COUNT>(scores, score_step, q, spans[s], padded_dim, begin, end);
  float inverse[COUNT];
  for (int i = 0; i < COUNT; i++)
    inverse[i] = 1.0f / softmax(scores + i * score_step, begin, max(0, at + i + 1 - window), at + i + 1, end);
  sum_values<COUNT>(y, scores, score_step, spans, span_count, padded_dim, begin, end);
  for (int i = 0; i < COUNT; i++)
    for (long d = 0; d < padded_dim; d++) y[i * padded_dim + d] *= inverse[i];
}

// One key/value head of one batch row, with all query heads that share it (grouped-query attention). Key is the type in
// which keys and values are held in scratch. The ring is read in place if that is also its type, T, and heads are a
// whole number of vectors; else it is copied to scratch.
template <class T, class Key>
void attend(const Attention& a, long b, long kv_head, const float* angles) {
  long dim = a.dim, padded_dim = round_up(dim, W), group = a.heads / a.kv_heads;
  long state = state_row(a, b), offset = a.offset ? a.offset[state] : 0;
  long past = a.offset ? min(offset, a.window - 1) : 0;
  bool in_place = padded_dim == dim && sizeof(T) == sizeof(Key);
  long copied = in_place ? 0 : past, rows = copied + a.length, score_step = round_up(past + a.length, W);
  float* q = attention_scratch.take<float>(2 * rows * padded_dim + QUERIES * (2 * padded_dim + score_step));
  float *y = q + QUERIES * padded_dim, *scores = y + QUERIES * padded_dim;
  Key *keys = (Key*)(scores + QUERIES * score_step), *values = keys + rows * padded_dim;
  if (padded_dim != dim) {
    memset(q, 0, QUERIES * padded_dim * sizeof(float));
    memset((void*)keys, 0, 2 * rows * padded_dim * sizeof(Key));
  }

  Span<Key> spans[3] = {};
  int span_count = 0;
  T *ring_k = nullptr, *ring_v = nullptr;
  if (a.offset) {
    long base = (state * a.kv_heads + kv_head) * a.window * dim;
    ring_k = (T*)a.cache_k + base, ring_v = (T*)a.cache_v + base;
    long oldest = (offset - past) % a.window, head = min(past, a.window - oldest);
    if (in_place) {
      spans[span_count++] = {(Key*)ring_k + oldest * dim, (Key*)ring_v + oldest * dim, 0, head};
      spans[span_count++] = {(Key*)ring_k, (Key*)ring_v, head, past};
    }
    for (long j = 0; j < copied; j++) {
      long slot = (oldest + j) % a.window;
      convert(keys + j * padded_dim, ring_k + slot * dim, dim);
      convert(values + j * padded_dim, ring_v + slot * dim, dim);
    }
  }
  spans[span_count++] = {keys, values, past - copied, past + a.length};
  Key *new_keys = keys + copied * padded_dim, *new_values = values + copied * padded_dim;
  const T* k = (const T*)a.k + b * a.k_batch + kv_head * a.k_head;
  const T* v = (const T*)a.v + b * a.v_batch + kv_head * a.v_head;
  angles += a.offset ? b * a.length * dim : 0;
  for (long t = 0; t < a.length; t++) {
    T* rounded = (T*)y;  // rounded to T, as the ring stores it
    rotate(q, k + t * a.k_step, angles + t * dim, dim, a.interleaved);
    convert(rounded, q, dim);
    convert(new_keys + t * padded_dim, rounded, dim);
    convert(new_values + t * padded_dim, v + t * a.v_step, dim);
  }
  float scale = 1.0f / sqrtf((float)dim);
  for (long h = kv_head * group; h < (kv_head + 1) * group; h++)
    for (long t = 0; t < a.length;) {
      int queries = (int)min(QUERIES, a.length - t);
      const T* x = (const T*)a.q + b * a.q_batch + h * a.q_head + t * a.q_step;
      for (int i = 0; i < queries; i++)
        rotate(q + i * padded_dim, x + i * a.q_step, angles + (t + i) * dim, dim, a.interleaved);
      for (long d = 0; d < queries * padded_dim; d++) q[d] *= scale;
      switch (queries) {
        case 1:
          attend_queries<1>(y, q, scores, score_step, spans, span_count, padded_dim, past + t, a.window);
          break;
        case 2:
          attend_queries<2>(y, q, scores, score_step, spans, span_count, padded_dim, past + t, a.window);
          break;
        case 3:
          attend_queries<3>(y, q, scores, score_step, spans, span_count, padded_dim, past + t, a.window);
          break;
        default:
          attend_queries<QUERIES>(y, q, scores, score_step, spans, span_count, padded_dim, past + t, a.window);
      }
      for (int i = 0; i < queries; i++, t++)
        convert((T*)a.y + ((b * a.length + t) * a.heads + h) * dim, y + i * padded_dim, dim);
    }
  if (a.offset && a.active[state])
    for (long t = max(0, a.length - a.window); t < a.length; t++) {
      long slot = (offset + t) % a.window;
      convert(ring_k + slot * dim, new_keys + t * padded_dim, dim);
      convert(ring_v + slot * dim, new_values + t * padded_dim, dim);
    }
}

// Cosines and sines [2, D / 2] of the RoPE angles at index t of the flattened [B, T] or, offline, of [T]
void fill_angles(float* angles, const Attention& a, long t) {
  long position = t % a.length + (a.offset ? a.offset[state_row(a, t / a.length)] : 0);
  angles += t * a.dim;
  for (long i = 0; i < a.dim / 2; i++) {
    float angle = (float)position * a.inv_freq[i];
    angles[i] = cosf(angle) * a.rope_scale;
    angles[i + a.dim / 2] = sinf(angle) * a.rope_scale;
  }
}

void attend_head(const Attention& a, long b, long kv_head, const float* angles) {
  if (a.dtype == F32) return attend<float, float>(a, b, kv_head, angles);
  // Many queries read each key often: then widening it once costs less than reading the ring in place saves
  if (a.offset && a.length <= 2 * QUERIES) return attend<bf16, bf16>(a, b, kv_head, angles);
  attend<bf16, float>(a, b, kv_head, angles);
}

}  // namespace
