// Attention of the language model's prefill: bidirectional, all query heads share one key/value head.
//
// A program has 128 rows (row n * h + i is query head i of token n), 64 per warpgroup, and a share of the keys.
// The programs of a cluster have the same rows; each joins some of them from all programs' shared memory. So
// there is work for most multiprocessors, and yet keys are not read by more programs than need them: what
// bounds this kernel is the way from L2 to the multiprocessors.
//
// Keys and values come in blocks of 64, two of each on their way or in use. While the softmax of one block is
// computed, the product with the values of the block before goes on.
// Layout of accumulators and of shared memory: see image_attention.cu. A row of 256 channels is 4 chunks.
//
// A dependent launch: see kernels/launch.py.
//
// Shapes: R rows (tokens * h), M keys, d channels (256).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

constexpr int THREADS = 256, ROWS = 128, KEYS = 64, DIM = 256, CHUNKS = DIM / 64, MOST_PARTS = 8;
constexpr int SLOT = KEYS * DIM * 2;                       // bytes of a block of keys or of values
constexpr int Q_AT = 0, K_AT = ROWS * DIM * 2, V_AT = K_AT + 2 * SLOT, LSE_AT = V_AT + 2 * SLOT;
constexpr int PART_AT = K_AT, PART_PITCH = DIM * 2 + 16;   // where keys were: rows for the join
constexpr int SHARED_BYTES = LSE_AT + ROWS * 4 + 1024;     // with room to align
constexpr float SCALE = 1.4426950408889634f / 16.f;        // log2(e) / sqrt(256)
constexpr float NOTHING = -1e30f;

struct PrefillAttention {
  const bf16 *queries, *keys, *values;  // [R, d], [M, d], [M, d]
  const long long *valid;               // how many of the last n_text keys are attended, or null: all
  bf16 *out;                            // [R, d]
  int n_rows, n_keys, n_text;
};

extern __shared__ unsigned char unaligned[];

// ---- small things -------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of what N neighbouring lanes have.
template <int N>
__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int i = 1; i < N; i *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
template <int N>
__device__ __forceinline__ float sum(float x) {
#pragma unroll
  for (int i = 1; i < N; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- the cluster --------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  int i;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(i));
  return i;
}
__device__ __forceinline__ int cluster_size() {
  int i;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(i));
  return i;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Of another program of the cluster: an address in its shared memory, and what is there.
__device__ __forceinline__ u32 there(u32 at, int rank) {
  u32 to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(at), "r"(rank));
  return to;
}
__device__ __forceinline__ float look4(u32 at) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ uint4 look16(u32 at) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store4(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }

// ---- copies -------------------------------------------------------------------------------------

// So many of 16 bytes, and zeros.
__device__ __forceinline__ void copy16(u32 to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until what was committed, but for so many groups, is there for all threads and for `wgmma`.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}
// COUNT rows, of which so many are real and the others zero.
template <int COUNT>
__device__ __forceinline__ void copy_rows(u32 to, const bf16 *from, int real) {
#pragma unroll
  for (int i = 0; i < COUNT * 32 / THREADS; i++) {
    int at = i * THREADS + threadIdx.x, row = at / 32, piece = at % 32;
    u32 place = piece / 8 * (COUNT * 128) + row * 128 + (piece % 8 ^ row % 8) * 16;
    copy16(to + place, row < real ? from + row * DIM + piece * 8 : from, row < real ? 16 : 0);
  }
}

// ---- tensor cores -------------------------------------------------------------------------------

// Descriptor of rows of 128 bytes, swizzled: eight of them 1024 bytes apart from the next eight.
__device__ __forceinline__ u64 descriptor(u32 at) { return (u64)(64u | 1u << 30) << 32 | (at & 0x3ffff) >> 4 | 1u << 16; }
__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Behind the wait for c: or the compiler reads c before.
__device__ __forceinline__ void complete(float (&c)[32]) {
#pragma unroll
  for (int i = 0; i < 32; i++) asm volatile("" : "+f"(c[i])::"memory");
}

