// causal_conv1d, resblock and causal_conv_transpose1d over channels-last tensors [B, T, C].
//
// The activation is applied to each input row once, while it is copied to scratch behind the padding or the history.
// The GEMM (gemm.h) reads the scratch. Work is divided among threads in one of two ways:
//   - by rows: each thread takes chunks of output rows that are small enough for its scratch to stay in its caches;
//   - by panels: where the weights are larger than the input (the deepest layers, and every layer of a stream), all
//     threads share one scratch and each takes panels of weights, so that every weight is read once.
#pragma once
#include "gemm.h"

namespace {

MIRRORED(enum, PadMode, {CONSTANT, REPLICATE, REFLECT});
constexpr size_t CHUNK_BYTES = 256 << 10;  // of a chunk's scratch, or of its output: a quarter of a 1 MB level-2 cache
constexpr long MIN_CHUNK_ROWS = 64;        // of a chunk, if there are as many: weights are read once per chunk

// Where threads share scratch, it is the arena of the thread that starts the parallel region
thread_local Arena thread_scratch, shared_scratch, hidden_scratch, value_scratch;

MIRRORED(struct, Input, {
  const void* x;  // [B, T, C], channels contiguous
  int dtype;
  long batch, length, channels, batch_step, step;
  long left, right;  // padding, in samples
  int pad_mode;
  void* history;  // [B, left, C], channels contiguous, or null
  long history_batch_step, history_step;
  const bool *first, *active;  // [B]
  const int64_t* rows;         // [B], the rows of history, first and active, or null: those of the batch
});

// Converts one row, applies the activation and fills up channels [channels, padded) with zeros
template <class T, class From>
INLINE void activate_row(T* to, const From* from, long channels, long padded, int activation) {
  long c = 0;
  for (; c + W <= channels; c += W) store(to + c, activate(load(from + c), activation));
  for (; c < channels; c++) store_partial(to + c, activate(load_partial(from + c, 1), activation), 1);
  for (; c < padded; c++) to[c] = T{};
}

// The row of the state that batch row b continues
INLINE long state_row(const Input& in, long b) { return in.rows ? in.rows[b] : b; }

// The history of batch row b at time i < 0
template <class T>
INLINE T* past(const Input& in, long b, long i) {
  return (T*)in.history + state_row(in, b) * in.history_batch_step + (i + in.left) * in.history_step;
}

// Writes the activated input at time i of batch row b, -left <= i < length + right: from x, the history or the padding.
// With count > 1, also the rows that follow it; they must be in x, without gaps between rows in x and in `to`.
template <class T, class From>
void fill_row(T* to, const Input& in, long b, long i, int activation, long count, long padded) {
  const From* x = (const From*)in.x + b * in.batch_step;
  if (i < 0 && in.history && !(in.pad_mode == REPLICATE && in.first[state_row(in, b)]))
    return activate_row(to, past<From>(in, b, i), in.channels, padded, activation);
  if (i < 0 || i >= in.length) {
    if (in.pad_mode == REPLICATE) i = i < 0 ? 0 : in.length - 1;
    if (in.pad_mode == REFLECT) {  // an input no longer than the padding is first extended with zeros
      long extended = max(in.length, max(in.left, in.right) + 1);
      i = i < 0 ? -i : i < extended ? in.length : 2 * (extended - 1) - i;
    }
    if (i < 0 || i >= in.length) {
      memset((void*)to, 0, padded * sizeof(T));
      return;
    }
  }
  activate_row(to, x + i * in.step, count * in.channels, count * padded, activation);
}

// Writes the activated input at times [first, last) of batch row b, quantized if T is a byte
template <class T>
void fill_rows(T* to, long pitch, long padded, const Input& in, long b, long first, long last, int activation) {
  if constexpr (sizeof(T) == 1) {  // quantized from a row of fp32
    float* row = value_scratch.take<float>(padded);
    for (long i = first; i < last; i++, to += pitch) {
      fill_rows(row, padded, padded, in, b, i, i + 1, activation);
      quantize_to_digits(to, row, padded);
    }
  } else {
    for (long i = first; i < last;) {
      bool inside = i >= 0 && i < in.length, contiguous = pitch == in.channels && in.step == in.channels;
      // rows without gaps are handled as one long row
      long count = inside && contiguous ? min(last, in.length) - i : 1;
      if (in.dtype == F32)
        fill_row<T, float>(to, in, b, i, activation, count, padded);
      else
        fill_row<T, bf16>(to, in, b, i, activation, count, padded);
      i += count, to += count * pitch;
    }
  }
}

// Replaces the history of the active rows by the last `left` samples of history and x
template <class T>
void advance_history(const Input& in) {
  for (long b = 0; b < in.batch; b++) {
    if (!in.active[state_row(in, b)]) continue;
    const T* x = (const T*)in.x + b * in.batch_step;
    bool replicate = in.pad_mode == REPLICATE && in.first[state_row(in, b)];
    for (long i = -in.left; i < 0; i++) {
      long t = i + in.length;  // the time in this call that is time i of the next one
      const T* from = t >= 0 ? x + t * in.step : replicate ? x : past<T>(in, b, t);
      memcpy((void*)past<T>(in, b, i), from, in.channels * sizeof(T));
    }
  }
}

MIRRORED(struct, Weights, {
  const void* packed;
  long outputs, taps;
  const float *bias, *dequantize;
  long bytes_per_weight;
});

// Rows per chunk, a multiple of R: few enough for a chunk to fit in the cache (unless rows are very long) and for every
// thread to get about two chunks
INLINE long rows_per_chunk(long rows, long bytes_per_row, int threads) {
  long fits = max(MIN_CHUNK_ROWS, CHUNK_BYTES / bytes_per_row);
  return round_up(max(R, min(fits, ceil_div(rows, 2 * threads))), R);
}

// Whether threads divide the panels of weights among them and not the rows: where there are few rows, or more bytes of
// weights than of an input that a shared cache can hold
INLINE bool divide_by_panels(long rows, double input_bytes, double weight_bytes, int threads) {
  return rows < 16 * threads || (weight_bytes > input_bytes && input_bytes < (16 << 20));
}

// Convolution of the whole batch; `out` describes the output of batch row 0
template <class Kind>
void run_conv(const Input& in, const Weights& w, Output out, long stride, long dilation, int pre, long out_length,
              long out_batch_step, long residual_batch_step, int threads) {
  typedef typename Kind::Row T;
  long padded = round_up(in.channels, Kind::GROUP), pitch = pitch_of(Kind::row_elements(padded), stride, sizeof(T));
  long panels = ceil_div(w.outputs, P), total = in.left + in.length + in.right;
  long receptive_field = (w.taps - 1) * dilation + 1;
  auto output_at = [&](long b, long m) {
    Output o = out;
    size_t size = o.dtype == F32 ? 4 : 2, residual_size = o.residual_dtype == F32 ? 4 : 2;
    o.y = (char*)o.y + (b * out_batch_step + m * o.row_step) * size;
    if (o.residual)
      o.residual = (const char*)o.residual + (b * residual_batch_step + m * o.residual_row_step) * residual_size;
    return o;
  };
  double input_bytes = (double)in.batch * total * pitch * sizeof(T);
  double weight_bytes = (double)panels * P * w.taps * padded * w.bytes_per_weight;
  if (divide_by_panels(in.batch * out_length, input_bytes, weight_bytes, threads)) {
    T* scratch = shared_scratch.take<T>(in.batch * total * pitch);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (long i = 0; i < in.batch * total; i++)
        fill_rows(scratch + i * pitch, pitch, padded, in, i / total, i % total - in.left, i % total - in.left + 1, pre);
#pragma omp for schedule(dynamic)
      for (long panel = 0; panel < panels; panel++)
        for (long b = 0; b < in.batch; b++) {
          Rows<T> rows = conv_rows(scratch + b * total * pitch, pitch, stride, dilation, w.taps, padded);
          multiply_rows<Kind>(rows, out_length, w.packed, panel, panel + 1, w.outputs, output_at(b, 0));
        }
    }
  } else {
    long row_bytes = max(stride * pitch * sizeof(T), w.outputs * (out.dtype == F32 ? 4 : 2));
    long chunk = rows_per_chunk(out_length, row_bytes, threads), chunks = ceil_div(out_length, chunk);
#pragma omp parallel num_threads(threads)
    {
      T* scratch = thread_scratch.take<T>((chunk * stride + receptive_field) * pitch);
#pragma omp for schedule(dynamic)
      for (long i = 0; i < in.batch * chunks; i++) {
        long b = i / chunks, m = i % chunks * chunk, count = min(chunk, out_length - m), t = m * stride - in.left;
        fill_rows(scratch, pitch, padded, in, b, t, t + (count - 1) * stride + receptive_field, pre);
        Rows<T> rows = conv_rows(scratch, pitch, stride, dilation, w.taps, padded);
        multiply_rows<Kind>(rows, count, w.packed, 0, panels, w.outputs, output_at(b, m));
      }
    }
  }
}

