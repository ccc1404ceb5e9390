// What the Python side mirrors (_native.py): structures, enumerations and the order of the entry points. The table is
// compared with _native.py when the library is opened, so that a library of other sources is refused.
#pragma once
#include <cstddef>

#include "rvq.h"
#include "transformer.h"

namespace {

enum Kind { FULL = 0, HALF, INT8, PAIRS, DIGITS };
enum Entry { CONV = 0, RESBLOCK, DEPTHWISE, ADVANCE, OVERLAP, ATTENTION, LAYER, RVQ_ENCODE, RVQ_DECODE };
constexpr long MAX_ARGUMENTS = 13;  // of an entry point

struct AbiRow {
  const char* name;
  long value;
};
#define FIELD(structure, field) {#structure "." #field, offsetof(structure, field)}
#define SIZE(structure) {#structure, sizeof(structure)}
#define VALUE(name) {#name, name}
#define ENTRY_NUMBER(name) {"entry " #name, name}

constexpr AbiRow ABI[] = {
    SIZE(Input),
    FIELD(Input, x),
    FIELD(Input, dtype),
    FIELD(Input, batch),
    FIELD(Input, length),
    FIELD(Input, channels),
    FIELD(Input, batch_step),
    FIELD(Input, step),
    FIELD(Input, left),
    FIELD(Input, right),
    FIELD(Input, pad_mode),
    FIELD(Input, history),
    FIELD(Input, history_step),
    FIELD(Input, first),
    FIELD(Input, active),
    SIZE(Weights),
    FIELD(Weights, packed),
    FIELD(Weights, outputs),
    FIELD(Weights, taps),
    FIELD(Weights, bias),
    FIELD(Weights, dequantize),
    FIELD(Weights, bytes_per_weight),
    SIZE(Output),
    FIELD(Output, y),
    FIELD(Output, dtype),
    FIELD(Output, row_step),
    FIELD(Output, bias),
    FIELD(Output, post),
    FIELD(Output, scale),
    FIELD(Output, dequantize),
    FIELD(Output, residual),
    FIELD(Output, residual_dtype),
    FIELD(Output, residual_row_step),
    FIELD(Output, rows),
    FIELD(Output, tail),
    SIZE(Attention),
    FIELD(Attention, q),
    FIELD(Attention, k),
    FIELD(Attention, v),
    FIELD(Attention, y),
    FIELD(Attention, dtype),
    FIELD(Attention, batch),
    FIELD(Attention, heads),
    FIELD(Attention, kv_heads),
    FIELD(Attention, length),
    FIELD(Attention, dim),
    FIELD(Attention, q_batch),
    FIELD(Attention, q_head),
    FIELD(Attention, q_step),
    FIELD(Attention, k_batch),
    FIELD(Attention, k_head),
    FIELD(Attention, k_step),
    FIELD(Attention, v_batch),
    FIELD(Attention, v_head),
    FIELD(Attention, v_step),
    FIELD(Attention, inv_freq),
    FIELD(Attention, rope_scale),
    FIELD(Attention, interleaved),
    FIELD(Attention, window),
    FIELD(Attention, offset),
    FIELD(Attention, cache_k),
    FIELD(Attention, cache_v),
    FIELD(Attention, active),
    SIZE(Linear),
    FIELD(Linear, packed),
    FIELD(Linear, bias),
    FIELD(Linear, dequantize),
    FIELD(Linear, scale),
    FIELD(Linear, outputs),
    SIZE(Layer),
    FIELD(Layer, x),
    FIELD(Layer, y),
    FIELD(Layer, dtype),
    FIELD(Layer, rows),
    FIELD(Layer, channels),
    FIELD(Layer, hidden),
    FIELD(Layer, norm1_weight),
    FIELD(Layer, norm1_bias),
    FIELD(Layer, norm2_weight),
    FIELD(Layer, norm2_bias),
    FIELD(Layer, epsilon),
    FIELD(Layer, rms),
    FIELD(Layer, activation),
    FIELD(Layer, qkv),
    FIELD(Layer, out),
    FIELD(Layer, fc1),
    FIELD(Layer, fc2),
    FIELD(Layer, attention),
    VALUE(F32),
    VALUE(BF16),
    VALUE(CONSTANT),
    VALUE(REPLICATE),
    VALUE(REFLECT),
    VALUE(NONE),
    VALUE(ELU),
    VALUE(SILU),
    VALUE(GELU),
    VALUE(GELU_TANH),
    VALUE(RELU),
    VALUE(TANH),
    VALUE(FULL),
    VALUE(HALF),
    VALUE(INT8),
    VALUE(PAIRS),
    VALUE(DIGITS),
    VALUE(MAX_ARGUMENTS),
    ENTRY_NUMBER(CONV),
    ENTRY_NUMBER(RESBLOCK),
    ENTRY_NUMBER(DEPTHWISE),
    ENTRY_NUMBER(ADVANCE),
    ENTRY_NUMBER(OVERLAP),
    ENTRY_NUMBER(ATTENTION),
    ENTRY_NUMBER(LAYER),
    ENTRY_NUMBER(RVQ_ENCODE),
    ENTRY_NUMBER(RVQ_DECODE),
};

#undef FIELD
#undef SIZE
#undef VALUE
#undef ENTRY_NUMBER

}  // namespace