#define PLACES \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define SUMS(c) \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), \
  "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), \
  "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), \
  "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])

// c[64 rows, 64] (+)= a[rows, 16] @ b[64, 16].T
__device__ __forceinline__ void multiply(float (&c)[32], u32 a, u32 b, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES
               ", %32, %33, p, 1, 1, 0, 0;}" : SUMS(c) : "l"(descriptor(a)), "l"(descriptor(b)), "r"(accumulate));
}
// c[64 rows, 64] += a[rows, 16] @ b[16, 64], a in registers
__device__ __forceinline__ void multiply(float (&c)[32], const u32 (&a)[4], u32 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
               : SUMS(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)));
}

// ---- the kernel ---------------------------------------------------------------------------------

// s[64 rows, KEYS] = q @ keys.T, begun.
__device__ __forceinline__ void begin_scores(float (&s)[32], u32 q, u32 keys) {
  multiply_begin();
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(s, q + chunk * (ROWS * 128) + k * 32, keys + chunk * (KEYS * 128) + k * 32, chunk + k > 0);
  multiply_commit();
}
// o += p @ values of a block, begun.
__device__ __forceinline__ void begin_values(float (&o)[CHUNKS][32], const u32 (&p)[4][4], u32 values) {
  multiply_begin();
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) multiply(o[chunk], p[k], values + chunk * (KEYS * 128) + k * 2048);
  multiply_commit();
}
// Scores, of which so many are real, to probabilities, not normed yet. What was summed up so far is to be
// multiplied with `shrink`.
__device__ __forceinline__ void softmax(float (&s)[32], int real, float (&top)[2], float (&total)[2], float (&shrink)[2]) {
  if (real < KEYS) {
#pragma unroll
    for (int i = 0; i < 32; i++)
      if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= real) s[i] = NOTHING;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float above = top[h];
#pragma unroll
    for (int i = 0; i < 16; i++) above = fmaxf(above, s[i / 2 * 4 + 2 * h + i % 2]);
    above = largest<4>(above);
    shrink[h] = exp2_fast((top[h] - above) * SCALE);
    top[h] = above;
    float shift = above * SCALE, more = 0.f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      float &x = s[i / 2 * 4 + 2 * h + i % 2];
      x = exp2_fast(x * SCALE - shift);
      more += x;
    }
    total[h] = total[h] * shrink[h] + more;
  }
}
// As the left operand of a product.
__device__ __forceinline__ void to_operand(u32 (&p)[4][4], const float (&s)[32]) {
#pragma unroll
  for (int i = 0; i < 16; i++) p[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1]);
}
// This program's softmax over its keys, for the cluster.
__device__ __forceinline__ void leave(u32 shared, int row, const float (&o)[CHUNKS][32], const float (&top)[2], const float (&total)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float whole = sum<4>(total[h]), share = whole > 0.f ? 1.f / whole : 0.f;
    u32 to = shared + PART_AT + (row + 8 * h) * PART_PITCH + threadIdx.x % 4 * 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        store4(to + chunk * 128 + j * 16, pack(o[chunk][4 * j + 2 * h] * share, o[chunk][4 * j + 2 * h + 1] * share));
    if (threadIdx.x % 4 == 0)
      store4(shared + LSE_AT + (row + 8 * h) * 4, __float_as_uint(whole > 0.f ? top[h] * SCALE + log2f(whole) : NOTHING));
  }
}
// Every warp of the cluster joins other rows; a lane has 8 channels.
__device__ __forceinline__ void join(u32 shared, bf16 *out, int real, int rank, int parts) {
  int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int row = rank + parts * (threadIdx.x / 32); row < min(ROWS, real); row += parts * (THREADS / 32)) {
    u32 from = shared + PART_AT + row * PART_PITCH + lane * 16;
    uint4 v[MOST_PARTS];
#pragma unroll
    for (int p = 0; p < MOST_PARTS; p++)
      if (p < parts) v[p] = look16(there(from, p));
    float lse = lane % 8 < parts ? look4(there(shared + LSE_AT + row * 4, lane % 8)) : NOTHING;
    float weight = exp2_fast(lse - largest<8>(lse));
    weight /= sum<8>(weight);
    float y[8] = {};
#pragma unroll
    for (int p = 0; p < MOST_PARTS; p++) {
      float w = __shfl_sync(~0u, weight, p);
      if (p >= parts) continue;
      y[0] += w * low(v[p].x), y[1] += w * high(v[p].x), y[2] += w * low(v[p].y), y[3] += w * high(v[p].y);
      y[4] += w * low(v[p].z), y[5] += w * high(v[p].z), y[6] += w * low(v[p].w), y[7] += w * high(v[p].w);
    }
    *(uint4 *)(out + row * DIM + lane * 8) = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_attention(const __grid_constant__ PrefillAttention given) {
  int rank = cluster_rank(), parts = cluster_size(), tile = blockIdx.x / parts, first_row = tile * ROWS;
  u32 shared = ((u32)__cvta_generic_to_shared(unaligned) + 1023) / 1024 * 1024;
  int share = ((given.n_keys + KEYS - 1) / KEYS + parts - 1) / parts * KEYS, first_key = rank * share;
  const bf16 *keys = given.keys + (long long)first_key * DIM, *values = given.values + (long long)first_key * DIM;
  const bf16 *queries = given.queries + (long long)first_row * DIM;
  bf16 *out = given.out + (long long)first_row * DIM;
  wait_for_inputs();
  let_next_begin();
  int limit = given.n_keys;
  if (given.valid) limit += (int)*given.valid - given.n_text;
  int real = min(share, limit - first_key);  // keys of this program; 0 or less: none
  auto bring = [&](u32 to, const bf16 *from, int block) {
    if (block * KEYS < real) copy_rows<KEYS>(to + block % 2 * SLOT, from + block * KEYS * DIM, real - block * KEYS);
  };
  float o[CHUNKS][32] = {}, top[2] = {NOTHING, NOTHING}, total[2] = {0.f, 0.f};
  if (real > 0) {
    float s[32], shrink[2];
    u32 p[4][4], q = shared + Q_AT + threadIdx.x / 128 * 64 * 128;
    copy_rows<ROWS>(shared + Q_AT, queries, given.n_rows - first_row);
    bring(shared + K_AT, keys, 0);
    copies_commit();
    bring(shared + K_AT, keys, 1);
    bring(shared + V_AT, values, 0);
    copies_commit();
    copies_wait<1>();
    begin_scores(s, q, shared + K_AT);
    multiply_wait<0>();
    complete(s);
    softmax(s, real, top, total, shrink);
    to_operand(p, s);
    int block = 0;
    while (true) {
      copies_wait<0>();  // and nobody needs what was there before any more
      if ((block + 1) * KEYS >= real) break;
      bring(shared + K_AT, keys, block + 2);
      bring(shared + V_AT, values, block + 1);
      copies_commit();
      begin_scores(s, q, shared + K_AT + (block + 1) % 2 * SLOT);
      begin_values(o, p, shared + V_AT + block % 2 * SLOT);
      multiply_wait<1>();
      complete(s);
      block++;
      softmax(s, real - block * KEYS, top, total, shrink);
      multiply_wait<0>();
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        complete(o[chunk]);
#pragma unroll
        for (int i = 0; i < 32; i++) o[chunk][i] *= shrink[i / 2 % 2];
      }
      to_operand(p, s);
    }
    begin_values(o, p, shared + V_AT + block % 2 * SLOT);
    multiply_wait<0>();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) complete(o[chunk]);
  }

  __syncthreads();  // nobody needs keys or values any more
  leave(shared, threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, o, top, total);
  cluster_sync();
  join(shared, out, given.n_rows - first_row, rank, parts);
  cluster_sync();  // until then the others read from here
}
