// transformer_layer: a whole pre-norm layer in one parallel region,
//
//   x + scale1 * o( attention( q, k, v of norm1(x) ) ),    then    + scale2 * fc2( act( fc1( norm2(.) ) ) )
//
// Threads share the panels of each product, so that a stream's step, which is bound by reading the weights, reads each
// once. q, k and v are one product: their weights are packed one behind another.
#pragma once
#include "attention.h"
#include "conv.h"

namespace {

struct Linear {
  const void* packed;
  const float *bias, *dequantize, *scale;  // each may be null
  long outputs;
};

struct Layer {
  const void* x;  // [B T, C] contiguous
  void* y;
  int dtype;
  long rows, channels, hidden;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  float epsilon;
  bool rms;  // RMSNorm in place of LayerNorm
  int activation;
  Linear qkv, out, fc1, fc2;
  Attention attention;  // its q, k, v and y are filled in here
};

thread_local Arena layer_scratch, angle_scratch;

// A row of LayerNorm, or of RMSNorm, in the type that the product takes
template <class T, class From>
void normalize(T* to, const From* x, long channels, long padded, const float* weight, const float* bias, float epsilon,
               bool rms) {
  vf sum = (vf){}, squares = (vf){};
  if (!rms)
    for (long c = 0; c < channels; c += W) sum += load_up_to(x + c, channels - c);
  float mean = sum_lanes(sum) / channels;
  for (long c = 0; c < channels; c += W) {
    vf d = load_up_to(x + c, channels - c) - mean;
    if (channels - c < W) {
      float lanes[W] = {};
      store_some(lanes, d, channels - c);
      d = load(lanes);
    }
    squares += d * d;
  }
  float inverse = 1.0f / sqrtf(sum_lanes(squares) / channels + epsilon);
  for (long c = 0; c < channels; c += W) {
    vf d = (load_up_to(x + c, channels - c) - mean) * inverse * load(weight + c);
    store_up_to(to + c, bias ? d + load(bias + c) : d, channels - c);
  }
  for (long c = channels; c < padded; c++) to[c] = T{};
}

template <class Kind, class From>
void run_layer(const Layer& l, int threads) {
  typedef typename Kind::Row T;
  typedef typename Kind::Plain Plain;
  constexpr int PLAIN = sizeof(Plain) == 4 ? F32 : BF16;
  constexpr int EXTERNAL = sizeof(From) == 4 ? F32 : BF16;
  Attention a = l.attention;
  long wide = a.heads * a.dim, narrow_width = a.kv_heads * a.dim, qkv_width = wide + 2 * narrow_width;
  auto pitch = [](long width) { return pitch_of(Kind::row_of(round_up(width, Kind::GROUP)), 1, sizeof(T)); };
  long normal_pitch = pitch(l.channels), hidden_pitch = pitch(l.hidden);
  long hidden_width = round_up(l.hidden, Kind::GROUP), plain_pitch = Kind::CUT ? hidden_width : hidden_pitch;

  // one piece of memory: [rows] of normalised input, q k v, attention's result, the sum between the halves, hidden
  size_t normal_bytes = round_up(l.rows * normal_pitch * sizeof(T), 64),
         qkv_bytes = round_up(l.rows * qkv_width * sizeof(From), 64);
  size_t attended_bytes = round_up(l.rows * wide * sizeof(From), 64),
         between_bytes = round_up(l.rows * l.channels * 4, 64);
  size_t hidden_bytes = round_up(l.rows * plain_pitch * sizeof(Plain), 64);
  size_t cut_bytes = Kind::CUT ? round_up(l.rows * hidden_pitch, 64) : 0;
  size_t attended_row_bytes = round_up(l.rows * pitch(wide) * sizeof(T), 64);
  char* memory = layer_scratch.take<char>(normal_bytes + qkv_bytes + attended_bytes + attended_row_bytes +
                                          between_bytes + hidden_bytes + cut_bytes);
  T* normal = (T*)memory;
  From* qkv = (From*)(memory += normal_bytes);
  From* attended = (From*)(memory += qkv_bytes);
  T* attended_rows = (T*)(memory += attended_bytes);
  float* between = (float*)(memory += attended_row_bytes);
  Plain* hidden = (Plain*)(memory += between_bytes);
  T* hidden_rows = Kind::CUT ? (T*)(memory + hidden_bytes) : (T*)hidden;
  float* angles = angle_scratch.take<float>((a.offset ? a.batch : 1) * a.length * a.dim);

  a.q = qkv, a.k = qkv + wide, a.v = qkv + wide + narrow_width, a.y = attended;
  a.q_step = a.k_step = a.v_step = qkv_width;
  a.q_batch = a.k_batch = a.v_batch = a.length * qkv_width;
  a.q_head = a.k_head = a.v_head = a.dim;

  auto product = [&](const T* rows, long row_pitch, long depth, const Linear& linear, void* y, int dtype, long row,
                     int post, const void* residual, int residual_dtype) {
    Output out;
    out.y = y, out.dtype = dtype, out.row = row, out.bias = linear.bias, out.dequantize = linear.dequantize;
    out.post = post, out.scale = linear.scale, out.residual = residual, out.residual_dtype = residual_dtype;
    out.residual_row = l.channels;
    Rows<T> in = {rows, row_pitch, 0, 1, round_up(depth, Kind::GROUP)};
#pragma omp for schedule(dynamic)
    for (long panel = 0; panel < ceil_div(linear.outputs, P); panel++)
      multiply_rows<Kind>(in, l.rows, linear.packed, panel, panel + 1, linear.outputs, out);
  };

  // `write(row)` writes a row of so many channels plainly; it becomes row m of rows
  auto whole_row = [](T* rows, long row_pitch, long m, long channels, auto write) {
    if constexpr (Kind::CUT) {
      float* row = plain_scratch.take<float>(channels);
      write(row);
      cut_into_digits(rows + m * row_pitch, row, channels);
    } else {
      write(rows + m * row_pitch);
    }
  };
  long channels = round_up(l.channels, Kind::GROUP), wide_channels = round_up(wide, Kind::GROUP);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for nowait
    for (long t = 0; t < (a.offset ? a.batch : 1) * a.length; t++) fill_angles(angles, a, t);
#pragma omp for
    for (long m = 0; m < l.rows; m++)
      whole_row(normal, normal_pitch, m, channels, [&](Plain* row) {
        normalize(row, (const From*)l.x + m * l.channels, l.channels, channels, l.norm1_weight, l.norm1_bias, l.epsilon,
                  l.rms);
      });
    product(normal, normal_pitch, l.channels, l.qkv, qkv, EXTERNAL, qkv_width, NONE, nullptr, F32);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < a.batch * a.kv_heads; i++) attend_head(a, i / a.kv_heads, i % a.kv_heads, angles);
#pragma omp for
    for (long m = 0; m < l.rows; m++)
      whole_row(attended_rows, pitch(wide), m, wide_channels,
                [&](Plain* row) { activate_row(row, attended + m * wide, wide, wide_channels, NONE); });
    product(attended_rows, pitch(wide), wide, l.out, between, F32, l.channels, NONE, l.x, EXTERNAL);
#pragma omp for
    for (long m = 0; m < l.rows; m++)
      whole_row(normal, normal_pitch, m, channels, [&](Plain* row) {
        normalize(row, between + m * l.channels, l.channels, channels, l.norm2_weight, l.norm2_bias, l.epsilon, l.rms);
      });
    if (l.hidden % Kind::GROUP)
#pragma omp for
      for (long m = 0; m < l.rows; m++)
        for (long c = l.hidden; c < hidden_width; c++) hidden[m * plain_pitch + c] = Plain{};
    product(normal, normal_pitch, l.channels, l.fc1, hidden, PLAIN, plain_pitch, l.activation, nullptr, F32);
    if constexpr (Kind::CUT) {
#pragma omp for
      for (long m = 0; m < l.rows; m++)
        cut_into_digits(hidden_rows + m * hidden_pitch, hidden + m * plain_pitch, hidden_width);
    }
    product(hidden_rows, hidden_pitch, l.hidden, l.fc2, l.y, EXTERNAL, l.channels, NONE, between, F32);
  }
}

}  // namespace
