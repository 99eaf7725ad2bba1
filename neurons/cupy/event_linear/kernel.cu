// y[b, n] = sum over inputs k that fire of s[b, k] * W[k, n]   (neurons/functional.py: event_driven_linear)
// or, floats:  y[b, n] = sum * factor[n] + bias[n] + residual[b, n]
//
// Compiled by NVRTC with the options that ops.py composes: those of gather.cuh, and
//   OUT      INTEGERS: y is int32, and factor, bias and residual are absent. F32, F16 or BF16: y has that type and
//            residual too; bias and residual may be absent
//
// s is int8 [rows, K], y [rows, N]; rows is at most BATCH.
#include "arithmetic.cuh"
#include "threads.cuh"
#define FLOATS 0
#include "gather.cuh"

struct INTEGERS {
  typedef int Bits;
};

#define EVENT_LINEAR_PARAMETERS                                                                          \
  const i1 *s, const u1 *W, const u1 *scale, const float *factor, const float *bias,                     \
      const void *residual, void *y, i64 N, i64 row, int inputs, int rows

#if !INTEGER_OUT
DEV float finished(int sum, float factor, const float* bias, i64 n) {
  const float y = mul((float)sum, factor);
  return bias ? add(y, bias[n]) : y;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_DIMS event_linear(EVENT_LINEAR_PARAMETERS) {
  SHARED(Shared, shared);
  const Matrix m = {W, scale, N, row, inputs};
  const Thread t = thread_of(m);
  begin_sums(shared);
  wait_for_previous();
  Sum sum[BATCH][COLUMNS] = {};
  const float none[BATCH] = {};
#pragma unroll 1
  for (int k0 = first_run(t); k0 < inputs; k0 += RUN_STEP) {
    const int k = k0 + t.lane;
    int value[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) value[b] = b < rows && k < inputs ? s[(i64)b * inputs + k] : 0;
    gather_run(sum, shared, m, t, k0, value, none);
  }
  let_next_begin();
  keep_sums(shared, t, sum);
  add_up(shared, t);
#pragma unroll 1
  for (int i = threadIdx.x; i < BATCH * OWN; i += THREADS) {
    const int b = i / OWN;
    const i64 n = (i64)blockIdx.x * SLAB + t.rank * OWN + i % OWN;
    const int total = read_total(shared, b, i % OWN);
    if (n < N && b < rows) {
      OUT::Bits* to = reinterpret_cast<OUT::Bits*>(y) + b * N + n;
#if INTEGER_OUT
      *to = total;
#else
      float one = finished(total, factor[n], bias, n);
      if (residual) one = add(OUT::decode(reinterpret_cast<const OUT::Bits*>(residual)[b * N + n]), one);
      *to = OUT::encode(one);
#endif
    }
  }
}
