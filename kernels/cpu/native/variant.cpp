// The entry points. This file is compiled once for each instruction set, and VARIANT is the suffix of the entry points'
// names. What _abi.py declares as well is MIRRORED (abi.h).
#include "rvq.h"
#include "transformer.h"

#define JOIN_(name, variant) name##_##variant
#define JOIN(name, variant) JOIN_(name, variant)
#define EXPORT extern "C" __attribute__((visibility("default")))
// An entry point takes the address of a structure, here of type `Call`
#define ENTRY(name, Call)                                                         \
  static void name(const Call& call);                                             \
  EXPORT void JOIN(name, VARIANT)(const void* call) { name(*(const Call*)call); } \
  static void name(const Call& call)

namespace {

MIRRORED(struct, ConvCall, {
  Input input;
  Weights weights;
  Output output;
  int kind;
  long stride, dilation;
  int pre;
  long out_length, out_batch_step, residual_batch_step;
  int threads;
});

MIRRORED(struct, ResblockCall, {
  Input input;
  Weights weights1, weights2;
  Output output;
  int kind;
  long dilation, out_length, out_batch_step, residual_batch_step;
  int threads;
});

MIRRORED(struct, DepthwiseCall, {
  Input input;
  const float *weight, *bias;
  void* y;
  long stride, taps;
  int pre;
  long rows;
  int threads;
});

MIRRORED(struct, AdvanceCall, { Input input; });

MIRRORED(struct, AttentionCall, {
  Attention attention;
  int threads;
});

MIRRORED(struct, LayerCall, {
  Layer layer;
  int kind, threads;
});

MIRRORED(struct, RvqEncodeCall, {
  const void* x;
  int dtype;
  long x_step, rows, dim, levels, size;
  const float *codebooks, *packed, *norms;
  int64_t* codes;
  int threads;
});

MIRRORED(struct, RvqDecodeCall, {
  const int64_t* codes;
  long level_step, row_step;
  const float* codebooks;
  long levels, rows, size, dim;
  void* y;
  int dtype, threads;
});

template <class Function>
void with_kind(int kind, Function function) {
  switch (kind) {
    case FULL:
      return function(Full{});
    case HALF:
      return function(Half{});
    case INT8:
      return function(Int8{});
#if defined(__AVX512BF16__)
    case PAIRS:
      return function(Pairs{});
    case DIGITS:
      return function(Digits{});
#endif
  }
  abort();
}

// Calls function(T{}), where T is the type of elements of this dtype
template <class Function>
void with_dtype(int dtype, Function function) {
  if (dtype == F32)
    function(float{});
  else
    function(bf16{});
}

}  // namespace

// The mirrored declarations, followed by an empty row
EXPORT const Declaration* JOIN(declarations, VARIANT)() {
  static constexpr Declaration table[] = {Dtype_ABI,         PadMode_ABI,       Activation_ABI,    Kind_ABI,
                                          Input_ABI,         Weights_ABI,       Output_ABI,        Attention_ABI,
                                          Linear_ABI,        Layer_ABI,         ConvCall_ABI,      ResblockCall_ABI,
                                          DepthwiseCall_ABI, AdvanceCall_ABI,   AttentionCall_ABI, LayerCall_ABI,
                                          RvqEncodeCall_ABI, RvqDecodeCall_ABI, {}};
  return table;
}

EXPORT int JOIN(outputs_per_panel, VARIANT)() { return P; }

ENTRY(conv, ConvCall) {
  with_kind(call.kind, [&](auto kind) {
    run_conv<decltype(kind)>(call.input, call.weights, call.output, call.stride, call.dilation, call.pre,
                             call.out_length, call.out_batch_step, call.residual_batch_step, call.threads);
  });
}

ENTRY(resblock, ResblockCall) {
  with_kind(call.kind, [&](auto kind) {
    run_resblock<decltype(kind)>(call.input, call.weights1, call.weights2, call.output, call.dilation, call.out_length,
                                 call.out_batch_step, call.residual_batch_step, call.threads);
  });
}

ENTRY(depthwise, DepthwiseCall) {
  with_dtype(call.input.dtype, [&](auto element) {
#pragma omp parallel for num_threads(call.threads)
    for (long i = 0; i < call.input.batch * call.rows; i++)
      depthwise_rows(call.input, call.weight, call.bias,
                     (decltype(element)*)call.y + i * call.stride * call.input.channels, call.stride, call.taps,
                     i / call.rows, i % call.rows, call.pre);
  });
}

ENTRY(advance, AdvanceCall) {
  with_dtype(call.input.dtype, [&](auto element) { advance_history<decltype(element)>(call.input); });
}

ENTRY(attention, AttentionCall) {
  const Attention& a = call.attention;
  long positions = (a.offset ? a.batch : 1) * a.length;
  float* angles = angle_scratch.take<float>(positions * a.dim);
#pragma omp parallel num_threads(call.threads)
  {
#pragma omp for
    for (long t = 0; t < positions; t++) fill_angles(angles, a, t);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < a.batch * a.kv_heads; i++) attend_head(a, i / a.kv_heads, i % a.kv_heads, angles);
  }
}

ENTRY(layer, LayerCall) {
  with_kind(call.kind, [&](auto kind) {
    with_dtype(call.layer.dtype,
               [&](auto element) { run_layer<decltype(kind), decltype(element)>(call.layer, call.threads); });
  });
}

ENTRY(rvq_encode, RvqEncodeCall) {
  with_dtype(call.dtype, [&](auto element) {
    encode_rows((const decltype(element)*)call.x, call.x_step, call.rows, call.dim, call.levels, call.size,
                call.codebooks, call.packed, call.norms, call.codes, call.threads);
  });
}

ENTRY(rvq_decode, RvqDecodeCall) {
  with_dtype(call.dtype, [&](auto element) {
    decode_rows(call.codes, call.level_step, call.row_step, call.codebooks, call.levels, call.rows, call.size, call.dim,
                (decltype(element)*)call.y, call.threads);
  });
}
