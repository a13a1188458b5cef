// The whole flow of the action expert in one launch: every Euler step, every layer.
//
// 128 programs (64 clusters of 2), one per multiprocessor, stay for the whole flow. A layer is six
// phases, each spread over all of them, with a barrier of the grid between two:
//
//   1 query/key/value   norm folded in, rotary embedding   tiles of 16 channel pairs, 80 programs
//   2 attention         rows of all heads x 64 keys        ceil(R/64) * P programs
//   3 join              the parts of the softmax           one warp per row; a keyframe's saliency
//   4 output            + gated residual                   16 columns x 1/2 of K, added up in a cluster
//   5 gate/up           norm folded in, GELU               32 channel pairs, 128 programs
//   6 down              + gated residual                   as 4
//
// What a launch per phase cannot have: the weights of the next phase are on their way into shared
// memory while this one computes and while the barrier is waited for, so that memory never idles.
// They lie in global memory as shared memory wants them, one piece per program ("images"): rows
// padded by 16 bytes, so that eight rows are read without conflicts.
//
// Activations lie in global memory as the tensor core's A operand wants them ("fragments"): tile
// (k/16, row/16), 32 lanes, 8 numbers each, so that one 16-byte load per lane is one operand.
//
// Norms as in kernels/modulated_pair.py: norm(x) @ W = r * ((x * (1 + s)) @ W) + b @ W.
//
// Compiled with WIDTH, MLP, HEADS, HEAD_DIM, DEPTH, STEPS, HORIZON, ACTION_DIM defined. Shapes: H rows
// (HORIZON, at most 64), D width, M MLP channels, d head_dim, R = HEADS * H, N prefix keys of a layer.

typedef unsigned int u32;
typedef unsigned short bf16;

constexpr int THREADS = 256, PROGRAMS = 128, CLUSTER = 2;
constexpr int ROWS = 64, KEYS = 64;
constexpr int Q_WIDTH = HEADS * HEAD_DIM, QKV = (HEADS + 2) * HEAD_DIM, HALF = HEAD_DIM / 2;
constexpr int R = HEADS * HORIZON, R_BLOCKS = (R + ROWS - 1) / ROWS;
constexpr int QKV_TILES = QKV / 32, GATE_UP_TILES = MLP / 32, COLUMNS = WIDTH * CLUSTER / PROGRAMS, COLUMN_TILES = WIDTH / COLUMNS;
constexpr int LANES = COLUMNS / 2;  // threads that finish one row of a tile
static_assert(QKV_TILES <= PROGRAMS && GATE_UP_TILES == PROGRAMS, "tiles for this many programs");
static_assert(COLUMNS == 16 && HORIZON <= ROWS && HEAD_DIM == 256, "sizes");
static_assert(R <= 4 * PROGRAMS, "rows of attention: at most four per program");

// Shared memory: A holds weights of phases 1 and 5 and keys/values, B those of phases 4 and 6.
constexpr int PITCH_D = WIDTH * 2 + 16;                  // bytes per row of a tile of WIDTH channels
constexpr int PITCH_O = Q_WIDTH / CLUSTER * 2 + 16, PITCH_DOWN = MLP / CLUSTER * 2 + 16;
constexpr int PITCH_KV = HEAD_DIM * 2 + 16;
constexpr int A_KEYS = 32 * PITCH_D, A_VALUES = A_KEYS + KEYS * PITCH_KV;
constexpr int A_BYTES = A_VALUES + KEYS * PITCH_KV;
constexpr int SCORE_PITCH = KEYS + 8;
constexpr int B_SUMS = 4 * ROWS * (COLUMNS + 8) * 4;     // of four k-groups
constexpr int B_BYTES = B_SUMS > COLUMNS * PITCH_DOWN ? B_SUMS : COLUMNS * PITCH_DOWN;
static_assert(ROWS * SCORE_PITCH * 4 + 8 * 16 * 136 * 2 <= A_KEYS && 4 * ROWS * (32 + 8) * 4 <= A_KEYS && 64 * PITCH_D <= A_BYTES, "tiles fit");
constexpr int SMALL = A_BYTES + B_BYTES;  // + 1024: SHARED_BYTES of the launch

struct Layer {
  const bf16 *qkv, *o, *gate_up, *down;  // images
  bf16 *keys, *values;                   // rows PITCH_KV bytes apart, the prefix is there
  int n_prefix, padding;
};

