// What threads of a warp, a block and a cluster of blocks do together; the tests give the host's version. A kernel that
// includes it says CLUSTER, how many blocks lie beside one another along the second axis of the grid; where that is
// more than one it needs compute capability 9.0.
#ifdef __CUDACC__
typedef signed char i1;
#define SHARED(Type, name) __shared__ Type name
#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(1, CLUSTER, 1)
#else
#define CLUSTER_DIMS
#endif
DEV void block_sync() { __syncthreads(); }
DEV void warp_sync() { __syncwarp(); }
DEV unsigned ballot(bool p) { return __ballot_sync(~0u, p); }
// A value of the lane whose number differs in these bits.
template <class T> DEV T from_lane(T own, int other) { return __shfl_xor_sync(~0u, own, other); }
// A barrier of all blocks of a cluster; what was written to shared memory before arriving is seen after waiting.
DEV void cluster_arrive() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
DEV void cluster_wait() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// Where blocks of a cluster wait for what others put into their shared memory: for so many bytes, not for the others.
struct Arrivals {
  alignas(8) unsigned long long barrier;
};
DEV unsigned shared_address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }
// One thread of the block says so, before it arrives at the cluster's barrier.
DEV void expect_arrivals(Arrivals& to, unsigned bytes) {
#if CLUSTER > 1
  const unsigned barrier = shared_address(&to.barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
#endif
}
// To the same place in the shared memory of another block of the cluster, which has begun; T has four bytes.
template <class T> DEV void to_rank(T* shared, unsigned rank, T value, Arrivals& to) {
#if CLUSTER > 1
  unsigned there, barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(&to.barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
               : : "r"(there), "r"(*reinterpret_cast<unsigned*>(&value)), "r"(barrier) : "memory");
#else
  *shared = value;
#endif
}
// By the whole block: all that it expects has come and may be read.
DEV void wait_for_arrivals(Arrivals& to) {
#if CLUSTER > 1
  unsigned come;
  do
    asm volatile("{ .reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                 "selp.u32 %0, 1, 0, p; }"
                 : "=r"(come) : "r"(shared_address(&to.barrier)) : "memory");
  while (!come);
#else
  __syncthreads();
#endif
}
DEV int ones(unsigned mask) { return __popc(mask); }
// Launched to overlap with the kernel before: what that one wrote may be read behind this line. Else it does nothing.
DEV void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel of the stream, if it was launched so, may begin and come as far as its own wait_for_previous().
DEV void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEV float root(float x) { float r; asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
DEV int dot4(unsigned a, unsigned b, int sum) { return __dp4a((int)a, (int)b, sum); }
DEV unsigned permute(unsigned a, unsigned b, unsigned how) { return __byte_perm(a, b, how); }
// Of 1, 2, 4, 8 or 16 bytes, which nobody reads again before they have left the caches: they do not drive out the rest.
template <class T> DEV T load_once(const T* from) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "no access to memory has this size");
  T to;
  if (sizeof(T) == 16) *reinterpret_cast<int4*>(&to) = __ldcs(reinterpret_cast<const int4*>(from));
  else if (sizeof(T) == 8) *reinterpret_cast<int2*>(&to) = __ldcs(reinterpret_cast<const int2*>(from));
  else if (sizeof(T) == 4) *reinterpret_cast<int*>(&to) = __ldcs(reinterpret_cast<const int*>(from));
  else if (sizeof(T) == 2) *reinterpret_cast<short*>(&to) = __ldcs(reinterpret_cast<const short*>(from));
  else *reinterpret_cast<i1*>(&to) = __ldcs(reinterpret_cast<const i1*>(from));
  return to;
}
#endif

// The sum over a warp, in every lane; in the same order in every warp.
DEV float warp_sum(float x) {
#pragma unroll
  for (int other = 16; other; other /= 2) x = add(x, from_lane(x, other));
  return x;
}

DEV float warp_max(float x) {
#pragma unroll
  for (int other = 16; other; other /= 2) x = fmaxf(x, from_lane(x, other));
  return x;
}
