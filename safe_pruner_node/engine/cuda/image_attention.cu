// Attention inside images: every patch of an image attends to all of them.
//
// A program has 64 rows per warpgroup of one head of one image, and all its keys and values in shared memory.
// A row has all its 256 scores in registers at once, so its softmax is an ordinary one. Queries come first, then
// keys, 64 at a time, then values: products begin as soon as the first 64 keys are there.
//
// The 72 channels of a head are 64, whose products are `wgmma`, and 8 more, whose products are `mma.sync`: no
// multiple of 16 is padded to. The accumulators of both have the same layout: a lane has rows
// 16 * warp + lane / 4 (+ 8) and columns 8 * j + lane % 4 * 2 (+ 1), in c[4 * j + 2 * (+8) + (+1)].
// Rows of 64 channels lie swizzled in shared memory: 128 bytes each, piece p of row r, 16 bytes, at p ^ (r % 8).
// A warp's queries, and later what its rows have attended to, lie there as they are, 144 bytes a row: eight
// pieces below each other are in different banks, and global memory is asked for whole pieces only.
//
// A dependent launch: see kernels/launch.py.
//
// Compiled with HEADS, DIM, KEYS, WARPGROUPS defined. Shapes: C images, P patches of one (KEYS), N = C * P rows,
// h heads, d channels per head, D = h * d.

#include "sm90.cuh"

constexpr int THREADS = 128 * WARPGROUPS, ROWS = 64 * WARPGROUPS, WIDTH = HEADS * DIM;
constexpr int MAJOR = 64, ROW_BYTES = DIM * 2;     // channels of `wgmma`
constexpr int BLOCK = 64, BLOCKS = KEYS / BLOCK;   // keys of one product
constexpr int MAJOR_BYTES = KEYS * MAJOR * 2, MINOR_BYTES = KEYS * 16;
constexpr int K_AT = 0, V_AT = MAJOR_BYTES, K_MINOR_AT = 2 * MAJOR_BYTES, V_MINOR_AT = K_MINOR_AT + MINOR_BYTES;
constexpr int ROWS_AT = V_MINOR_AT + MINOR_BYTES, SHARED_BYTES = ROWS_AT + ROWS * ROW_BYTES + 1024;  // room to align
static_assert(DIM == MAJOR + 8 && KEYS == 256 && KEYS % ROWS == 0, "sizes");

struct ImageAttention {
  const bf16 *qkv;  // [N, 3D]: queries, keys, values
  bf16 *out;        // [N, D]
};

extern __shared__ unsigned char unaligned[];

// ---- small things -------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of what the four lanes of a row have.
__device__ __forceinline__ float largest(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- copies -------------------------------------------------------------------------------------

__device__ __forceinline__ void copy16(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until what was committed, but for so many groups, is there for all threads and for `wgmma`.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}
// Keys, or values, of a block; `from` is key 0 of the head. The threads' rows are so far apart that only the
// place of the first is computed.
__device__ __forceinline__ void copy_block(u32 major, u32 minor, const bf16 *from, int block) {
  constexpr int APART = THREADS / 8;
  int key = threadIdx.x / 8, piece = threadIdx.x % 8, other = threadIdx.x % BLOCK;
  u32 to = major + key * 128 + (piece ^ key % 8) * 16;
  const bf16 *source = from + key * 3 * WIDTH + piece * 8, *of_other = from + other * 3 * WIDTH + MAJOR;
#pragma unroll
  for (int i = block * BLOCK; i < block * BLOCK + BLOCK; i += APART) copy16(to + i * 128, source + i * 3 * WIDTH);
  if (threadIdx.x / BLOCK == block % (THREADS / BLOCK))
    copy16(minor + (block * BLOCK + other) * 16, of_other + block * BLOCK * 3 * WIDTH);
}
// The 16 rows of a warp.
__device__ __forceinline__ void copy_queries(u32 to, const bf16 *from) {
  int lane = threadIdx.x % 32, row = lane / 8, piece = lane % 8;
#pragma unroll
  for (int i = 0; i < 16; i += 4)
    copy16(to + row * ROW_BYTES + piece * 16 + i * ROW_BYTES, from + row * 3 * WIDTH + piece * 8 + i * 3 * WIDTH);
  if (lane < 16) copy16(to + lane * ROW_BYTES + 128, from + lane * 3 * WIDTH + MAJOR);
}
// The 16 rows of a warp, back to global memory.
__device__ __forceinline__ void copy_out(bf16 *to, u32 from) {
  auto copy = [&](int row, int piece) {
    u32 a, b, c, d;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(from + row * ROW_BYTES + piece * 16) : "memory");
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to + row * WIDTH + piece * 8), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
  };
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 16; i += 4) copy(lane / 8 + i, lane % 8);
  if (lane < 16) copy(lane, 8);
}

