// causal_conv1d, resblock and causal_conv_transpose1d over time-major tensors [B, T, C].
//
// Input rows are activated once into scratch, where padding or history stands before them, and multiplied from there.
// Two ways to share the work: threads take chunks of rows, small enough to stay in their caches, or, where there is
// more weight than input (the last layers, and every layer of a stream), one scratch is shared and threads take panels
// of weights, so that each weight is read once.
#pragma once
#include "gemm.h"

namespace {

enum PadMode { CONSTANT = 0, REPLICATE, REFLECT };
constexpr size_t CHUNK_BYTES = 256 << 10;  // of a thread's scratch, or of its output: a quarter of a 1 MB level-2 cache
constexpr long LEAST_ROWS = 64;            // in a chunk, where there are so many: the weights are read once per chunk

thread_local Arena own_scratch, shared_scratch, hidden_scratch, plain_scratch;

struct Input {
  const void* x;  // [B, T, C], channels next to each other
  int dtype;
  long batch, length, channels, batch_step, step;
  long left, right;  // padding
  int pad_mode;
  void* history;  // [B, C, left] contiguous but for its batch step, or null
  long history_step;
  const bool *first, *active;  // [B]
};

template <class T, class From>
INLINE void activate_row(T* to, const From* from, long channels, long padded, int activation) {
  long c = 0;
  for (; c + W <= channels; c += W) store(to + c, activate(load(from + c), activation));
  for (; c < channels; c++) store_some(to + c, activate(load_some(from + c, 1), activation), 1);
  for (; c < padded; c++) to[c] = T{};
}

// Row i of stream b, -left <= i < length + right, activated; with it those behind it, if `count` is more than 1
template <class T, class From>
void fill_row(T* to, const Input& in, long b, long i, int activation, long count, long padded) {
  const From* x = (const From*)in.x + b * in.batch_step;
  if (i < 0 && in.history && !(in.pad_mode == REPLICATE && in.first[b])) {
    const From* h = (const From*)in.history + b * in.history_step + i + in.left;
    From column[W] = {};
    for (long c = 0; c < padded; c += W) {
      long count = min(W, in.channels - c);
      for (long j = 0; j < count; j++) column[j] = h[(c + j) * in.left];
      activate_row(to + c, column, max(0, count), min(W, padded - c), activation);
    }
    return;
  }
  if (i < 0 || i >= in.length) {
    if (in.pad_mode == REPLICATE) i = i < 0 ? 0 : in.length - 1;
    if (in.pad_mode == REFLECT) {  // an input shorter than the padding is first lengthened by zeros
      long lengthened = max(in.length, max(in.left, in.right) + 1);
      i = i < 0 ? -i : i < lengthened ? in.length : 2 * (lengthened - 1) - i;
    }
    if (i < 0 || i >= in.length) {
      memset((void*)to, 0, padded * sizeof(T));
      return;
    }
  }
  activate_row(to, x + i * in.step, count * in.channels, count * padded, activation);
}

template <class T>
void fill_rows(T* to, long pitch, long padded, const Input& in, long b, long first, long last, int activation) {
  if constexpr (sizeof(T) == 1) {  // by way of a row of fp32
    float* row = plain_scratch.take<float>(padded);
    for (long i = first; i < last; i++, to += pitch) {
      fill_rows(row, padded, padded, in, b, i, i + 1, activation);
      cut_into_digits(to, row, padded);
    }
  } else {
    for (long i = first; i < last;) {
      bool inside = i >= 0 && i < in.length, closed = pitch == in.channels && in.step == in.channels;
      long count = inside && closed ? min(last, in.length) - i : 1;  // rows without gaps are one long row
      if (in.dtype == F32)
        fill_row<T, float>(to, in, b, i, activation, count, padded);
      else
        fill_row<T, bf16>(to, in, b, i, activation, count, padded);
      i += count, to += count * pitch;
    }
  }
}

// The last `left` samples before the next call, in the rows that are active
template <class T>
void advance_history(const Input& in) {
  for (long b = 0; b < in.batch; b++) {
    if (!in.active[b]) continue;
    const T* x = (const T*)in.x + b * in.batch_step;
    T* history = (T*)in.history + b * in.history_step;
    bool replicate = in.pad_mode == REPLICATE && in.first[b];
    for (long j = 0; j < in.left; j++) {
      long t = in.length - in.left + j;
      for (long c = 0; c < in.channels; c++) {
        T* h = history + c * in.left;
        h[j] = t >= 0 ? x[t * in.step + c] : replicate ? x[c] : h[j + in.length];
      }
    }
  }
}

struct Weights {
  const void* packed;
  long outputs, taps;
  const float *bias, *dequantize;
  size_t bytes_per_weight;
};

// Rows in a chunk: of a size that caches hold, and such that every thread gets several
INLINE long rows_per_chunk(long rows, long bytes_per_row, int threads) {
  long fits = max(LEAST_ROWS, CHUNK_BYTES / bytes_per_row);
  return round_up(max(R, min(fits, ceil_div(rows, 2 * threads))), R);
}

INLINE bool by_panels(long rows, double input_bytes, double weight_bytes, int threads) {
  return rows < 16 * threads || (weight_bytes > input_bytes && input_bytes < (16 << 20));
}

template <class Kind>
void conv_of(const Input& in, const Weights& w, Output out, long stride, long dilation, int pre, long out_length,
             long out_batch_step, long residual_batch_step, int threads) {
  typedef typename Kind::Row T;
  long padded = round_up(in.channels, Kind::GROUP), pitch = pitch_of(Kind::row_of(padded), stride, sizeof(T));
  long panels = ceil_div(w.outputs, P), total = in.left + in.length + in.right;
  long reach = (w.taps - 1) * dilation + 1;
  auto output_of = [&](long b, long m) {
    Output o = out;
    o.rows -= m;
    if (o.tail) o.tail += b * (out_length - out.rows) * o.row;
    size_t size = o.dtype == F32 ? 4 : 2, residual_size = o.residual_dtype == F32 ? 4 : 2;
    o.y = (char*)o.y + (b * out_batch_step + m * o.row) * size;
    if (o.residual)
      o.residual = (const char*)o.residual + (b * residual_batch_step + m * o.residual_row) * residual_size;
    return o;
  };
  double input_bytes = (double)in.batch * total * pitch * sizeof(T);
  double weight_bytes = (double)panels * P * w.taps * padded * w.bytes_per_weight;
  if (by_panels(in.batch * out_length, input_bytes, weight_bytes, threads)) {
    T* scratch = shared_scratch.take<T>(in.batch * total * pitch);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (long i = 0; i < in.batch * total; i++)
        fill_rows(scratch + i * pitch, pitch, padded, in, i / total, i % total - in.left, i % total - in.left + 1, pre);
#pragma omp for schedule(dynamic)
      for (long panel = 0; panel < panels; panel++)
        for (long b = 0; b < in.batch; b++) {
          Rows<T> rows = rows_of(scratch + b * total * pitch, pitch, stride, dilation, w.taps, padded);
          multiply_rows<Kind>(rows, out_length, w.packed, panel, panel + 1, w.outputs, output_of(b, 0));
        }
    }
  } else {
    long row_bytes = max(stride * pitch * sizeof(T), w.outputs * (out.dtype == F32 ? 4 : 2));
    long chunk = rows_per_chunk(out_length, row_bytes, threads), chunks = ceil_div(out_length, chunk);
#pragma omp parallel num_threads(threads)
    {
      T* scratch = own_scratch.take<T>((chunk * stride + reach) * pitch);
#pragma omp for schedule(dynamic)
      for (long i = 0; i < in.batch * chunks; i++) {
        long b = i / chunks, m = i % chunks * chunk, count = min(chunk, out_length - m), t = m * stride - in.left;
        fill_rows(scratch, pitch, padded, in, b, t, t + (count - 1) * stride + reach, pre);
        Rows<T> rows = rows_of(scratch, pitch, stride, dilation, w.taps, padded);
        multiply_rows<Kind>(rows, count, w.packed, 0, panels, w.outputs, output_of(b, m));
      }
    }
  }
}

