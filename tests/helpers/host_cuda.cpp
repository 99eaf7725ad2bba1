// neurons/cupy/si_lif/kernel.cu on the CPU: its kernels use neither barriers nor shared memory, so running their
// threads one after the other is running them. Compiled and driven by tests/helpers/host_kernel.py.
#include <cmath>
#include <cstring>

#define DEV inline
#define __global__
#define __launch_bounds__(...)
#define __restrict__

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx, gridDim;

// Compiled with -ffp-contract=off; x86 rounds fp32 as the PTX instructions do.
DEV float add(float a, float b) { return a + b; }
DEV float sub(float a, float b) { return a - b; }
DEV float mul(float a, float b) { return a * b; }
DEV float div(float a, float b) { return a / b; }
DEV unsigned bits_of(float f) {
  unsigned b;
  std::memcpy(&b, &f, 4);
  return b;
}
DEV float float_of(unsigned b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
DEV float half_to_float(unsigned short b) {
  const int exponent = b >> 10 & 31, fraction = b & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp((float)fraction, -24)
                                          : std::ldexp((float)(1024 + fraction), exponent - 25);
  return b >> 15 ? -magnitude : magnitude;
}
DEV unsigned short float_to_half(float f) {
  const unsigned short sign = bits_of(f) >> 16 & 0x8000;
  const float magnitude = std::fabs(f);
  if (f != f) return 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent-1), 2^exponent)
  if (exponent < -13 || magnitude == 0.0f) exponent = -13;  // the steps of subnormals are 2^-24
  const float steps = std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // of 2^(exponent-11)
  // A carry out of the fraction runs into the exponent, as it should.
  return sign | (unsigned short)((exponent + 13) * 1024 + (int)steps);
}

#define ALL_KERNELS  // the one asked for and all others
#include "kernel.cu"

extern "C" void run_forward(int family, int grid, int block, FORWARD_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      (family == 0 ? forward_single : family == 1 ? forward_wide : forward_tall)(
          x, v0, spike, v_out, v_seq, mask, T, N, beta, v_th, max_count, window, aligned);
}

extern "C" void run_backward(int family, int grid, int block, BACKWARD_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      (family == 0 ? backward_single : family == 1 ? backward_wide : backward_tall)(
          grad_spike, grad_v, grad_v_seq, mask, grad_x, grad_v0, T, N, beta, v_th, alpha, detach_reset, aligned);
}

extern "C" void run_forward_compensated(int grid, int block, FORWARD_COMPENSATED_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      forward_compensated(x, spike, mixed, T, N, max_count, lam, aligned);
}

extern "C" void run_backward_compensated(int grid, int block, BACKWARD_COMPENSATED_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      backward_compensated(x, grad_spike, grad_mixed, grad_x, T, N, max_count, window, alpha, lam, aligned);
}
