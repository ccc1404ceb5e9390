// window_attention: RoPE on q and k, then attention over the last `window` positions, with ring caches when streaming.
//
// A thread takes one key/value head of one row at a time: it lays out the keys and values in order of position (what
// the ring holds, then the new ones, rotated), and lets blocks of queries run over them.
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

template <class T> void rotate(float* to, const T* x, const float* cosines, long dim, bool interleaved) {
  const float* sines = cosines + dim / 2;
  for (long i = 0; i < dim / 2; i++) {
    long left = interleaved ? 2 * i : i, right = interleaved ? 2 * i + 1 : i + dim / 2;
    float a = to_float(x[left]), b = to_float(x[right]);
    to[left] = a * cosines[i] - b * sines[i];
    to[right] = b * cosines[i] + a * sines[i];
  }
}

template <class T> void widen(float* to, const T* x, long dim) {
  for (long i = 0; i < dim; i++) to[i] = to_float(x[i]);
}

template <class T> void narrow(T* to, const float* x, long dim) {
  long i = 0;
  for (; i + W <= dim; i += W) store(to + i, load(x + i));
  if (i < dim) store_some(to + i, load_some(x + i, dim - i), dim - i);
}

// Scores of COUNT queries [COUNT, wide] with keys [first, last)
template <int COUNT>
void scores_of(float* scores, long row, const float* q, const float* keys, long wide, long first, long last) {
  for (long j = first; j < last; j++) {
    const float* key = keys + j * wide;
    vf sum[COUNT] = {};
    for (long d = 0; d < wide; d += W) {
      vf x = load(key + d);
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) sum[i] += x * load(q + i * wide + d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) scores[i * row + j] = sum_lanes(sum[i]);
  }
}

template <int COUNT>
void weigh_values(float* y, const float* weights, long row, const float* values, long wide, long first, long last) {
  for (long d = 0; d < wide; d += W) {
    vf sum[COUNT] = {};
    for (long j = first; j < last; j++) {
      vf x = load(values + j * wide + d);
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) sum[i] += x * weights[i * row + j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) store(y + i * wide + d, sum[i]);
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

// One key/value head of one row, all queries that share it
template <class T> void attend(const Attention& a, long b, long kv_head, const float* angles) {
  long dim = a.dim, wide = round_up(dim, W), group = a.heads / a.kv_heads;
  long offset = a.offset ? a.offset[b] : 0;
  long past = a.offset ? min(offset, a.window - 1) : 0, total = past + a.length;
  long row = round_up(total, W);
  float* keys = attention_scratch.take<float>(2 * total * wide + QUERIES * (2 * wide + row));
  float *values = keys + total * wide, *q = values + total * wide, *y = q + QUERIES * wide, *scores = y + QUERIES * wide;
  if (wide != dim) memset(keys, 0, (2 * total + QUERIES) * wide * sizeof(float));

  T *ring_k = nullptr, *ring_v = nullptr;
  if (a.offset) {
    long base = (b * a.kv_heads + kv_head) * a.window * dim;
    ring_k = (T*)a.cache_k + base, ring_v = (T*)a.cache_v + base;
    for (long j = 0; j < past; j++) {
      long slot = (offset - past + j) % a.window;
      widen(keys + j * wide, ring_k + slot * dim, dim);
      widen(values + j * wide, ring_v + slot * dim, dim);
    }
  }
  const T* k = (const T*)a.k + b * a.k_batch + kv_head * a.k_head;
  const T* v = (const T*)a.v + b * a.v_batch + kv_head * a.v_head;
  angles += a.offset ? b * a.length * dim : 0;
  for (long t = 0; t < a.length; t++) {
    float *key = keys + (past + t) * wide, *value = values + (past + t) * wide;
    rotate(key, k + t * a.k_step, angles + t * dim, dim, a.interleaved);
    widen(value, v + t * a.v_step, dim);
    if (sizeof(T) == 2) {  // what the ring would give back
      T* rounded = (T*)y;
      narrow(rounded, key, dim);
      widen(key, rounded, dim);
    }
  }
  float scale = 1.0f / sqrtf((float)dim);
  for (long h = kv_head * group; h < (kv_head + 1) * group; h++)
    for (long t = 0; t < a.length; t += QUERIES) {
      int count = (int)min(QUERIES, a.length - t);
      const T* x = (const T*)a.q + b * a.q_batch + h * a.q_head + t * a.q_step;
      for (int i = 0; i < count; i++) rotate(q + i * wide, x + i * a.q_step, angles + (t + i) * dim, dim, a.interleaved);
      for (long d = 0; d < count * wide; d++) q[d] *= scale;
      long begin = max(0, past + t - a.window + 1), end = past + t + count;
      float inverse[QUERIES];
      if (count == QUERIES)
        scores_of<QUERIES>(scores, row, q, keys, wide, begin, end);
      else
        for (int i = 0; i < count; i++) scores_of<1>(scores + i * row, row, q + i * wide, keys, wide, begin, end);
      for (int i = 0; i < count; i++) {
        long last = past + t + i + 1;
        inverse[i] = 1.0f / softmax(scores + i * row, begin, max(0, last - a.window), last, end);
      }
      if (count == QUERIES)
        weigh_values<QUERIES>(y, scores, row, values, wide, begin, end);
      else
        for (int i = 0; i < count; i++) weigh_values<1>(y + i * wide, scores + i * row, row, values, wide, begin, end);
      for (int i = 0; i < count; i++) {
        for (long d = 0; d < wide; d++) y[i * wide + d] *= inverse[i];
        narrow((T*)a.y + ((b * a.length + t + i) * a.heads + h) * dim, y + i * wide, dim);
      }
    }
  if (a.offset && a.active[b])
    for (long t = max(0, a.length - a.window); t < a.length; t++) {
      long slot = (offset + t) % a.window;
      narrow(ring_k + slot * dim, keys + (past + t) * wide, dim);
      narrow(ring_v + slot * dim, values + (past + t) * wide, dim);
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
  if (a.dtype == F32)
    attend<float>(a, b, kv_head, angles);
  else
    attend<bf16>(a, b, kv_head, angles);
}

}  // namespace
