// Tall kernels: few neurons, many steps. One neuron a thread; TALL_RING loads are always in flight.

#if defined(ONLY_forward_tall) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(TALL_BLOCK) forward_tall(FORWARD_PARAMETERS) {
  const i64 n = (i64)blockIdx.x * TALL_BLOCK + threadIdx.x;
  if (n >= N) return;
  // Pointers walk down their columns: an addition a step, where an index would cost a multiplication.
  const X::Bits* ahead = x + n;
  S::Bits* out = spike + n;
  float* seq = v_seq + n;
  unsigned char* byte = mask + n;
  X::Bits ring[TALL_RING];
  float v = v0 ? v0[n] : -0.0f;
#pragma unroll
  for (int k = 0; k < TALL_RING; ++k, ahead += N)
    if (k < T) ring[k] = *ahead;

  // `left` steps are to be done. `guarded` is a constant at both calls, so that the long run tests nothing;
  // the guards select, since 32 branches out of one chunk take seconds to compile.
  auto chunk = [&](const int left, const bool guarded) {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < TALL_RING; ++k) {
      const bool real = !guarded || k < left;
      const float h = charge(v, X::decode(ring[k]), beta);
      if (!guarded || k + TALL_RING < left) ring[k] = *ahead;
      ahead += N;
      const float u = normalise(h, v_th);
      const float s = spike_count(u, max_count);
      bits |= real ? inside(u, window) << k % 8 : 0;
      v = real ? reset(h, s, v_th) : v;
      if (real) *out = S::encode(s);
      out += N;
      if (V_SEQ) {
        if (real) *seq = v;
        seq += N;
      }
      if (k % 8 == 7) {
        if (mask && (!guarded || k - 7 < left)) *byte = (unsigned char)bits;
        byte += N;
        bits = 0;
      }
    }
  };
  int left = T;
#pragma unroll 1
  for (; left >= 2 * TALL_RING; left -= TALL_RING) chunk(left, false);
#pragma unroll 1
  for (; left > 0; left -= TALL_RING) chunk(left, true);
  if (v_out) v_out[n] = v;
}
#endif

#if defined(ONLY_backward_tall) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(TALL_BLOCK) backward_tall(BACKWARD_PARAMETERS) {
  const i64 n = (i64)blockIdx.x * TALL_BLOCK + threadIdx.x;
  if (n >= N) return;
  const int ragged = (T - 1) % TALL_RING + 1;                     // steps of the last chunk; the others are whole
  const i64 end = T - ragged + TALL_RING - 1;                     // as if the last chunk were whole too
  const S::Bits* ahead = grad_spike + end * N + n;
  const float* seq = grad_v_seq + end * N + n;
  const unsigned char* byte = mask + end / 8 * N + n;
  X::Bits* out = grad_x + end * N + n;
  S::Bits ring[TALL_RING];
  unsigned bits[TALL_RING / 8];
  float gv = grad_v ? grad_v[n] : 0.0f;
#pragma unroll
  for (int k = TALL_RING - 1; k >= 0; --k, ahead -= N) {
    ring[k] = 0;
    if (GRAD_SPIKE && k < ragged) ring[k] = *ahead;
    if (k % 8 == 0) {
      bits[k / 8] = 0;
      if (k < ragged) bits[k / 8] = *byte;
      byte -= N;
    }
  }

  // The first `steps` of a chunk exist; `more`: another chunk follows, load it.
  auto chunk = [&](const int steps, const bool more) {
#pragma unroll
    for (int k = TALL_RING - 1; k >= 0; --k) {
      const bool real = k < steps;
      const float slope = bits[k / 8] >> k % 8 & 1u ? alpha : 0.0f;
      const float gs = S::decode(ring[k]);
      if (GRAD_SPIKE && more) ring[k] = *ahead;
      ahead -= N;
      if (k % 8 == 0) {
        if (more) bits[k / 8] = *byte;
        byte -= N;
      }
      if (V_SEQ) {
        if (real) gv = add(gv, *seq);
        seq -= N;
      }
      const float gh = grad_charge(gs, gv, slope, v_th, detach_reset);
      if (real) *out = X::encode(gh);
      out -= N;
      gv = real ? mul(beta, gh) : gv;
    }
  };
  int left = T - ragged;
  chunk(ragged, left > 0);
#pragma unroll 1
  for (; left > 0; left -= TALL_RING) chunk(TALL_RING, left > TALL_RING);
  if (grad_v0) grad_v0[n] = gv;
}
#endif
