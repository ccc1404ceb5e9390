// transformer_layer: a whole pre-norm layer in one parallel region,
//
//   x + scale1 * o( attention( q, k, v of norm1(x) ) ),    then    + scale2 * fc2( act( fc1( norm2(.) ) ) )
//
// Threads divide the weight panels of each product among them: a step of a stream is limited by the memory bandwidth of
// reading the weights, and in this way each weight is read once. q, k and v are computed as one product with their
// concatenated weights.
#pragma once
#include "attention.h"
#include "conv.h"

namespace {

MIRRORED(struct, Linear, {
  const void* packed;
  const float *bias, *dequantize, *scale;  // each may be null
  long outputs;
});

MIRRORED(struct, Layer, {
  const void* x;  // [B * T, C] contiguous
  void* y;
  int dtype;
  long rows, channels, hidden;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  float epsilon;
  bool rms;  // RMSNorm instead of LayerNorm
  int activation;
  Linear qkv, out, fc1, fc2;
  Attention attention;  // q, k, v, y and their steps are set by run_layer
});

thread_local Arena layer_scratch, angle_scratch;

// LayerNorm or RMSNorm of one row, converted to the input type of the product that follows
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
      store_partial(lanes, d, channels - c);
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
  typedef typename Kind::Value Value;
  constexpr int VALUE_DTYPE = sizeof(Value) == 4 ? F32 : BF16;
  constexpr int EXTERNAL_DTYPE = sizeof(From) == 4 ? F32 : BF16;
  Attention a = l.attention;
  long attention_width = a.heads * a.dim, kv_width = a.kv_heads * a.dim, qkv_width = attention_width + 2 * kv_width;
  auto pitch = [](long width) { return pitch_of(Kind::row_elements(round_up(width, Kind::GROUP)), 1, sizeof(T)); };
  long normalized_pitch = pitch(l.channels), hidden_pitch = pitch(l.hidden);
  long hidden_width = round_up(l.hidden, Kind::GROUP), value_pitch = Kind::QUANTIZED ? hidden_width : hidden_pitch;

  // One allocation for, per row: normalized input; q, k, v; the attention output, also as input of the next product;
  // the residual stream between attention and MLP; the hidden layer of the MLP and, for Digits, its quantized copy.
  size_t normalized_bytes = round_up(l.rows * normalized_pitch * sizeof(T), 64),
         qkv_bytes = round_up(l.rows * qkv_width * sizeof(From), 64);
  size_t attended_bytes = round_up(l.rows * attention_width * sizeof(From), 64),
         residual_stream_bytes = round_up(l.rows * l.channels * 4, 64);
  size_t hidden_bytes = round_up(l.rows * value_pitch * sizeof(Value), 64);
  size_t digits_bytes = Kind::QUANTIZED ? round_up(l.rows * hidden_pitch, 64) : 0;
  size_t attended_row_bytes = round_up(l.rows * pitch(attention_width) * sizeof(T), 64);
  char* memory = layer_scratch.take<char>(normalized_bytes + qkv_bytes + attended_bytes + attended_row_bytes +
                                          residual_stream_bytes + hidden_bytes + digits_bytes);
  T* normalized = (T*)memory;
  From* qkv = (From*)(memory += normalized_bytes);
  From* attended = (From*)(memory += qkv_bytes);
  T* attended_rows = (T*)(memory += attended_bytes);
  float* residual_stream = (float*)(memory += attended_row_bytes);
  Value* hidden = (Value*)(memory += residual_stream_bytes);
  T* hidden_rows = Kind::QUANTIZED ? (T*)(memory + hidden_bytes) : (T*)hidden;
  float* angles = angle_scratch.take<float>((a.offset ? a.batch : 1) * a.length * a.dim);