// Streams of a transposed convolution: what the last call left over is added to the head of y [B, T s, O], and the tail
// [B, rows, s, O] of this call, which has no bias yet, is left over for the next one.
template <class T>
void overlap_add(T* y, float* tail, T* overlap, const bool* active, long batch, long samples, long tail_samples,
                 long outputs, long length, long y_batch_step, long y_step, long overlap_step) {
  for (long b = 0; b < batch; b++, y += y_batch_step, tail += tail_samples * outputs, overlap += overlap_step)
    for (long o = 0; o < outputs; o++) {
      for (long p = 0; p < length; p++) {
        float before = to_float(overlap[o * length + p]);
        T* sum = y + p * y_step + o;
        if (p < samples)
          store_some(sum, load_some(sum, 1) + before, 1);
        else
          tail[(p - samples) * outputs + o] += before;
      }
      if (!active[b]) continue;
      for (long p = 0; p < length; p++) store_some(overlap + o * length + p, broadcast(tail[p * outputs + o]), 1);
    }
}

// Depthwise: y[t s + j, c] = bias[c] + sum_tap weight[tap, j, c] x[t - taps + 1 + tap, c], `weight` fp32
template <class From>
void depthwise_rows(const Input& in, const float* weight, const float* bias, Output out, long stride, long taps, long b,
                    long t, int pre) {
  const From* x = (const From*)in.x + b * in.batch_step;
  for (long j = 0; j < stride; j++)
    for (long c = 0; c < in.channels; c += W) {
      long count = min(W, in.channels - c);
      vf sum = (vf){};
      for (long tap = 0; tap < taps; tap++) {
        long i = t - taps + 1 + tap;
        if (i < 0 || i >= in.length) continue;
        vf value = activate(load_up_to(x + i * in.step + c, count), pre);
        sum += value * load_up_to(weight + (tap * stride + j) * in.channels + c, count);
      }
      if (t < out.rows) {
        if (bias) sum += load_up_to(bias + c, count);
        long position = (t * stride + j) * in.channels + c;
        store_up_to((From*)out.y + b * out.rows * stride * in.channels + position, sum, count);
      } else {
        long position = ((t - out.rows) * stride + j) * in.channels + c;
        store_up_to(out.tail + b * (taps - 1) * stride * in.channels + position, sum, count);
      }
    }
}