struct Flow {
  Layer layers[DEPTH];
  // Modulation of every step and layer, fp32: 1 + scale, gate [D] each; bias behind the products.
  const float *attention_scale, *attention_gate, *qkv_bias;  // [STEPS, DEPTH, .]
  const float *mlp_scale, *mlp_gate, *gate_up_bias;
  const float *final_scale, *final_shift;                    // [STEPS, D]
  const float *in_weight, *in_bias, *out_weight, *out_bias;  // [D, A], [D], [A, D], [A]
  const bf16 *cos, *sin;                                     // [H, d]
  const long long *n_valid;                                  // text tokens that are no padding, or null
  float *actions;                                            // in and out, [H, A]
  float *x;                                                  // [64, D]
  bf16 *scaled;                                              // fragments of x * (1 + s), K = D
  bf16 *queries;                                             // fragments, rows R, K = d
  bf16 *attended;                                            // fragments, K = HEADS * d
  bf16 *hidden;                                              // fragments, K = M
  bf16 *parts;                                               // [P, R, d]
  float *lse;                                                // [P, R], base 2
  float *squares;                                            // [COLUMN_TILES, 64] sums of x * x
  u32 *barrier;                                              // zero at launch
  float *shares;                                             // a keyframe's: [R, n_visual], scratch
  float *saliency;                                           // out: [slots, PROGRAMS, n_visual], or null
  int n_slots;                                               // text tokens and padding
  int n_visual;                                              // a multiple of 64 where there is saliency
  int over_all;                                              // its softmax: over all keys, else visual ones
  int first_watched, last_watched;                           // steps whose saliency is taken
  int watched[DEPTH];                                        // per layer its place, or -1
  int n_watched;                                             // layers
  float dt;
};

extern __shared__ __align__(16) unsigned char shared[];

// ---- small things -------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float round_bf16(float x) { return low(pack(x, 0.f)); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// What other programs have written is read past the first-level cache, which nobody keeps coherent.
__device__ __forceinline__ uint4 load16(const void *p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ float2 load_float2(const float *p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ float load_float(const float *p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ void copy_async(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint4 &a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// This program has come here: what it wrote can be read by who waits. What is asked for between the
// two (weights) does not hold up the arrival.
__device__ __forceinline__ void grid_arrive(u32 *counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  }
}
// Every program has come here, and what all wrote can be read.
__device__ __forceinline__ void grid_wait(u32 *counter, u32 &target) {
  target += PROGRAMS;
  if (threadIdx.x == 0) {
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < target);
  }
  __syncthreads();
}

// Bulk copies on their way to shared memory: who needs them waits at their barrier.
enum Delivery { QKV_WEIGHTS, KEYS_VALUES, COLUMN_WEIGHTS, GATE_UP_WEIGHTS, DELIVERIES };
struct Deliveries {
  u32 barriers, uses[DELIVERIES];
  __device__ __forceinline__ void begin(u32 address) {
    barriers = address;
    for (int i = 0; i < DELIVERIES; i++) {
      uses[i] = 0;
      if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers + i * 8));
    }
    if (threadIdx.x == 0) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
  }
  // By one thread: so many bytes will come.
  __device__ __forceinline__ void expect(Delivery which, u32 bytes) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barriers + which * 8), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void copy(Delivery which, u32 to, const void *from, u32 bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barriers + which * 8) : "memory");
  }
  __device__ __forceinline__ void fetch(Delivery which, u32 to, const void *from, u32 bytes) {
    if (threadIdx.x) return;
    expect(which, bytes);
    copy(which, to, from, bytes);
  }
  __device__ __forceinline__ void wait(Delivery which) {
    u32 parity = uses[which]++ & 1, done;
    do {
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
          : "=r"(done) : "r"(barriers + which * 8), "r"(parity) : "memory");
    } while (!done);
  }
};

// Where a pair of numbers (row, k), (row, k + 1) of an A operand lies, in bf16; MT tiles of rows.
template <int MT>
__device__ __forceinline__ int fragment(int row, int k) {
  int lane = (row & 7) * 4 + ((k & 7) >> 1), part = ((k >> 3) & 1) * 2 + ((row >> 3) & 1);
  return (((k >> 4) * MT + (row >> 4)) * 32 + lane) * 8 + part * 2;
}
__device__ __forceinline__ void store_pair(bf16 *to, float a, float b) { *(u32 *)to = pack(a, b); }

// ---- weights on their way -----------------------------------------------------------------------