  a.q = qkv, a.k = qkv + attention_width, a.v = qkv + attention_width + kv_width, a.y = attended;
  a.q_step = a.k_step = a.v_step = qkv_width;
  a.q_batch = a.k_batch = a.v_batch = a.length * qkv_width;
  a.q_head = a.k_head = a.v_head = a.dim;

  auto product = [&](const T* rows, long row_pitch, long depth, const Linear& linear, void* y, int dtype, long row,
                     int post, const void* residual, int residual_dtype) {
    Output out;
    out.y = y, out.dtype = dtype, out.row_step = row, out.bias = linear.bias, out.dequantize = linear.dequantize;
    out.post = post, out.scale = linear.scale, out.residual = residual, out.residual_dtype = residual_dtype;
    out.residual_row_step = l.channels;
    Rows<T> in = {rows, row_pitch, 0, 1, round_up(depth, Kind::GROUP)};
#pragma omp for schedule(dynamic)
    for (long panel = 0; panel < ceil_div(linear.outputs, P); panel++)
      multiply_rows<Kind>(in, l.rows, linear.packed, panel, panel + 1, linear.outputs, out);
  };

  // Calls write(row), which writes `channels` values, and stores them as row m of `rows`, quantized if need be
  auto write_row = [](T* rows, long row_pitch, long m, long channels, auto write) {
    if constexpr (Kind::QUANTIZED) {
      float* row = value_scratch.take<float>(channels);
      write(row);
      quantize_to_digits(rows + m * row_pitch, row, channels);
    } else {
      write(rows + m * row_pitch);
    }
  };
  long channels = round_up(l.channels, Kind::GROUP), attention_channels = round_up(attention_width, Kind::GROUP);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for nowait
    for (long t = 0; t < (a.offset ? a.batch : 1) * a.length; t++) fill_angles(angles, a, t);
#pragma omp for
    for (long m = 0; m < l.rows; m++)
      write_row(normalized, normalized_pitch, m, channels, [&](Value* row) {
        normalize(row, (const From*)l.x + m * l.channels, l.channels, channels, l.norm1_weight, l.norm1_bias, l.epsilon,
                  l.rms);
      });
    product(normalized, normalized_pitch, l.channels, l.qkv, qkv, EXTERNAL_DTYPE, qkv_width, NONE, nullptr, F32);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < a.batch * a.kv_heads; i++) attend_head(a, i / a.kv_heads, i % a.kv_heads, angles);
#pragma omp for
    for (long m = 0; m < l.rows; m++)
      write_row(attended_rows, pitch(attention_width), m, attention_channels, [&](Value* row) {
        activate_row(row, attended + m * attention_width, attention_width, attention_channels, NONE);
      });
    product(attended_rows, pitch(attention_width), attention_width, l.out, residual_stream, F32, l.channels, NONE, l.x,
            EXTERNAL_DTYPE);
#pragma omp for
    for (long m = 0; m < l.rows; m++)
      write_row(normalized, normalized_pitch, m, channels, [&](Value* row) {
        normalize(row, residual_stream + m * l.channels, l.channels, channels, l.norm2_weight, l.norm2_bias, l.epsilon,
                  l.rms);
      });
    if (l.hidden % Kind::GROUP)
#pragma omp for
      for (long m = 0; m < l.rows; m++)
        for (long c = l.hidden; c < hidden_width; c++) hidden[m * value_pitch + c] = Value{};
    product(normalized, normalized_pitch, l.channels, l.fc1, hidden, VALUE_DTYPE, value_pitch, l.activation, nullptr,
            F32);
    if constexpr (Kind::QUANTIZED) {
#pragma omp for
      for (long m = 0; m < l.rows; m++)
        quantize_to_digits(hidden_rows + m * hidden_pitch, hidden + m * value_pitch, hidden_width);
    }
    product(hidden_rows, hidden_pitch, l.hidden, l.fc2, l.y, EXTERNAL_DTYPE, l.channels, NONE, residual_stream, F32);
  }
}

}  // namespace
