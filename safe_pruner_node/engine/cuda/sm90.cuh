// What the kernels of this folder have in common: instructions of SM 9.0 by name.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Of dependent launches: until the kernels before have written everything; and from now on the next may begin.
__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- barriers in shared memory ------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
}
__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
  u32 done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(at), "r"(parity) : "memory");
  } while (!done);
}
// That so many bytes will come; they arrive by themselves.
__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// ---- tensor cores -------------------------------------------------------------------------------

// Of an operand in shared memory, rows of 128 bytes, swizzled: the lower half of its descriptor.
__device__ __forceinline__ u32 operand(u32 at) { return (at & 0x3ffff) >> 4 | 1 << 16; }
// With the upper half: eight rows 1024 bytes apart from the next eight.
__device__ __forceinline__ u64 descriptor(u32 lower) { return (u64)(64u | 1u << 30) << 32 | lower; }
__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but so many of the groups that were committed are done.
template <int PENDING>
__device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// The same, and c is complete: or the compiler might read it before.
template <int PENDING, int SUMS>
__device__ __forceinline__ void multiply_wait(float (&c)[SUMS]) {
  multiply_wait<PENDING>();
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(c[i])::"memory");
}