__device__ __forceinline__ void fetch_qkv(Deliveries &d, u32 a, const Layer &layer) {
  constexpr u32 BYTES = 32 * PITCH_D;
  if (blockIdx.x < QKV_TILES) d.fetch(QKV_WEIGHTS, a, layer.qkv + blockIdx.x * (BYTES / 2), BYTES);
}
__device__ __forceinline__ void fetch_gate_up(Deliveries &d, u32 a, const Layer &layer) {
  constexpr u32 BYTES = 64 * PITCH_D;
  d.fetch(GATE_UP_WEIGHTS, a, layer.gate_up + (long long)blockIdx.x * (BYTES / 2), BYTES);
}
template <int PITCH>
__device__ __forceinline__ void fetch_columns(Deliveries &d, u32 b, const bf16 *image) {
  constexpr u32 BYTES = COLUMNS * PITCH;
  d.fetch(COLUMN_WEIGHTS, b, image + (long long)blockIdx.x * (BYTES / 2), BYTES);
}
// The prefix's keys and values of one block.
__device__ __forceinline__ void fetch_prefix(Deliveries &d, u32 a, const Layer &layer, int block) {
  if (threadIdx.x) return;
  u32 bytes = min(max(layer.n_prefix - block * KEYS, 0), KEYS) * PITCH_KV;
  d.expect(KEYS_VALUES, 2 * bytes);
  if (!bytes) return;
  long long at = (long long)block * KEYS * (PITCH_KV / 2);
  d.copy(KEYS_VALUES, a + A_KEYS, layer.keys + at, bytes);
  d.copy(KEYS_VALUES, a + A_VALUES, layer.values + at, bytes);
}
// The suffix's, and zeros behind it: their share is 0, but 0 * NaN is none.
__device__ __forceinline__ void fetch_suffix(u32 a, const Layer &layer, int block) {
  constexpr int PIECES = HEAD_DIM / 8;
  int first = layer.n_prefix, last = first + HORIZON;
  if (block * KEYS + KEYS <= first) return;
  for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
    int row = i / PIECES, piece = i % PIECES, key = block * KEYS + row;
    long long at = (long long)key * (PITCH_KV / 2) + piece * 8;
    if (key >= last)
      *(uint4 *)(shared + A_VALUES + row * PITCH_KV + piece * 16) = make_uint4(0, 0, 0, 0);
    else if (key >= first) {
      copy_async(a + A_KEYS + row * PITCH_KV + piece * 16, layer.keys + at);
      copy_async(a + A_VALUES + row * PITCH_KV + piece * 16, layer.values + at);
    }
  }
  commit();
  arrived<0>();
}

// ---- products -----------------------------------------------------------------------------------

// sums[g][row][column] = the part of product fragments @ weights.T of k-group g; weights in shared
// memory, NT rows PITCH bytes apart. Ends with everything in `sums`, which may lie over the weights.
template <int NT, int K, int PITCH>
__device__ __forceinline__ void product(const bf16 *fragments, u32 weights, float *sums) {
  constexpr int STEPS_K = K / 16 / 4, AHEAD = STEPS_K < 8 ? STEPS_K : 8;  // loads under way
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = warp & 1, group = warp >> 1;
  const bf16 *a_at = fragments + ((group * STEPS_K * 4 + rows * 2) * 32 + lane) * 8;
  u32 b_at = weights + ((lane >> 4) * 8 + (lane & 7)) * PITCH + ((lane >> 3) & 1) * 16 + group * STEPS_K * 32;
  const bool real[2] = {rows * 32 + lane / 4 < HORIZON, rows * 32 + 16 + lane / 4 < HORIZON};
  float c[2][NT / 8][4] = {};
  uint4 a[AHEAD][2];
#pragma unroll
  for (int s = 0; s < AHEAD; s++)
#pragma unroll
    for (int m = 0; m < 2; m++)
      a[s][m] = real[m] ? load16(a_at + (s * 4 + m) * 256) : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int s = 0; s < STEPS_K; s++) {
#pragma unroll
    for (int n = 0; n < NT / 16; n++) {
      u32 b[4];
      load_matrices(b, b_at + n * 16 * PITCH + s * 32);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        multiply(c[m][2 * n], a[s % AHEAD][m], b[0], b[1]);
        multiply(c[m][2 * n + 1], a[s % AHEAD][m], b[2], b[3]);
      }
    }
    if (s + AHEAD < STEPS_K)
#pragma unroll
      for (int m = 0; m < 2; m++)
        if (real[m]) a[s % AHEAD][m] = load16(a_at + ((s + AHEAD) * 4 + m) * 256);
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < NT / 8; n++) {
      float *to = sums + (group * ROWS + rows * 32 + m * 16 + lane / 4) * (NT + 8) + n * 8 + lane % 4 * 2;
      *(float2 *)to = make_float2(c[m][n][0], c[m][n][1]);
      *(float2 *)(to + 8 * (NT + 8)) = make_float2(c[m][n][2], c[m][n][3]);
    }
  __syncthreads();
}

