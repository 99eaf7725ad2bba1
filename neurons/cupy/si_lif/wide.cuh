// Wide kernels: 8 neurons a thread, all of their steps in a row.

template <int RING, bool FULL>
DEV void forward_rows(FORWARD_PARAMETERS) {
  const Place at(N);
  Vec<X> ring[RING][GROUPS];                                      // inputs of the next RING steps
  float v[8];
#pragma unroll
  for (int k = 0; k < RING; ++k)
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      if (k < T) load<X, FULL>(ring[k][g], x + k * N + at.n[g], at.count[g]);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = -0.0f;                       // beta * -0 + x is x, its sign included
  if (v0) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) load_floats<FULL>(v + g * VEC, v0 + at.n[g], at.count[g]);
  }
#pragma unroll 1
  for (int t0 = 0; t0 < T; t0 += RING) {
#pragma unroll
    for (int k = 0; k < RING; ++k) {
      const int t = t0 + k;
      if (t >= T) break;
      unsigned bits = 0;
      float h[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) h[i] = charge(v[i], ring[k][i / VEC].get(i % VEC), beta);
      if (t + RING < T) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) load<X, FULL>(ring[k][g], x + (t + RING) * N + at.n[g], at.count[g]);
      }
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        float s[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const int i = g * VEC + j;
          const float u = normalise(h[i], v_th);
          s[j] = spike_count(u, max_count);
          bits |= inside(u, window) << i;
          v[i] = reset(h[i], s[j], v_th);
        }
        store<S, FULL>(spike + t * N + at.n[g], s, at.count[g]);
        if (V_SEQ) store_floats<FULL>(v_seq + t * N + at.n[g], v + g * VEC, at.count[g]);
      }
      if (mask) mask[t * at.bytes + at.byte] = (unsigned char)bits;
    }
  }
  if (v_out) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) store_floats<FULL>(v_out + at.n[g], v + g * VEC, at.count[g]);
  }
}

template <int RING, bool FULL>
DEV void backward_rows(BACKWARD_PARAMETERS) {
  const Place at(N);
  Vec<S> ring[RING][GROUPS];                                      // gradients of the next RING steps, backwards
  unsigned bits[RING] = {};
  float gv[8];
#pragma unroll
  for (int k = 0; k < RING; ++k) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      load<S, false>(ring[k][g], nullptr, 0);                     // zeros, for an absent grad_spike
      if (GRAD_SPIKE && k < T) load<S, FULL>(ring[k][g], grad_spike + (T - 1 - k) * N + at.n[g], at.count[g]);
    }
    if (k < T) bits[k] = mask[(T - 1 - k) * at.bytes + at.byte];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) gv[i] = 0.0f;
  if (grad_v) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) load_floats<FULL>(gv + g * VEC, grad_v + at.n[g], at.count[g]);
  }
#pragma unroll 1
  for (int j0 = 0; j0 < T; j0 += RING) {
#pragma unroll
    for (int k = 0; k < RING; ++k) {
      const int t = T - 1 - (j0 + k);
      if (t < 0) break;
      const unsigned now = bits[k];
      float gs[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) gs[i] = ring[k][i / VEC].get(i % VEC);
      if (t >= RING) {
        bits[k] = mask[(t - RING) * at.bytes + at.byte];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
          if (GRAD_SPIKE) load<S, FULL>(ring[k][g], grad_spike + (t - RING) * N + at.n[g], at.count[g]);
      }
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (V_SEQ) {
          float more[VEC];
          load_floats<FULL>(more, grad_v_seq + t * N + at.n[g], at.count[g]);
#pragma unroll
          for (int j = 0; j < VEC; ++j) gv[g * VEC + j] = add(gv[g * VEC + j], more[j]);
        }
        float gh[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const int i = g * VEC + j;
          gh[j] = grad_charge(gs[i], gv[i], now >> i & 1u ? alpha : 0.0f, v_th, detach_reset);
          gv[i] = mul(beta, gh[j]);
        }
        store<X, FULL>(grad_x + t * N + at.n[g], gh, at.count[g]);
      }
    }
  }
  if (grad_v0) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) store_floats<FULL>(grad_v0 + at.n[g], gv + g * VEC, at.count[g]);
  }
}

// ---- Entry points of the wide family. ----
#define FORWARD_ROWS(ring, full, steps)                                                                       \
  forward_rows<ring, full>(x, v0, spike, v_out, v_seq, mask, steps, N, beta, v_th, max_count, window, aligned)
#define BACKWARD_ROWS(ring, full, steps)                                                                      \
  backward_rows<ring, full>(grad_spike, grad_v, grad_v_seq, mask, grad_x, grad_v0, steps, N, beta, v_th,      \
                            alpha, detach_reset, aligned)

#if defined(ONLY_forward_single) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) forward_single(FORWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) FORWARD_ROWS(1, true, 1);
  else FORWARD_ROWS(1, false, 1);
}
#endif

#if defined(ONLY_forward_wide) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) forward_wide(FORWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) FORWARD_ROWS(WIDE_RING, true, T);
  else FORWARD_ROWS(1, false, T);
}
#endif

#if defined(ONLY_backward_single) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) backward_single(BACKWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) BACKWARD_ROWS(1, true, 1);
  else BACKWARD_ROWS(1, false, 1);
}
#endif

#if defined(ONLY_backward_wide) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) backward_wide(BACKWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) BACKWARD_ROWS(WIDE_RING, true, T);
  else BACKWARD_ROWS(1, false, T);
}
#endif
