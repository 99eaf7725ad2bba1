// Compensated: spikes of fresh neurons at unit threshold, and a smooth path mixed into them.
// Equations: neurons/compensation.py. No mask is kept: the slope of f needs u, which is there anyway, and
// with u goes the window. Only the spikes are exact to the bit; the smooth path is fp32, rounded once.
#if defined(ONLY_forward_compensated) || defined(ONLY_backward_compensated) || defined(ALL_KERNELS)
enum { BLEND, GRADIENT, REPLACE };
enum { TANH, SCALED_TANH, CLIP, IDENTITY };

DEV float smooth(float u, float d) {
  if (SMOOTH == TANH) return d * tanhf(u);
  if (SMOOTH == SCALED_TANH) return d * tanhf(u / d);
  if (SMOOTH == CLIP) return u > d ? d : u < -d ? -d : u;         // NaN stays NaN
  return u;
}

DEV float smooth_slope(float u, float d) {
  if (SMOOTH == CLIP) return inside(u, d) ? 1.0f : 0.0f;
  if (SMOOTH == IDENTITY) return 1.0f;
  const float t = tanhf(SMOOTH == TANH ? u : u / d);
  return (SMOOTH == TANH ? d : 1.0f) * (1.0f - t * t);
}

#define FORWARD_COMPENSATED_PARAMETERS                                                                        \
  const X::Bits *__restrict__ x, S::Bits *__restrict__ spike, S::Bits *__restrict__ mixed, int T, i64 N,      \
      float max_count, float lam, int aligned
#define BACKWARD_COMPENSATED_PARAMETERS                                                                       \
  const X::Bits *__restrict__ x, const S::Bits *__restrict__ grad_spike,                                      \
      const S::Bits *__restrict__ grad_mixed, X::Bits *__restrict__ grad_x, int T, i64 N, float max_count,    \
      float window, float alpha, float lam, int aligned

template <bool FULL>
DEV void forward_compensated_row(FORWARD_COMPENSATED_PARAMETERS) {
  const Place at(N);
  Vec<X> in[GROUPS];
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) load<X, FULL>(in[g], x + at.n[g], at.count[g]);
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    float s[VEC], a[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float u = in[g].get(j);
      s[j] = spike_count(u, max_count);
      a[j] = MODE == BLEND ? s[j] + lam * (smooth(u, max_count) - s[j]) : s[j];
    }
    store<S, FULL>(spike + at.n[g], s, at.count[g]);
    store<S, FULL>(mixed + at.n[g], a, at.count[g]);
  }
}

template <bool FULL>
DEV void backward_compensated_row(BACKWARD_COMPENSATED_PARAMETERS) {
  const Place at(N);
  Vec<X> in[GROUPS];
  Vec<S> gm[GROUPS], gs[GROUPS];
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    load<X, FULL>(in[g], x + at.n[g], at.count[g]);
    load<S, FULL>(gm[g], grad_mixed + at.n[g], at.count[g]);
    if (GRAD_SPIKE) load<S, FULL>(gs[g], grad_spike + at.n[g], at.count[g]);
  }
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    float gu[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float u = in[g].get(j), slope = inside(u, window) ? alpha : 0.0f;
      const float kept = MODE == GRADIENT ? slope : (1.0f - lam) * slope;
      gu[j] = gm[g].get(j) * (kept + lam * smooth_slope(u, max_count));
      if (GRAD_SPIKE) gu[j] += gs[g].get(j) * slope;
    }
    store<X, FULL>(grad_x + at.n[g], gu, at.count[g]);
  }
}
#endif

#if defined(ONLY_forward_compensated) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) forward_compensated(FORWARD_COMPENSATED_PARAMETERS) {
  if (block_is_full(N, aligned)) forward_compensated_row<true>(x, spike, mixed, T, N, max_count, lam, aligned);
  else forward_compensated_row<false>(x, spike, mixed, T, N, max_count, lam, aligned);
}
#endif

#if defined(ONLY_backward_compensated) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) backward_compensated(BACKWARD_COMPENSATED_PARAMETERS) {
  if (block_is_full(N, aligned))
    backward_compensated_row<true>(x, grad_spike, grad_mixed, grad_x, T, N, max_count, window, alpha, lam, aligned);
  else
    backward_compensated_row<false>(x, grad_spike, grad_mixed, grad_x, T, N, max_count, window, alpha, lam, aligned);
}
#endif
