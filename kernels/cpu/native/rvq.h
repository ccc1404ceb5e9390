// rvq_encode: residual vector quantization, level by level. code = argmin |c|^2 - 2 r . c over the entries c, in fp32.
// If the distances of the two nearest entries differ by no more than fp32 rounding could explain, they are compared
// again by their squared differences in fp64; the lower index wins a tie.
//
// rvq_decode: the sum over levels of the chosen entries.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "conv.h"

namespace {

// The two nearest entries so far
struct Best {
  float distance[2];
  int32_t index[2];
};

// Distances closer than this, relative to |c|^2 + |distance|, are compared again in fp64: well above the rounding error
// of fp32 for any usual dimension
constexpr float NEAR = 1e-4f;

thread_local Arena best_scratch, residual_scratch;

INLINE void update_best(Best& best, float distance, int32_t index) {
  if (distance < best.distance[0]) {
    best.distance[1] = best.distance[0], best.index[1] = best.index[0];
    best.distance[0] = distance, best.index[0] = index;
  } else if (distance < best.distance[1]) {
    best.distance[1] = distance, best.index[1] = index;
  }
}

// Updates `best` of ROWS residuals with the entries of panels [first, last)
template <int ROWS>
__attribute__((noinline)) void search_panels(const float* residual, long dim, const float* packed, const float* norms,
                                             long first, long last, Best* best) {
  for (long panel = first; panel < last; panel++) {
    Rows<float> rows = {residual, dim, 0, 1, dim};
    vf sum[ROWS][2];
    multiply<Full, ROWS>(rows, packed + panel * dim * P, sum);
    for (int r = 0; r < ROWS; r++)
      for (int half = 0; half < 2; half++) {
        long n = panel * P + half * W;
        vf distance = load(norms + n) - 2.0f * sum[r][half];
        if (!any_lane(distance < best[r].distance[1])) continue;
        float lanes[W];
        store(lanes, distance);
        for (int i = 0; i < W; i++) update_best(best[r], lanes[i], (int32_t)(n + i));
      }
  }
}

// The two nearest entries of panels [first, last) to each residual [rows, dim]
void search_rows(const float* residual, long rows, long dim, const float* packed, const float* norms, long first,
                 long last, Best* best) {
  for (long m = 0; m < rows; m++) best[m] = {{INFINITY, INFINITY}, {0, 0}};
  for_each_tile<R>(rows, [&](auto count, long m) {
    search_panels<count.value>(residual + m * dim, dim, packed, norms, first, last, best + m);
  });
}

double squared_distance(const float* a, const float* b, long dim) {
  double sum = 0;
  for (long d = 0; d < dim; d++) sum += ((double)a[d] - b[d]) * ((double)a[d] - b[d]);
  return sum;
}

// Chooses the nearer of the two candidates, subtracts it from the residual and returns its index
int64_t choose_entry(float* residual, const Best& best, const float* codebook, const float* norms, long dim) {
  int32_t index = best.index[0], other = best.index[1];
  float gap = best.distance[1] - best.distance[0];
  if (gap <= NEAR * (norms[index] + fabsf(best.distance[0]))) {
    double first_distance = squared_distance(residual, codebook + index * dim, dim);
    double second_distance = squared_distance(residual, codebook + other * dim, dim);
    if (second_distance < first_distance || (second_distance == first_distance && other < index)) index = other;
  }
  for (long d = 0; d < dim; d++) residual[d] -= codebook[index * dim + d];
  return index;
}

// x [N, D] -> codes [L, N]. Codebooks are given as they are, [L, S, D], and packed like weights, [L, S / P, D, P];
// `norms` [L, S] holds |c|^2, and infinity for the entries that fill up the last panel.
template <class T>
void encode_rows(const T* x, long x_step, long rows, long dim, long levels, long size, const float* codebooks,
                 const float* packed, const float* norms, int64_t* codes, int threads) {
  long panels = ceil_div(size, P);
  bool share_rows = rows >= 8 * threads;
  long chunk = share_rows ? round_up(min(64, ceil_div(rows, threads)), R) : rows;
  Best* shared = best_scratch.take<Best>(threads * max(chunk, 1));
  float* residuals = residual_scratch.take<float>(threads * chunk * dim);
#pragma omp parallel num_threads(threads)
  {
    int thread = 0, team = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num(), team = omp_get_num_threads();
#endif
    float* residual = residuals + thread * chunk * dim;
    Best* best = shared + thread * chunk;
    auto take = [&](long m, long count) {
      for (long i = 0; i < count; i++)
        for (long d = 0; d < dim; d++) residual[i * dim + d] = to_float(x[(m + i) * x_step + d]);
    };
    if (share_rows) {
#pragma omp for schedule(dynamic)
      for (long m = 0; m < rows; m += chunk) {
        long count = min(chunk, rows - m);
        take(m, count);
        for (long level = 0; level < levels; level++) {
          const float* norm = norms + level * panels * P;
          search_rows(residual, count, dim, packed + level * panels * P * dim, norm, 0, panels, best);
          for (long i = 0; i < count; i++)
            codes[level * rows + m + i] =
                choose_entry(residual + i * dim, best[i], codebooks + level * size * dim, norm, dim);
        }
      }
    } else {  // few rows: threads divide the entries among them, and each keeps a copy of all residuals
      take(0, rows);
      for (long level = 0; level < levels; level++) {
        const float* norm = norms + level * panels * P;
        search_rows(residual, rows, dim, packed + level * panels * P * dim, norm, panels * thread / team,
                    panels * (thread + 1) / team, best);
#pragma omp barrier
        for (long i = 0; i < rows; i++) {
          Best merged = {{INFINITY, INFINITY}, {0, 0}};
          for (int t = 0; t < team; t++)
            for (int rank = 0; rank < 2; rank++)
              if (shared[t * chunk + i].distance[rank] < INFINITY)
                update_best(merged, shared[t * chunk + i].distance[rank], shared[t * chunk + i].index[rank]);
          int64_t code = choose_entry(residual + i * dim, merged, codebooks + level * size * dim, norm, dim);
          if (thread == 0) codes[level * rows + i] = code;
        }
#pragma omp barrier
      }
    }
  }
}

constexpr int SUMS = VECTOR_REGISTERS == 32 ? 16 : 8;  // accumulators of rvq_decode, in vectors

// codes [L, N] with the given steps, codebooks [L, S, D] -> y [N, D]; levels are added in order. The entries of the next
// row are prefetched: the codebooks of many levels are larger than the caches, and the processor cannot foresee entries.
template <class T>
void decode_rows(const int64_t* codes, long level_step, long row_step, const float* codebooks, long levels, long rows,
                 long size, long dim, T* y, int threads) {
#pragma omp parallel for num_threads(rows* dim < 4096 ? 1 : threads)
  for (long m = 0; m < rows; m++) {
    const int64_t *code = codes + m * row_step, *following = m + 1 < rows ? code + row_step : code;
    for (long d = 0; d < dim; d += SUMS * W) {
      if (dim - d >= SUMS * W) {
        vf sum[SUMS] = {};
        for (long level = 0; level < levels; level++) {
          const float* entry = codebooks + (level * size + code[level * level_step]) * dim + d;
          const float* next = codebooks + (level * size + following[level * level_step]) * dim + d;
#pragma GCC unroll 16
          for (int i = 0; i < SUMS; i++) __builtin_prefetch(next + i * W), sum[i] += load(entry + i * W);
        }
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) store(y + m * dim + d + i * W, sum[i]);
        continue;
      }
      for (long e = d; e < dim; e += W) {
        vf sum = (vf){};
        for (long level = 0; level < levels; level++)
          sum += load_up_to(codebooks + (level * size + code[level * level_step]) * dim + e, dim - e);
        store_up_to(y + m * dim + e, sum, dim - e);
      }
    }
  }
}

}  // namespace
