// The primitives of neurons/cupy/arithmetic.cuh on the CPU. Compiled with -ffp-contract=off; x86 rounds fp32 as the
// PTX instructions do.
#pragma once
#include <math.h>
#include <string.h>

#define DEV inline
#define __global__
#define __launch_bounds__(...)
#define __restrict__

DEV float add(float a, float b) { return a + b; }
DEV float sub(float a, float b) { return a - b; }
DEV float mul(float a, float b) { return a * b; }
DEV float div(float a, float b) { return a / b; }
DEV unsigned bits_of(float f) {
  unsigned b;
  memcpy(&b, &f, 4);
  return b;
}
DEV float float_of(unsigned b) {
  float f;
  memcpy(&f, &b, 4);
  return f;
}
DEV float half_to_float(unsigned short b) {
  const int exponent = b >> 10 & 31, fraction = b & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? ldexp((float)fraction, -24)
                                          : ldexp((float)(1024 + fraction), exponent - 25);
  return b >> 15 ? -magnitude : magnitude;
}
DEV unsigned short float_to_half(float f) {
  const unsigned short sign = bits_of(f) >> 16 & 0x8000;
  const float magnitude = fabs(f);
  if (f != f) return 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexp(magnitude, &exponent);  // magnitude in [2^(exponent-1), 2^exponent)
  if (exponent < -13 || magnitude == 0.0f) exponent = -13;  // the steps of subnormals are 2^-24
  const float steps = nearbyint(ldexp(magnitude, 11 - exponent));  // of 2^(exponent-11)
  // A carry out of the fraction runs into the exponent, as it should.
  return sign | (unsigned short)((exponent + 13) * 1024 + (int)steps);
}