// A residual unit in chunks of rows: ELU(x) and the hidden channels stay in a thread's scratch. Few rows go in chunks
// too.
template <class Kind>
void resblock_of(const Input& in, const Weights& w1, const Weights& w2, Output out, long dilation, long out_length,
                 long out_batch_step, long residual_batch_step, int threads) {
  typedef typename Kind::Row T;
  typedef typename Kind::Plain Plain;
  constexpr int DTYPE = sizeof(Plain) == 4 ? F32 : BF16;
  long hidden = round_up(w1.outputs, Kind::GROUP), padded = round_up(in.channels, Kind::GROUP);
  long pitch = pitch_of(Kind::row_of(padded), 1, sizeof(T)),
       hidden_pitch = pitch_of(Kind::row_of(hidden), 1, sizeof(T));
  long plain_pitch = Kind::CUT ? hidden : hidden_pitch;
  long reach = (w1.taps - 1) * dilation + 1;
  size_t size = out.dtype == F32 ? 4 : 2;
  auto first_output = [&](Plain* h) {
    Output o;
    o.y = h, o.dtype = DTYPE, o.row = plain_pitch, o.bias = w1.bias, o.dequantize = w1.dequantize, o.post = ELU;
    return o;
  };
  auto second_output = [&](long b, long m) {
    Output o = out;
    o.y = (char*)o.y + (b * out_batch_step + m * o.row) * size;
    o.residual = (const char*)o.residual + (b * residual_batch_step + m * o.residual_row) * size;
    return o;
  };
  long panels1 = ceil_div(w1.outputs, P), panels2 = ceil_div(w2.outputs, P);
  if (in.batch * out_length < 16 * threads) {
    long total = in.left + in.length + in.right;
    T* scratch = shared_scratch.take<T>(in.batch * total * pitch);
    long rows = in.batch * out_length;
    Plain* h = hidden_scratch.take<Plain>(rows * plain_pitch);
    T* second = Kind::CUT ? own_scratch.take<T>(rows * hidden_pitch) : (T*)h;
    memset((void*)h, 0, rows * plain_pitch * sizeof(Plain));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (long i = 0; i < in.batch * total; i++)
        fill_rows(scratch + i * pitch, pitch, padded, in, i / total, i % total - in.left, i % total - in.left + 1, ELU);
#pragma omp for
      for (long panel = 0; panel < panels1; panel++)
        for (long b = 0; b < in.batch; b++)
          multiply_rows<Kind>(rows_of(scratch + b * total * pitch, pitch, 1, dilation, w1.taps, padded), out_length,
                              w1.packed, panel, panel + 1, w1.outputs, first_output(h + b * out_length * plain_pitch));
      if constexpr (Kind::CUT) {
#pragma omp for
        for (long i = 0; i < rows; i++) cut_into_digits(second + i * hidden_pitch, h + i * plain_pitch, hidden);
      }
#pragma omp for
      for (long panel = 0; panel < panels2; panel++)
        for (long b = 0; b < in.batch; b++)
          multiply_rows<Kind>(rows_of(second + b * out_length * hidden_pitch, hidden_pitch, 1, 1, 1, hidden),
                              out_length, w2.packed, panel, panel + 1, w2.outputs, second_output(b, 0));
    }
    return;
  }
  long chunk = rows_per_chunk(out_length, (pitch + hidden_pitch) * sizeof(T), threads),
       chunks = ceil_div(out_length, chunk);
#pragma omp parallel num_threads(threads)
  {
    T* scratch = own_scratch.take<T>((chunk + reach) * pitch + (Kind::CUT ? chunk * hidden_pitch : 0));
    Plain* h = hidden_scratch.take<Plain>(chunk * plain_pitch);
    T* second = Kind::CUT ? scratch + (chunk + reach) * pitch : (T*)h;
    memset((void*)h, 0, chunk * plain_pitch * sizeof(Plain));
#pragma omp for schedule(dynamic)
    for (long i = 0; i < in.batch * chunks; i++) {
      long b = i / chunks, m = i % chunks * chunk, count = min(chunk, out_length - m);
      fill_rows(scratch, pitch, padded, in, b, m - in.left, m - in.left + count - 1 + reach, ELU);
      multiply_rows<Kind>(rows_of(scratch, pitch, 1, dilation, w1.taps, padded), count, w1.packed, 0, panels1,
                          w1.outputs, first_output(h));
      if constexpr (Kind::CUT)
        for (long r = 0; r < count; r++) cut_into_digits(second + r * hidden_pitch, h + r * plain_pitch, hidden);
      multiply_rows<Kind>(rows_of(second, hidden_pitch, 1, 1, 1, hidden), count, w2.packed, 0, panels2, w2.outputs,
                          second_output(b, m));
    }
  }
}

}  // namespace