// Depthwise transposed convolution, outputs y [s, C] of time t in batch row b; weights and bias are fp32:
//   y[j, c] = bias[c] + sum_tap weight[tap, j, c] x[t - taps + 1 + tap, c]
template <class T>
void depthwise_rows(const Input& in, const float* weight, const float* bias, T* y, long stride, long taps, long b,
                    long t, int pre) {
  const T* x = (const T*)in.x + b * in.batch_step;
  for (long j = 0; j < stride; j++)
    for (long c = 0; c < in.channels; c += W) {
      long count = min(W, in.channels - c);
      vf sum = bias ? load_up_to(bias + c, count) : (vf){};
      for (long tap = 0; tap < taps; tap++) {
        long i = t - taps + 1 + tap;
        if (i >= in.length || (i < 0 && !in.history)) continue;
        vf value = activate(load_up_to((i < 0 ? past<T>(in, b, i) : x + i * in.step) + c, count), pre);
        sum += value * load_up_to(weight + (tap * stride + j) * in.channels + c, count);
      }
      store_up_to(y + j * in.channels + c, sum, count);
    }
}

// Residual unit, both convolutions for one chunk of rows at a time: ELU(x) and the hidden channels never leave the
// thread's scratch. Where there are too few rows for chunks, threads divide the panels of each convolution instead.
template <class Kind>
void run_resblock(const Input& in, const Weights& w1, const Weights& w2, Output out, long dilation, long out_length,
                  long out_batch_step, long residual_batch_step, int threads) {
  typedef typename Kind::Row T;
  typedef typename Kind::Value Value;
  constexpr int VALUE_DTYPE = sizeof(Value) == 4 ? F32 : BF16;
  long hidden = round_up(w1.outputs, Kind::GROUP), padded = round_up(in.channels, Kind::GROUP);
  long pitch = pitch_of(Kind::row_elements(padded), 1, sizeof(T)),
       hidden_pitch = pitch_of(Kind::row_elements(hidden), 1, sizeof(T));
  long value_pitch = Kind::QUANTIZED ? hidden : hidden_pitch;
  long receptive_field = (w1.taps - 1) * dilation + 1;
  size_t size = out.dtype == F32 ? 4 : 2;
  auto hidden_output = [&](Value* hidden_values) {
    Output o;
    o.y = hidden_values, o.dtype = VALUE_DTYPE, o.row_step = value_pitch, o.bias = w1.bias,
    o.dequantize = w1.dequantize, o.post = ELU;
    return o;
  };
  auto final_output = [&](long b, long m) {
    Output o = out;
    o.y = (char*)o.y + (b * out_batch_step + m * o.row_step) * size;
    o.residual = (const char*)o.residual + (b * residual_batch_step + m * o.residual_row_step) * size;
    return o;
  };
  long panels1 = ceil_div(w1.outputs, P), panels2 = ceil_div(w2.outputs, P);
  if (in.batch * out_length < 16 * threads) {
    long total = in.left + in.length + in.right;
    T* scratch = shared_scratch.take<T>(in.batch * total * pitch);
    long rows = in.batch * out_length;
    Value* hidden_values = hidden_scratch.take<Value>(rows * value_pitch);
    T* hidden_rows = Kind::QUANTIZED ? thread_scratch.take<T>(rows * hidden_pitch) : (T*)hidden_values;
    memset((void*)hidden_values, 0, rows * value_pitch * sizeof(Value));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (long i = 0; i < in.batch * total; i++)
        fill_rows(scratch + i * pitch, pitch, padded, in, i / total, i % total - in.left, i % total - in.left + 1, ELU);
#pragma omp for
      for (long panel = 0; panel < panels1; panel++)
        for (long b = 0; b < in.batch; b++)
          multiply_rows<Kind>(conv_rows(scratch + b * total * pitch, pitch, 1, dilation, w1.taps, padded), out_length,
                              w1.packed, panel, panel + 1, w1.outputs,
                              hidden_output(hidden_values + b * out_length * value_pitch));
      if constexpr (Kind::QUANTIZED) {
#pragma omp for
        for (long i = 0; i < rows; i++)
          quantize_to_digits(hidden_rows + i * hidden_pitch, hidden_values + i * value_pitch, hidden);
      }
#pragma omp for
      for (long panel = 0; panel < panels2; panel++)
        for (long b = 0; b < in.batch; b++)
          multiply_rows<Kind>(conv_rows(hidden_rows + b * out_length * hidden_pitch, hidden_pitch, 1, 1, 1, hidden),
                              out_length, w2.packed, panel, panel + 1, w2.outputs, final_output(b, 0));
    }
    return;
  }
  long chunk = rows_per_chunk(out_length, (pitch + hidden_pitch) * sizeof(T), threads),
       chunks = ceil_div(out_length, chunk);
