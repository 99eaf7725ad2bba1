// fp32 arithmetic that rounds once and contracts nothing, and the storage types; every kernel may include it.

typedef long long i64;

// ---- Primitives. The tests give the host's version of them and run the kernels on the CPU. ----
#ifdef __CUDACC__
#define DEV __device__ __forceinline__
// PTX, not operators: CuPy compiles everything with -ftz=true, which flushes subnormal inputs, and a
// contracted beta * V + X tips spikes. These round once, to nearest, and keep subnormals.
DEV float add(float a, float b) { float r; asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV float sub(float a, float b) { float r; asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV float mul(float a, float b) { float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV float div(float a, float b) { float r; asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV unsigned bits_of(float f) { return __float_as_uint(f); }
DEV float float_of(unsigned b) { return __uint_as_float(b); }
DEV float half_to_float(unsigned short b) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(b)); return r; }
DEV unsigned short float_to_half(float f) {
  unsigned short r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
}
#endif

// ---- Storage types. CuPy ships no cuda_bf16.h and a bf16 is the upper half of a float anyway. ----
struct F32 {
  typedef unsigned Bits;
  static DEV float decode(Bits b) { return float_of(b); }
  static DEV Bits encode(float f) { return bits_of(f); }
};

struct F16 {
  typedef unsigned short Bits;
  static DEV float decode(Bits b) { return half_to_float(b); }
  static DEV Bits encode(float f) { return float_to_half(f); }
  static DEV unsigned encode2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return encode(low) | (unsigned)encode(high) << 16;
#endif
  }
};

struct BF16 {
  typedef unsigned short Bits;
  static DEV float decode(Bits b) { return float_of((unsigned)b << 16); }
  static DEV Bits encode(float f) {
    const unsigned b = bits_of(f);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;          // NaN, or rounding could make it infinite
    return (Bits)((b + 0x7fffu + (b >> 16 & 1u)) >> 16);         // to nearest, ties to even
  }
  static DEV unsigned encode2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return encode(low) | (unsigned)encode(high) << 16;
#endif
  }
};