// The sum over k-groups of COUNT neighbours; sums of NT columns.
template <int NT, int COUNT>
__device__ __forceinline__ void add_groups(float (&out)[COUNT], const float *sums, int row, int column) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int g = 0; g < 4; g++) {
      float4 v = *(const float4 *)(sums + (g * ROWS + row) * (NT + 8) + column + i);
      total.x += v.x; total.y += v.y; total.z += v.z; total.w += v.w;
    }
    out[i] = total.x; out[i + 1] = total.y; out[i + 2] = total.z; out[i + 3] = total.w;
  }
}

// r = 1 / rms(x) of row threadIdx.x / 4: the loads, which may be under way during a product, and the rest.
struct RowScale {
  float parts[COLUMN_TILES / 4];
  __device__ __forceinline__ void load(const Flow &flow) {
#pragma unroll
    for (int i = 0; i < COLUMN_TILES / 4; i++)
      parts[i] = load_float(flow.squares + (threadIdx.x % 4 * (COLUMN_TILES / 4) + i) * ROWS + threadIdx.x / 4);
  }
  __device__ __forceinline__ float value() const {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < COLUMN_TILES / 4; i++) total += parts[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    return rsqrtf(total / WIDTH + 1e-6f);
  }
};

// ---- phases -------------------------------------------------------------------------------------

__device__ __forceinline__ void query_key_value(const Flow &flow, const Layer &layer, const float *bias) {
  int tile = blockIdx.x;
  if (tile >= QKV_TILES) return;
  float *sums = (float *)shared;
  RowScale scale;
  scale.load(flow);
  int head = tile * 16 / HALF, begin = tile * 16 % HALF;
  int row = threadIdx.x / 4, channel = begin + threadIdx.x % 4 * 4;
  float4 bias_a = *(const float4 *)(bias + head * HEAD_DIM + channel);
  float4 bias_b = *(const float4 *)(bias + head * HEAD_DIM + channel + HALF);
  uint2 cos = make_uint2(0, 0), sin = cos;
  if (row < HORIZON && head <= HEADS) {
    cos = *(const uint2 *)(flow.cos + row * HEAD_DIM + channel);
    sin = *(const uint2 *)(flow.sin + row * HEAD_DIM + channel);
  }
  product<32, WIDTH, PITCH_D>(flow.scaled, shared_address(shared), sums);
  float r = scale.value();
  if (row >= HORIZON) return;
  float a[4], b[4];
  add_groups<32>(a, sums, row, threadIdx.x % 4 * 4);
  add_groups<32>(b, sums, row, 16 + threadIdx.x % 4 * 4);
  const float ba[4] = {bias_a.x, bias_a.y, bias_a.z, bias_a.w}, bb[4] = {bias_b.x, bias_b.y, bias_b.z, bias_b.w};
  const float co[4] = {low(cos.x), high(cos.x), low(cos.y), high(cos.y)};
  const float si[4] = {low(sin.x), high(sin.x), low(sin.y), high(sin.y)};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float x = a[i] * r + ba[i], y = b[i] * r + bb[i];
    a[i] = head <= HEADS ? x * co[i] - y * si[i] : x;
    b[i] = head <= HEADS ? y * co[i] + x * si[i] : y;
  }
  if (head < HEADS) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      store_pair(flow.queries + fragment<R_BLOCKS * 4>(head * HORIZON + row, channel + i), a[i], a[i + 1]);
      store_pair(flow.queries + fragment<R_BLOCKS * 4>(head * HORIZON + row, channel + HALF + i), b[i], b[i + 1]);
    }
  } else {
    bf16 *to = (head == HEADS ? layer.keys : layer.values) + (long long)(layer.n_prefix + row) * (PITCH_KV / 2) + channel;
    *(uint2 *)to = make_uint2(pack(a[0], a[1]), pack(a[2], a[3]));
    *(uint2 *)(to + HALF) = make_uint2(pack(b[0], b[1]), pack(b[2], b[3]));
  }
}