#pragma omp parallel num_threads(threads)
  {
    T* scratch =
        thread_scratch.take<T>((chunk + receptive_field) * pitch + (Kind::QUANTIZED ? chunk * hidden_pitch : 0));
    Value* hidden_values = hidden_scratch.take<Value>(chunk * value_pitch);
    T* hidden_rows = Kind::QUANTIZED ? scratch + (chunk + receptive_field) * pitch : (T*)hidden_values;
    memset((void*)hidden_values, 0, chunk * value_pitch * sizeof(Value));
#pragma omp for schedule(dynamic)
    for (long i = 0; i < in.batch * chunks; i++) {
      long b = i / chunks, m = i % chunks * chunk, count = min(chunk, out_length - m);
      fill_rows(scratch, pitch, padded, in, b, m - in.left, m - in.left + count - 1 + receptive_field, ELU);
      multiply_rows<Kind>(conv_rows(scratch, pitch, 1, dilation, w1.taps, padded), count, w1.packed, 0, panels1,
                          w1.outputs, hidden_output(hidden_values));
      if constexpr (Kind::QUANTIZED)
        for (long r = 0; r < count; r++)
          quantize_to_digits(hidden_rows + r * hidden_pitch, hidden_values + r * value_pitch, hidden);
      multiply_rows<Kind>(conv_rows(hidden_rows, hidden_pitch, 1, 1, 1, hidden), count, w2.packed, 0, panels2,
                          w2.outputs, final_output(b, m));
    }
  }
}

}  // namespace