// ---- tensor cores -------------------------------------------------------------------------------

// c[64 rows, 64] (+)= a[rows, 16] @ b, which is [64, 16].T (BY_ROWS 0) or [16, 64] (BY_ROWS 1).
template <int BY_ROWS>
__device__ __forceinline__ void multiply(float (&c)[32], const u32 (&a)[4], u32 b, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
               ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;}"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),
                 "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
                 "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),
                 "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(operand(b))), "r"(accumulate), "n"(BY_ROWS));
}
// c[16 rows, 8] += a[rows, 8] @ b[8, 8].T, of one warp.
__device__ __forceinline__ void multiply_minor(float *c, const u32 (&a)[2], u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
// c[16 rows, 8] += a[rows, 16] @ b[16, 8], of one warp.
__device__ __forceinline__ void multiply_minor(float *c, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four operands of eight rows of 16 bytes each, one after the other at `at`.
__device__ __forceinline__ void load_minor(u32 (&b)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at + threadIdx.x % 32 * 16) : "memory");
}
__device__ __forceinline__ void load_minor_transposed(u32 (&b)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at + threadIdx.x % 32 * 16) : "memory");
}

// Operands of a product to and from a warp's rows: 16 channels of all 16 rows, and the last 8.
__device__ __forceinline__ u32 place(u32 rows) {
  return rows + threadIdx.x % 16 * ROW_BYTES + threadIdx.x % 32 / 16 * 16;
}
__device__ __forceinline__ void load_rows(u32 (&a)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_rows(u32 (&a)[2], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ void store_rows(u32 at, u32 a0, u32 a1, u32 a2, u32 a3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a0), "r"(a1), "r"(a2), "r"(a3)
               : "memory");
}
__device__ __forceinline__ void store_rows(u32 at, u32 a0, u32 a1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(at), "r"(a0), "r"(a1) : "memory");
}

// ---- the kernel ---------------------------------------------------------------------------------

// s[64 rows, BLOCK keys] = q @ keys.T of the major channels, begun.
__device__ __forceinline__ void begin_scores(float (&s)[32], const u32 (&q)[4][4], u32 keys) {
  multiply_begin();
#pragma unroll
  for (int k = 0; k < 4; k++) multiply<0>(s, q[k], keys + k * 32, k > 0);
  multiply_commit();
}
// The minor channels added, the greatest score of both rows so far kept in `top`.
__device__ __forceinline__ void end_scores(float (&s)[32], const u32 (&q)[2], u32 minor, float (&top)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 b[4];
    load_minor(b, minor + half * 512);
#pragma unroll
    for (int j = 0; j < 4; j++) multiply_minor(s + half * 16 + j * 4, q, b[j]);
  }