// One unit: 64 rows of all heads, one block of keys.
__device__ __forceinline__ void attend(const Flow &flow, const Layer &layer, int block_of_rows, int part, bool watched) {
  constexpr float SCALE = 1.4426950408889634f / 16.f;  // log2(e) / sqrt(256)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp >> 1, half = warp & 1;
  u32 base = shared_address(shared);
  float *scores = (float *)shared;  // [64, SCORE_PITCH]
  const bf16 *q_at = flow.queries + ((block_of_rows * 4 + m) * 32 + lane) * 8;
  float s[4][4] = {};
  {
    u32 b_at = base + A_KEYS + (half * 32 + (lane >> 4) * 8 + (lane & 7)) * PITCH_KV + ((lane >> 3) & 1) * 16;
    uint4 q[16];
#pragma unroll
    for (int k = 0; k < 16; k++) q[k] = load16(q_at + k * (R_BLOCKS * 4) * 256);
#pragma unroll
    for (int k = 0; k < 16; k++)
#pragma unroll
      for (int n = 0; n < 2; n++) {
        u32 b[4];
        load_matrices(b, b_at + n * 16 * PITCH_KV + k * 32);
        multiply(s[2 * n], q[k], b[0], b[1]);
        multiply(s[2 * n + 1], q[k], b[2], b[3]);
      }
  }
  int g = lane / 4, t = lane % 4, row = m * 16 + g;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    float *to = scores + row * SCORE_PITCH + half * 32 + n * 8 + t * 2;
    *(float2 *)to = make_float2(s[n][0], s[n][1]);
    *(float2 *)(to + 8 * SCORE_PITCH) = make_float2(s[n][2], s[n][3]);
  }
  __syncthreads();
  // Every warp takes all 64 keys of its 16 rows, and half of the channels.
  int n_read = layer.n_prefix, n_keys = layer.n_prefix + HORIZON;
  if (flow.n_valid) n_read += (int)*flow.n_valid - flow.n_slots;
  float v[4][2][4];  // [16 keys each][row, row + 8][keys 2t, 2t+1, 2t+8, 2t+9]
  float top[2] = {-1e30f, -1e30f};
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float2 pair = *(float2 *)(scores + (row + 8 * h) * SCORE_PITCH + k * 16 + e * 8 + t * 2);
        int key = part * KEYS + k * 16 + e * 8 + t * 2;
        bool first = key < n_read || (key >= layer.n_prefix && key < n_keys);
        bool second = key + 1 < n_read || (key + 1 >= layer.n_prefix && key + 1 < n_keys);
        v[k][h][2 * e] = first ? pair.x * SCALE : -1e30f;
        v[k][h][2 * e + 1] = second ? pair.y * SCALE : -1e30f;
        top[h] = fmaxf(top[h], fmaxf(v[k][h][2 * e], v[k][h][2 * e + 1]));
      }
  float total[2] = {0.f, 0.f};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float p = v[k][h][e] > -1e29f ? exp2_fast(v[k][h][e] - top[h]) : 0.f;
        v[k][h][e] = p;
        total[h] += p;
      }
    total[h] += __shfl_xor_sync(~0u, total[h], 1);
    total[h] += __shfl_xor_sync(~0u, total[h], 2);
  }
  float o[16][4] = {};
  u32 v_at = base + A_VALUES + (((lane >> 3) & 1) * 8 + (lane & 7)) * PITCH_KV + (half * 128 + (lane >> 4) * 8) * 2;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint4 p;
    p.x = pack(v[k][0][0], v[k][0][1]);
    p.y = pack(v[k][1][0], v[k][1][1]);
    p.z = pack(v[k][0][2], v[k][0][3]);
    p.w = pack(v[k][1][2], v[k][1][3]);
#pragma unroll
    for (int n = 0; n < 8; n++) {
      u32 b[4];
      load_transposed(b, v_at + k * 16 * PITCH_KV + n * 32);
      multiply(o[2 * n], p, b[0], b[1]);
      multiply(o[2 * n + 1], p, b[2], b[3]);
    }
  }
  // Through shared memory, so that rows are written in whole pieces.
  constexpr int PITCH = 128 + 8;
  bf16 *stage = (bf16 *)(shared + ROWS * SCORE_PITCH * 4) + warp * 16 * PITCH;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float share = total[h] > 0.f ? 1.f / total[h] : 0.f;
#pragma unroll
    for (int n = 0; n < 16; n++)
      store_pair(stage + (g + 8 * h) * PITCH + n * 8 + t * 2, o[n][2 * h] * share, o[n][2 * h + 1] * share);
    int r = block_of_rows * ROWS + row + 8 * h;
    if (half == 0 && t == 0 && r < R)
      flow.lse[part * R + r] = total[h] > 0.f ? top[h] + log2f(total[h]) : -1e30f;
    if (watched && half == 1 && r < R && part * KEYS < flow.n_visual) {
      float *to = flow.shares + (long long)r * flow.n_visual + part * KEYS + t * 2;
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          *(float2 *)(to + k * 16 + e * 8) = make_float2(v[k][h][2 * e] * share, v[k][h][2 * e + 1] * share);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 256; i += 32) {
    int r = block_of_rows * ROWS + m * 16 + i / 16;
    if (r < R)
      *(uint4 *)(flow.parts + ((long long)part * R + r) * HEAD_DIM + half * 128 + i % 16 * 8) = *(uint4 *)(stage + i / 16 * PITCH + i % 16 * 8);
  }
}

