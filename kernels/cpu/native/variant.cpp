// The entry points. This file is compiled once for each instruction set, and VARIANT is the suffix of the entry points'
// names. What _native.py declares as well is MIRRORED (abi.h).
#include "rvq.h"
#include "transformer.h"

#define JOIN_(name, variant) name##_##variant
#define JOIN(name, variant) JOIN_(name, variant)
#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTRY(name) EXPORT void JOIN(name, VARIANT)

namespace {

MIRRORED(enum, Entry, {CONV, RESBLOCK, DEPTHWISE, ADVANCE, OVERLAP, ATTENTION, LAYER, RVQ_ENCODE, RVQ_DECODE});
constexpr long MAX_ARGUMENTS = 13;  // of an entry point

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

}  // namespace

// The mirrored declarations, followed by an empty row
EXPORT const Declaration* JOIN(declarations, VARIANT)() {
  static constexpr Declaration table[] = {Dtype_ABI,   PadMode_ABI, Activation_ABI, Kind_ABI,   Entry_ABI, Input_ABI,
                                          Weights_ABI, Output_ABI,  Attention_ABI,  Linear_ABI, Layer_ABI, {}};
  return table;
}

EXPORT int JOIN(outputs_per_panel, VARIANT)() { return P; }

ENTRY(conv)(const Input& in, const Weights& weights, const Output& out, int kind, long stride, long dilation, int pre,
            long out_length, long out_batch_step, long residual_batch_step, int threads) {
  with_kind(kind, [&](auto k) {
    run_conv<decltype(k)>(in, weights, out, stride, dilation, pre, out_length, out_batch_step, residual_batch_step,
                          threads);
  });
}

ENTRY(resblock)(const Input& in, const Weights& w1, const Weights& w2, const Output& out, int kind, long dilation,
                long out_length, long out_batch_step, long residual_batch_step, int threads) {
  with_kind(kind, [&](auto k) {
    run_resblock<decltype(k)>(in, w1, w2, out, dilation, out_length, out_batch_step, residual_batch_step, threads);
  });
}

ENTRY(depthwise)(const Input& in, const float* weight, const float* bias, const Output& out, long stride, long taps,
                 int pre, long rows, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long i = 0; i < in.batch * rows; i++)
    if (in.dtype == F32)
      depthwise_rows<float>(in, weight, bias, out, stride, taps, i / rows, i % rows, pre);
    else
      depthwise_rows<bf16>(in, weight, bias, out, stride, taps, i / rows, i % rows, pre);
}

ENTRY(advance)(const Input& in) {
  if (in.dtype == F32)
    advance_history<float>(in);
  else
    advance_history<bf16>(in);
}

ENTRY(overlap)(int dtype, void* y, float* tail, void* overlap, const bool* active, long batch, long samples,
               long tail_samples, long outputs, long length, long y_batch_step, long y_step, long overlap_step) {
  if (dtype == F32)
    overlap_add((float*)y, tail, (float*)overlap, active, batch, samples, tail_samples, outputs, length, y_batch_step,
                y_step, overlap_step);
  else
    overlap_add((bf16*)y, tail, (bf16*)overlap, active, batch, samples, tail_samples, outputs, length, y_batch_step,
                y_step, overlap_step);
}

ENTRY(attention)(const Attention& a, int threads) {
  long positions = (a.offset ? a.batch : 1) * a.length;
  float* angles = angle_scratch.take<float>(positions * a.dim);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (long t = 0; t < positions; t++) fill_angles(angles, a, t);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < a.batch * a.kv_heads; i++) attend_head(a, i / a.kv_heads, i % a.kv_heads, angles);
  }
}

ENTRY(layer)(const Layer& layer, int kind, int threads) {
  with_kind(kind, [&](auto k) {
    if (layer.dtype == F32)
      run_layer<decltype(k), float>(layer, threads);
    else
      run_layer<decltype(k), bf16>(layer, threads);
  });
}

ENTRY(rvq_encode)(const void* x, int dtype, long x_step, long rows, long dim, long levels, long size,
                  const float* codebooks, const float* packed, const float* norms, int64_t* codes, int threads) {
  if (dtype == F32)
    encode_rows((const float*)x, x_step, rows, dim, levels, size, codebooks, packed, norms, codes, threads);
  else
    encode_rows((const bf16*)x, x_step, rows, dim, levels, size, codebooks, packed, norms, codes, threads);
}

ENTRY(rvq_decode)(const int64_t* codes, long level_step, long row_step, const float* codebooks, long levels, long rows,
                  long size, long dim, void* y, int dtype, int threads) {
  if (dtype == F32)
    decode_rows(codes, level_step, row_step, codebooks, levels, rows, size, dim, (float*)y, threads);
  else
    decode_rows(codes, level_step, row_step, codebooks, levels, rows, size, dim, (bf16*)y, threads);
}

// A recorded program is an array of calls: `entry` is an `Entry`, `a` holds its arguments, each widened to
// 64 bits
struct Call {
  long entry, a[MAX_ARGUMENTS];
};

ENTRY(run)(const Call* calls, long count) {
  for (const Call* c = calls; c < calls + count; c++) {
    const long* a = c->a;
    switch (c->entry) {
      case CONV:
        JOIN(conv, VARIANT)(*(const Input*)a[0], *(const Weights*)a[1], *(const Output*)a[2], a[3], a[4], a[5], a[6],
                            a[7], a[8], a[9], a[10]);
        break;
      case RESBLOCK:
        JOIN(resblock, VARIANT)(*(const Input*)a[0], *(const Weights*)a[1], *(const Weights*)a[2], *(const Output*)a[3],
                                a[4], a[5], a[6], a[7], a[8], a[9]);
        break;
      case DEPTHWISE:
        JOIN(depthwise, VARIANT)(*(const Input*)a[0], (const float*)a[1], (const float*)a[2], *(const Output*)a[3],
                                 a[4], a[5], a[6], a[7], a[8]);
        break;
      case ADVANCE:
        JOIN(advance, VARIANT)(*(const Input*)a[0]);
        break;
      case OVERLAP:
        JOIN(overlap, VARIANT)(a[0], (void*)a[1], (float*)a[2], (void*)a[3], (const bool*)a[4], a[5], a[6], a[7], a[8],
                               a[9], a[10], a[11], a[12]);
        break;
      case ATTENTION:
        JOIN(attention, VARIANT)(*(const Attention*)a[0], a[1]);
        break;
      case LAYER:
        JOIN(layer, VARIANT)(*(const Layer*)a[0], a[1], a[2]);
        break;
      case RVQ_ENCODE:
        JOIN(rvq_encode, VARIANT)((const void*)a[0], a[1], a[2], a[3], a[4], a[5], a[6], (const float*)a[7],
                                  (const float*)a[8], (const float*)a[9], (int64_t*)a[10], a[11]);
        break;
      case RVQ_DECODE:
        JOIN(rvq_decode, VARIANT)((const int64_t*)a[0], a[1], a[2], (const float*)a[3], a[4], a[5], a[6], a[7],
                                  (void*)a[8], a[9], a[10]);
        break;
      default:
        abort();
    }
  }
}