#pragma unroll
  for (int i = 0; i < 32; i += 8)  // by fours, that do not wait for each other
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float *c = s + i + 2 * h;
      top[h] = fmaxf(top[h], fmaxf(fmaxf(c[0], c[1]), fmaxf(c[4], c[5])));
    }
}
// Scores of BLOCK keys to probabilities p, not normed yet; their sums are added to `total`.
__device__ __forceinline__ void probabilities(u32 (&p)[4][4], const float (&s)[32], const float (&top)[2], float (&total)[2]) {
  constexpr float SCALE = 1.4426950408889634f / 8.48528137423857f;  // log2(e) / sqrt(72)
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float shift = top[i % 2] * SCALE;
    float a = exp2_fast(s[2 * i] * SCALE - shift), b = exp2_fast(s[2 * i + 1] * SCALE - shift);
    total[i % 2] += a + b;
    p[i / 4][i % 4] = pack(a, b);
  }
}
// o += p @ values of BLOCK keys: of the major channels begun, of the minor ones done.
__device__ __forceinline__ void add_values(float (&o)[32], float (&o_minor)[4], const u32 (&p)[4][4], u32 values, u32 minor, int accumulate) {
  multiply_begin();
#pragma unroll
  for (int k = 0; k < 4; k++) multiply<1>(o, p[k], values + k * 2048, accumulate + k > 0);
  multiply_commit();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 b[4];
    load_minor_transposed(b, minor + half * 512);
    multiply_minor(o_minor, p[2 * half], b[0], b[1]);
    multiply_minor(o_minor, p[2 * half + 1], b[2], b[3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) image_attention(const __grid_constant__ ImageAttention given) {
  constexpr int PARTS = KEYS / ROWS;  // programs of one head of one image
  int part = blockIdx.x % PARTS, head = blockIdx.x / PARTS % HEADS, image = blockIdx.x / PARTS / HEADS;
  int row = part * ROWS + threadIdx.x / 32 * 16;  // of a warp, the first one
  u32 shared = (shared_address(unaligned) + 1023) / 1024 * 1024;
  u32 rows = shared + ROWS_AT + threadIdx.x / 32 * 16 * ROW_BYTES;
  const bf16 *queries = given.qkv + (long long)image * KEYS * 3 * WIDTH + head * DIM;
  const bf16 *keys = queries + WIDTH, *values = keys + WIDTH;
  bf16 *out = given.out + ((long long)image * KEYS + row) * WIDTH + head * DIM;
  wait_for_inputs();
  let_next_begin();
  copy_queries(rows, queries + row * 3 * WIDTH);
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    copy_block(shared + K_AT, shared + K_MINOR_AT, keys, i);
    copies_commit();
  }
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) copy_block(shared + V_AT, shared + V_MINOR_AT, values, i);
  copies_commit();

  // While the products of some keys go on, the next ones come, and those before are looked through.
  float s[BLOCKS][32], top[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};
  u32 q[4][4], q_minor[2];
  copies_wait<BLOCKS>();
#pragma unroll
  for (int k = 0; k < 4; k++) load_rows(q[k], place(rows) + k * 32);
  load_rows(q_minor, place(rows) + 128);
  begin_scores(s[0], q, shared + K_AT);
  copies_wait<3>();
  begin_scores(s[1], q, shared + K_AT + 64 * 128);
  multiply_wait<1>(s[0]);
  end_scores(s[0], q_minor, shared + K_MINOR_AT, top);
  copies_wait<2>();
  begin_scores(s[2], q, shared + K_AT + 128 * 128);
  multiply_wait<1>(s[1]);
  end_scores(s[1], q_minor, shared + K_MINOR_AT + 64 * 16, top);
  copies_wait<1>();
  begin_scores(s[3], q, shared + K_AT + 192 * 128);
  multiply_wait<1>(s[2]);
  end_scores(s[2], q_minor, shared + K_MINOR_AT + 128 * 16, top);
  multiply_wait<0>(s[3]);
  end_scores(s[3], q_minor, shared + K_MINOR_AT + 192 * 16, top);
  top[0] = largest(top[0]), top[1] = largest(top[1]);

  // While the products of some keys go on, the probabilities of the next ones are computed.
  float o[32], o_minor[4] = {0.f, 0.f, 0.f, 0.f};
  u32 p[BLOCKS][4][4];
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    probabilities(p[i], s[i], top, total);
    if (i == 0) copies_wait<0>();
    add_values(o, o_minor, p[i], shared + V_AT + i * 64 * 128, shared + V_MINOR_AT + i * 64 * 16, i);
  }
  multiply_wait<0>(o);

  float share[2] = {1.f / sum(total[0]), 1.f / sum(total[1])};
  auto normed = [&](const float *c, int h) { return pack(c[2 * h] * share[h], c[2 * h + 1] * share[h]); };
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float *c = o + 8 * k;
    store_rows(place(rows) + k * 32, normed(c, 0), normed(c, 1), normed(c + 4, 0), normed(c + 4, 1));
  }
  store_rows(place(rows) + 128, normed(o_minor, 0), normed(o_minor, 1));
  __syncwarp();
  copy_out(out, rows);
}