__device__ __forceinline__ void attention(const Flow &flow, const Layer &layer, Deliveries &d, bool watched) {
  int parts = (layer.n_prefix + HORIZON + KEYS - 1) / KEYS;
  u32 a = shared_address(shared);
  d.wait(KEYS_VALUES);
  for (int unit = blockIdx.x; unit < parts * R_BLOCKS; unit += PROGRAMS) {
    int part = unit / R_BLOCKS;
    if (unit != blockIdx.x) {
      __syncthreads();  // everyone is done with the last unit's keys
      fetch_prefix(d, a, layer, part);
      d.wait(KEYS_VALUES);
    }
    fetch_suffix(a, layer, part);
    __syncthreads();
    attend(flow, layer, unit % R_BLOCKS, part, watched);
  }
}

__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
__device__ __forceinline__ float sum(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// Rows b, b + 128 and so on are program b's; at most 32 parts.
__device__ __forceinline__ void join(const Flow &flow, const Layer &layer) {
  constexpr int AT_ONCE = 16;
  int parts = (layer.n_prefix + HORIZON + KEYS - 1) / KEYS, lane = threadIdx.x % 32;
  int row = blockIdx.x + threadIdx.x / 32 * PROGRAMS;
  if (row >= R) return;
  const bf16 *from = flow.parts + (long long)row * HEAD_DIM + lane * 8;
  float lse = lane < parts ? load_float(flow.lse + lane * R + row) : -1e30f;
  float out[8] = {}, weight = 0.f;
  for (int start = 0; start < parts; start += AT_ONCE) {
    uint4 v[AT_ONCE];
#pragma unroll
    for (int p = 0; p < AT_ONCE; p++)
      v[p] = start + p < parts ? load16(from + (long long)(start + p) * R * HEAD_DIM) : make_uint4(0, 0, 0, 0);
    if (start == 0) {
      weight = exp2_fast(lse - largest(lse));
      weight /= sum(weight);
    }
#pragma unroll
    for (int p = 0; p < AT_ONCE; p++) {
      float w = __shfl_sync(~0u, weight, (start + p) & 31);
      out[0] += w * low(v[p].x); out[1] += w * high(v[p].x); out[2] += w * low(v[p].y); out[3] += w * high(v[p].y);
      out[4] += w * low(v[p].z); out[5] += w * high(v[p].z); out[6] += w * low(v[p].w); out[7] += w * high(v[p].w);
    }
  }
  int head = row / HORIZON, t = row % HORIZON;
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    store_pair(flow.attended + fragment<4>(t, head * HEAD_DIM + lane * 8 + i), out[i], out[i + 1]);
}

// Shares of the visual tokens, summed over this program's rows.
__device__ __forceinline__ void add_saliency(const Flow &flow, const Layer &layer, int slot) {
  int parts = (layer.n_prefix + HORIZON + KEYS - 1) / KEYS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *weights = (float *)(shared + SMALL);  // [4, 32]: of each part in this program's rows
  int row = blockIdx.x + warp * PROGRAMS;
  if (warp < 4) {
    int counted = flow.over_all ? parts : flow.n_visual / KEYS;
    float lse = lane < counted && row < R ? load_float(flow.lse + lane * R + row) : -1e30f;
    float weight = exp2_fast(lse - largest(lse));
    weights[warp * 32 + lane] = row < R ? weight / sum(weight) : 0.f;
  }
  __syncthreads();
  float *to = flow.saliency + ((long long)slot * PROGRAMS + blockIdx.x) * flow.n_visual;
  for (int key = threadIdx.x; key < flow.n_visual; key += THREADS) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = blockIdx.x + i * PROGRAMS;
      if (r < R) total += weights[i * 32 + key / KEYS] * load_float(flow.shares + (long long)r * flow.n_visual + key);
    }
    to[key] = total;
  }
}

// x += gate * (fragments @ weight.T): this program has COLUMNS columns and a part of K, its cluster all.
template <int K, int PITCH>
__device__ __forceinline__ void residual(const Flow &flow, const bf16 *fragments, const float *gate, const float *scale) {
  int tile = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, lane = threadIdx.x % LANES;
  int row = rank * (ROWS / CLUSTER) + threadIdx.x / LANES, column = tile * COLUMNS + lane * 2;  // what it finishes
  float2 g = *(const float2 *)(gate + column), s = *(const float2 *)(scale + column);
  float2 x = load_float2(flow.x + row * WIDTH + column);
  float *sums = (float *)(shared + A_BYTES);
  product<COLUMNS, K / CLUSTER, PITCH>(fragments + (long long)rank * (K / CLUSTER / 16) * 4 * 256, shared_address(sums), sums);
  {
    constexpr int COUNT = COLUMNS / 4;
    float own[COUNT];
    int r = threadIdx.x / 4, c = threadIdx.x % 4 * COUNT;
    add_groups<COLUMNS>(own, sums, r, c);
#pragma unroll
    for (int i = 0; i < COUNT; i += 4)
      *(float4 *)(sums + r * (COLUMNS + 8) + c + i) = make_float4(own[i], own[i + 1], own[i + 2], own[i + 3]);
  }
  cluster_arrive();
  cluster_wait();
  u32 at = shared_address(sums + row * (COLUMNS + 8) + lane * 2);
  float2 total = make_float2(0.f, 0.f);
#pragma unroll
  for (int peer = 0; peer < CLUSTER; peer++) {
    u32 there;
    float a, b;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(peer));
    asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(a), "=f"(b) : "r"(there));
    total.x += a;
    total.y += b;
  }
  cluster_arrive();
  x.x += g.x * total.x;
  x.y += g.y * total.y;
  float square = x.x * x.x + x.y * x.y;
#pragma unroll
  for (int i = LANES / 2; i; i >>= 1) square += __shfl_xor_sync(~0u, square, i);
  if (row < HORIZON) {
    *(float2 *)(flow.x + row * WIDTH + column) = x;
    store_pair(flow.scaled + fragment<4>(row, column), x.x * s.x, x.y * s.y);
    if (lane == 0) flow.squares[tile * ROWS + row] = square;
  }
  cluster_wait();  // nobody reads these sums any more
}

__device__ __forceinline__ void gate_up(const Flow &flow, const float *bias) {
  float *sums = (float *)shared;
  RowScale scale;
  scale.load(flow);
  int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8, channel = blockIdx.x * 32 + column;
  float bg[8], bu[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *(float4 *)(bg + i) = *(const float4 *)(bias + channel + i);
    *(float4 *)(bu + i) = *(const float4 *)(bias + MLP + channel + i);
  }
  product<64, WIDTH, PITCH_D>(flow.scaled, shared_address(shared), sums);
  float r = scale.value(), g[8], u[8];
  add_groups<64>(g, sums, row, column);
  add_groups<64>(u, sums, row, 32 + column);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float x = g[i] * r + bg[i], y = u[i] * r + bu[i];
    // gelu(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)): the tanh form, without a tanh
    g[i] = x * y / (1.f + exp2_fast(-2.302208198f * (x + 0.044715f * x * x * x)));
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    store_pair(flow.hidden + fragment<4>(row, channel + i), g[i], g[i + 1]);
}

// The end of an Euler step (if there was one) and the beginning of the next: program = row.
__device__ __forceinline__ void advance(const Flow &flow, int step) {
  int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= HORIZON) return;
  float *small = (float *)(shared + SMALL);  // new actions, then sums of squares
  if (step > 0) {
    const float *scale = flow.final_scale + (step - 1) * WIDTH, *shift = flow.final_shift + (step - 1) * WIDTH;
    float square = 0.f;
    for (int i = lane; i < COLUMN_TILES; i += 32) square += load_float(flow.squares + i * ROWS + row);
#pragma unroll
    for (int i = 16; i; i >>= 1) square += __shfl_xor_sync(~0u, square, i);
    float r = rsqrtf(square / WIDTH + 1e-6f);
    float y[WIDTH / 64][2];
#pragma unroll
    for (int i = 0; i < WIDTH / 64; i++) {
      int k = i * 64 + lane * 2;
      float2 x = load_float2(flow.x + row * WIDTH + k), s = *(const float2 *)(scale + k), b = *(const float2 *)(shift + k);
      y[i][0] = round_bf16(x.x * r * s.x + b.x);
      y[i][1] = round_bf16(x.y * r * s.y + b.y);
    }
    for (int a = warp; a < ACTION_DIM; a += THREADS / 32) {
      float v = 0.f;
#pragma unroll
      for (int i = 0; i < WIDTH / 64; i++) {
        float2 w = *(const float2 *)(flow.out_weight + a * WIDTH + i * 64 + lane * 2);
        v += w.x * y[i][0] + w.y * y[i][1];
      }
#pragma unroll
      for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
      if (lane == 0) {
        float action = load_float(flow.actions + row * ACTION_DIM + a) + flow.dt * (v + flow.out_bias[a]);
        flow.actions[row * ACTION_DIM + a] = action;
        small[a] = action;
      }
    }
  } else if (threadIdx.x < ACTION_DIM) {
    small[threadIdx.x] = load_float(flow.actions + row * ACTION_DIM + threadIdx.x);
  }
  if (step == STEPS) return;
  __syncthreads();
  const float *scale = flow.attention_scale + (long long)step * DEPTH * WIDTH;
  float square = 0.f;
  for (int k = threadIdx.x * 2; k < WIDTH; k += THREADS * 2) {
    float x[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      x[e] = flow.in_bias[k + e];
#pragma unroll
      for (int a = 0; a < ACTION_DIM; a += 4) {
        float4 w = *(const float4 *)(flow.in_weight + (k + e) * ACTION_DIM + a);
        x[e] += w.x * small[a] + w.y * small[a + 1] + w.z * small[a + 2] + w.w * small[a + 3];
      }
      square += x[e] * x[e];
    }
    *(float2 *)(flow.x + row * WIDTH + k) = make_float2(x[0], x[1]);
    store_pair(flow.scaled + fragment<4>(row, k), x[0] * scale[k], x[1] * scale[k + 1]);
  }
#pragma unroll
  for (int i = 16; i; i >>= 1) square += __shfl_xor_sync(~0u, square, i);
  if (lane == 0) small[ACTION_DIM + warp] = square;
  __syncthreads();
  if (threadIdx.x < COLUMN_TILES) {
    float total = 0.f;
    if (threadIdx.x == 0)
      for (int i = 0; i < THREADS / 32; i++) total += small[ACTION_DIM + i];
    flow.squares[threadIdx.x * ROWS + row] = total;
  }
}

// ---- the flow -----------------------------------------------------------------------------------

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
expert_flow(const __grid_constant__ Flow flow) {
  u32 target = 0, a = shared_address(shared), b = a + A_BYTES;
  int first_part = blockIdx.x / R_BLOCKS;  // of this program's first unit of attention
  bool projects = blockIdx.x < QKV_TILES;
  Deliveries d;
  d.begin(a + SMALL + 768);
  fetch_qkv(d, a, flow.layers[0]);
  fetch_prefix(d, a, flow.layers[0], first_part);
  fetch_columns<PITCH_O>(d, b, flow.layers[0].o);
  advance(flow, 0);
  grid_arrive(flow.barrier);
  for (int step = 0; step < STEPS; step++) {
    for (int number = 0; number < DEPTH; number++) {
      const Layer &layer = flow.layers[number];
      int at = step * DEPTH + number, next = number + 1 < DEPTH ? number + 1 : 0;
      bool more = at + 1 < STEPS * DEPTH;
      grid_wait(flow.barrier, target);
      if (projects) d.wait(QKV_WEIGHTS);
      query_key_value(flow, layer, flow.qkv_bias + (long long)at * QKV);
      grid_arrive(flow.barrier);

      grid_wait(flow.barrier, target);
      bool watched = flow.saliency && flow.watched[number] >= 0 && step >= flow.first_watched && step <= flow.last_watched;
      attention(flow, layer, d, watched);
      grid_arrive(flow.barrier);
      fetch_gate_up(d, a, layer);

      grid_wait(flow.barrier, target);
      join(flow, layer);
      if (watched) add_saliency(flow, layer, (step - flow.first_watched) * flow.n_watched + flow.watched[number]);
      grid_arrive(flow.barrier);

      grid_wait(flow.barrier, target);
      d.wait(COLUMN_WEIGHTS);
      residual<Q_WIDTH, PITCH_O>(flow, flow.attended, flow.attention_gate + (long long)at * WIDTH,
                                 flow.mlp_scale + (long long)at * WIDTH);
      grid_arrive(flow.barrier);
      fetch_columns<PITCH_DOWN>(d, b, layer.down);

      grid_wait(flow.barrier, target);
      d.wait(GATE_UP_WEIGHTS);
      gate_up(flow, flow.gate_up_bias + (long long)at * 2 * MLP);
      grid_arrive(flow.barrier);
      if (more) {
        fetch_qkv(d, a, flow.layers[next]);
        fetch_prefix(d, a, flow.layers[next], first_part);
      }

      grid_wait(flow.barrier, target);
      d.wait(COLUMN_WEIGHTS);
      // The scale of the next layer's norm; after the last layer nobody reads the product.
      residual<MLP, PITCH_DOWN>(flow, flow.hidden, flow.mlp_gate + (long long)at * WIDTH,
                                flow.attention_scale + (long long)(more ? at + 1 : at) * WIDTH);
      grid_arrive(flow.barrier);
      if (more) fetch_columns<PITCH_O>(d, b, flow.layers[next].o);
    }
    grid_wait(flow.barrier, target);
    advance(flow, step + 1);
    grid_arrive(flow.barrier);
  }
}
