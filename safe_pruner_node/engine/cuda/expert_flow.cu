// The whole flow of the action expert in one launch, every Euler step, every layer; and what comes before it.
//
// 128 programs, one per multiprocessor, stay for the whole flow. A layer is six phases; program p is
// tile t = p / 8 and share s = p % 8 of a split product:
//
//   1 query/key/value   32 channels x all rows, K whole     80 programs; rotary embedding
//   2 attention         rows of head s x 64 keys            8 * P programs, P blocks of keys
//   3 join              the blocks' softmaxes made one      rows t, t + 16, .. of head s
//   4 output            64 channels x all rows, K of head s; the tile's 8 programs exchange their parts
//   5 gate/up           64 channels x all rows, K whole     GELU
//   6 down              as 4, K of hidden channels s * M/8 and on
//
// Four warps compute (`wgmma`, 64 rows at once, of which HORIZON are real). Beside them one warp brings
// weights and the prefix's keys and values through a ring in shared memory, as far ahead as the ring
// allows; one brings what other programs have computed, as soon as it is announced; two sum up the
// squares for the norms.
//
// How programs wait for each other. Who has written something adds 1 to a counter of those who read it,
// behind a fence, and who reads waits for the sum. Where that would cost most (the parts of a split product
// and of a softmax) there is neither counter nor fence: the lowest bit of every word says in which round it
// was written, and who reads looks until all words say so. It costs half of the numbers their last bit.
// A fence waits for whatever is on its way from memory to this multiprocessor, so weights are asked for
// behind an announcement where there is time, and behind the inputs of the next product.
// Who waits for seconds ends the kernel with an error: better than a GPU that hangs.
//
// Everything an operand is read from lies as shared memory wants it ("images"): chunks of rows of 64
// numbers, 128 bytes each, the eight 16-byte pieces of row r at piece ^ (r % 8).
//
// Norms as in kernels/modulated_pair.py: norm(x) @ W = r * ((x * (1 + s)) @ W) + b @ W.
//
// Compiled with WIDTH, MLP, HEADS, HEAD_DIM, DEPTH, STEPS, HORIZON, ACTION_DIM defined. Shapes: H rows
// (HORIZON), D width, M MLP channels, h heads, d head_dim, A action_dim, N prefix keys of a layer, P blocks of keys.

#include "sm90.cuh"

constexpr int PROGRAMS = 128, SHARES = 8, TILES = PROGRAMS / SHARES, COMPUTING = 128, THREADS = 256;
constexpr int ROWS = (HORIZON + 7) / 8 * 8;  // of action rows in an image
constexpr int KEYS = 64, HALF = HEAD_DIM / 2;
constexpr int QKV = (HEADS + 2) * HEAD_DIM, QKV_TILES = QKV / 32, FIRST_QKV = 48;  // program of tile 0
constexpr int CHUNK = 64 * 64, X_CHUNK = ROWS * 64;  // numbers in a chunk of weights, of action rows
constexpr int D_GROUPS = WIDTH / 256, HEAD_GROUPS = HEAD_DIM / 256, DOWN_GROUPS = MLP / SHARES / 256;
static_assert(HEADS == SHARES && HEAD_DIM == 256 && WIDTH == 64 * TILES && MLP == 32 * PROGRAMS, "sizes");
static_assert(HORIZON <= 64 && FIRST_QKV + QKV_TILES <= PROGRAMS && ACTION_DIM <= 32 && ACTION_DIM % 4 == 0, "sizes");

// Shared memory: two rings of groups of four chunks.
constexpr int SLOT = CHUNK * 2, GROUP = 4 * SLOT, W_GROUPS = 4, X_GROUPS = 3, X_PIECES = 2;
constexpr int X_AT = W_GROUPS * GROUP, SMALL_AT = X_AT + X_GROUPS * GROUP;
constexpr int SCALES_AT = SMALL_AT + 384, SCRATCH_AT = SCALES_AT + 512;
// + 640 of scratch, + 1024 to align: SHARED_BYTES of the launch

struct Layer {
  const bf16 *qkv, *o, *gate_up, *down;  // images
  const bf16 *prefix_keys, *prefix_values;  // [N, d]
  bf16 *keys, *values;                   // images [P, 4, 64 keys, 64]; `prepare` puts the prefix there
  bf16 *parts;                           // [P, h, 64 rows, d] in pieces, see `attend`; shared by its kind
  float *lse;                            // [P, h, H], base 2
  int n_prefix;
  short of_kind, kinds;                  // which of how many layers with so many keys
};

struct Flow {
  Layer layers[DEPTH];
  // Modulation of every step and layer, fp32: 1 + scale, gate [D] each; bias behind the products.
  const float *attention_scale, *attention_gate, *qkv_bias;  // [STEPS, DEPTH, .]
  const float *mlp_scale, *mlp_gate, *gate_up_bias;
  const float *final_scale, *final_shift;                    // [STEPS, D]
  const float *in_weight, *in_bias, *out_weight, *out_bias;  // [A, D], [D], [A, D], [A]
  const bf16 *cos, *sin;                                     // of every position, [positions, d]
  const long long *n_valid;                                  // text tokens that are no padding, or null
  const float *noise;                                        // [H, A]
  float *actions;                                            // out, [H, A]; between steps
  float *x;                                                  // [H, D], between steps
  bf16 *scaled;                                              // image of x * (1 + s), [D/64, ROWS, 64]
  bf16 *queries;                                             // images [h, 4, 64 rows, 64]
  bf16 *attended;                                            // images [h, 4, ROWS, 64]
  bf16 *hidden;                                              // image [M/64, ROWS, 64]
  float *squares;                                            // [PROGRAMS, 64] sums of x * x
  bf16 *exchange;                                            // [2, TILES, SHARES to, SHARES from, 512]
  u32 *counters;                                             // zero at launch
  float *shares;                                             // a keyframe's: [h, H, n_visual], scratch
  float *saliency;                                           // out: [watched layers, PROGRAMS, n_visual], or null;
                                                             // zero at launch, the programs' sum is the mean
  void *zeros;                                               // what `prepare` makes zero
  int n_zeros;                                               // so many 16 bytes
  int n_slots;                                               // text tokens and padding
  int n_visual;                                              // a multiple of 64 where there is saliency
  int over_all;                                              // its softmax: over all keys, else visual ones
  int first_watched, last_watched;                           // steps whose saliency is taken
  int watched[DEPTH];                                        // per layer its place in `saliency`, or -1
  float dt;
};

extern __shared__ unsigned char unaligned[];

// ---- small things -------------------------------------------------------------------------------

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float round_bf16(float x) { return low(pack(x, 0.f)); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ unsigned char *shared_memory() {
  u32 at = shared_address(unaligned);
  return unaligned + ((1024 - at % 1024) % 1024);
}

// Asked for anew in every phase, or the compiler keeps addresses of all phases in registers, which the
// products need.
__device__ __forceinline__ int this_thread() {
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}
__device__ __forceinline__ int this_program() {
  int i;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
  return i;
}

// What other programs have written is read past the first-level cache, which nobody keeps coherent.
__device__ __forceinline__ uint4 load16(const void *p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ float4 load_float4(const float *p) {
  uint4 v = load16(p);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
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
__device__ __forceinline__ void computing_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
__device__ __forceinline__ float sum(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
__device__ __forceinline__ int parts_of(const Layer &layer) { return (layer.n_prefix + HORIZON + KEYS - 1) / KEYS; }

// Who has a tile of phase 1.
__device__ __forceinline__ bool projects(int program) { return program >= FIRST_QKV && program < FIRST_QKV + QKV_TILES; }
// Which block of keys; the suffix, whose keys come last, is for programs without phase 1.
__device__ __forceinline__ int part_of(const Layer &layer, int unit) { return parts_of(layer) - 1 - unit / HEADS; }

// The suffix comes behind the text, and pruned tokens keep their positions.
__device__ __forceinline__ int first_position(const Flow &flow) {
  return flow.n_visual + (flow.n_valid ? (int)*flow.n_valid : flow.n_slots);
}

// ---- between programs ---------------------------------------------------------------------------

// Counters, each in a line of its own: who adds, and how often per layer.
enum Counter {
  X = 0,                        // of a tile of x: SHARES after phases 4 and 6, and the rows of `advance` per step
  KEYS_VALUES = TILES,          // of the suffix: 16 tiles, 4 warps each
  QUERIES = KEYS_VALUES + 1,    // of a head: 8 tiles, 4 warps each
  ATTENDED = QUERIES + HEADS,   // of a head: its rows
  HIDDEN = ATTENDED + HEADS,    // of a share of K: 16 programs, 4 warps each
  COUNTERS = HIDDEN + SHARES,
};
__device__ __forceinline__ u32 *counter(const Flow &flow, int which) { return flow.counters + which * 32; }

// Waiting has an end: after so many looks, which take seconds.
__device__ __forceinline__ void one_more(int &tries) {
  if (++tries > (1 << 22)) asm volatile("trap;");
}

// By one thread, after whatever makes the others' writes come before it.
__device__ __forceinline__ void announce(u32 *counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void await(u32 *counter, u32 target) {
  u32 seen;
  int tries = 0;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    one_more(tries);
  } while ((int)(seen - target) < 0);
}
// All tiles of x, by a whole warp, after `steps` times `advance`, whose row r counts for tile r % TILES.
__device__ __forceinline__ void await_x(const Flow &flow, u32 per_tile, u32 steps) {
  int tile = threadIdx.x % 32;
  u32 target = per_tile + steps * ((HORIZON - tile + TILES - 1) / TILES), seen = target;
  int tries = 0;
  do {
    if (tile < TILES) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter(flow, X + tile)) : "memory");
    one_more(tries);
  } while (!__all_sync(~0u, (int)(seen - target) >= 0));
}
// Ordinary writes come before what the copy engine reads.
__device__ __forceinline__ void order_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- barriers and rings in shared memory --------------------------------------------------------

__device__ __forceinline__ void barrier_arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory");
}

// What is read once per step (weights) must not drive out of L2 what is read in every layer, or at least in
// every step (keys and values).
enum Use { ONCE, EVERY_STEP, EVERY_LAYER };
template <Use USE>
__device__ __forceinline__ void copy_bulk(u32 to, const void *from, u32 bytes, u32 barrier) {
  barrier_expect(barrier, bytes);
  u64 policy;
  if (USE == ONCE) asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else if (USE == EVERY_STEP) asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  else asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// One side of a ring of groups of four chunks, which come in so many pieces and go together.
template <int GROUPS, int PIECES>
struct Ring {
  u32 slots, barriers, at = 0, parity = 0;
  u32 oldest = 0;  // group that is not free yet
  int pending = 0;  // groups that could be free
  __device__ __forceinline__ Ring(u32 slots, u32 barriers) : slots(slots), barriers(barriers) {}
  static constexpr int BARRIERS = GROUPS * (PIECES + 1);
  __device__ __forceinline__ u32 full(int piece) const { return barriers + (at * PIECES + piece) * 8; }
  __device__ __forceinline__ u32 empty(u32 which) const { return barriers + (GROUPS * PIECES + which) * 8; }
  __device__ __forceinline__ u32 slot() const { return slots + at * GROUP; }
  __device__ __forceinline__ void init() {
    for (int i = 0; i < GROUPS * PIECES; i++) barrier_init(barriers + i * 8, 1);
    for (int i = 0; i < GROUPS; i++) barrier_init(empty(i), COMPUTING / 32);
  }
  __device__ __forceinline__ void next() {
    if (++at == GROUPS) at = 0, parity ^= 1;
  }
  // By one thread: bring so many groups of BYTES each, each as soon as there is room.
  template <Use USE, int BYTES>
  __device__ __forceinline__ void bring(int groups, const bf16 *from) {
#pragma unroll 1
    for (int i = 0; i < groups; i++) {
      const bf16 *group = from + i * (BYTES / 2);
      barrier_wait(empty(at), parity ^ 1);
#pragma unroll
      for (int n = 0; n < PIECES; n++)
        copy_bulk<USE>(slot() + n * (BYTES / PIECES), group + n * (BYTES / 2 / PIECES), BYTES / PIECES, full(n));
      next();
    }
  }
  __device__ __forceinline__ void wait(int piece) const { barrier_wait(full(piece), parity); }
  // By every warp that computes: the oldest groups that it still holds are free.
  __device__ __forceinline__ void free(int groups) {
    for (; groups > 0; groups--) {
      if (threadIdx.x % 32 == 0) barrier_arrive(empty(oldest));
      if (++oldest == GROUPS) oldest = 0;
    }
  }
  // Now that the inputs of the next product, which are awaited, do not queue behind new weights.
  __device__ __forceinline__ void free_pending() {
    free(pending);
    pending = 0;
  }
};
using Weights = Ring<W_GROUPS, 1>;
using Inputs = Ring<X_GROUPS, X_PIECES>;

// ---- tensor cores -------------------------------------------------------------------------------

// What is the same in all lanes; the compiler does not see it of itself.
__device__ __forceinline__ u32 same_in_all(u32 x) { return __shfl_sync(~0u, x, 0); }


#define SUMS(c) \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), \
  "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), \
  "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), \
  "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define PLACES \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

// c[64 rows, 64 columns] (+)= a[rows, 16 of K] @ b[columns, 16 of K].T. A lane has rows 16 * warp + lane / 4
// (+ 8) and columns 8 * j + lane % 4 * 2 (+ 1): c[4 * j + 2 * (+8) + (+1)].
__device__ __forceinline__ void multiply(float (&c)[32], u32 a, u32 b, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES
               ", %32, %33, p, 1, 1, 0, 0;}" : SUMS(c) : "l"(descriptor(a)), "l"(descriptor(b)), "r"(accumulate));
}
// The same with 32 columns.
__device__ __forceinline__ void multiply(float (&c)[16], u32 a, u32 b, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1, 0, 0;}"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),
                 "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
               : "l"(descriptor(a)), "l"(descriptor(b)), "r"(accumulate));
}
// The same with a in registers and b[16 of K, columns].
__device__ __forceinline__ void multiply(float (&c)[32], const u32 (&a)[4], u32 b, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES
               ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"
               : SUMS(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(accumulate));
}

// c (+)= a group of inputs @ weights.T, of which a chunk has as many rows as c columns, at b in shared memory.
// PITCH: bytes from one chunk of inputs to the next.
template <int PITCH, int SUMS>
__device__ __forceinline__ void multiply_group(float (&c)[SUMS], u32 b_at, Inputs &x, int accumulate) {
  u32 a = same_in_all(operand(x.slot())), b = same_in_all(operand(b_at));
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk++) {
    if (chunk % (4 / X_PIECES) == 0) {
      x.wait(chunk / (4 / X_PIECES));
      multiply_begin();
    }
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(c, a + chunk * (PITCH / 16) + k * 2, b + chunk * (SUMS * 2 * 128 / 16) + k * 2, accumulate + chunk + k > 0);
  }
  multiply_commit();
}
// c = inputs @ weights.T over so many groups of inputs. The last group of weights is not freed: what would come in
// its place would hold up the fence of the next announcement. The caller makes it pending behind that.
template <int SUMS>
__device__ __forceinline__ void product(float (&c)[SUMS], int groups, Weights &w, Inputs &x) {
  constexpr int AT_ONCE = 32 / SUMS;  // groups of inputs to a group of weights
  w.wait(0);
  x.wait(0);
  w.free_pending();
#pragma unroll 1
  for (int i = 0; i < groups; i++) {
    if (i % AT_ONCE == 0) w.wait(0);
    multiply_group<X_CHUNK * 2>(c, w.slot() + i % AT_ONCE * (GROUP / AT_ONCE), x, i);
    x.next();
    if (i > 0) {
      multiply_wait<1>();
      x.free(1);
      if (i % AT_ONCE == 0) w.free(1);
    }
    if (i % AT_ONCE == AT_ONCE - 1) w.next();
  }
  multiply_wait<0>(c);
  x.free(1);
}

// ---- phases -------------------------------------------------------------------------------------

// By every warp that computes, after its writes.
__device__ __forceinline__ void announce_warp(u32 *counter) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) announce(counter);
}
// Words that say in which round they were written: each is valid by itself, whatever the others are.
__device__ __forceinline__ u32 marked(u32 word, u32 round) { return (word & ~1u) | (round & 1); }
__device__ __forceinline__ bool is_marked(u32 word, u32 round) { return ((word ^ round) & 1) == 0; }
__device__ __forceinline__ bool is_marked(uint2 v, u32 round) { return (((v.x ^ round) | (v.y ^ round)) & 1) == 0; }
__device__ __forceinline__ bool is_marked(uint4 v, u32 round) { return (((v.x ^ round) | (v.y ^ round) | (v.z ^ round) | (v.w ^ round)) & 1) == 0; }
__device__ __forceinline__ void store_marked(void *to, u32 a, u32 b, u32 c, u32 d, u32 round) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(marked(a, round)), "r"(marked(b, round)),
               "r"(marked(c, round)), "r"(marked(d, round)) : "memory");
}
__device__ __forceinline__ void store_marked(void *to, u32 a, u32 b, u32 round) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(marked(a, round)), "r"(marked(b, round)) : "memory");
}
__device__ __forceinline__ void store_marked(void *to, u32 a, u32 round) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(marked(a, round)) : "memory");
}
__device__ __forceinline__ uint4 look16(const void *p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint2 look8(const void *p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 look4(const void *p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Of 8 numbers beginning with channel 8 * piece of a row: where in a chunk they lie.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 64 + (piece ^ row % 8) * 8; }

// 32 columns: 16 channels of the first half of a head and the 16 that rotate with them.
__device__ __forceinline__ void query_key_value(const Flow &flow, const Layer &layer, const float *bias, Weights &w, Inputs &x,
                                                const float *row_scale, u32 scale_ready, u32 &scale_parity) {
  int thread = this_thread(), tile = this_program() - FIRST_QKV, head = tile / 8, eighth = tile % 8;
  int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
  int position = first_position(flow) + row;
  float2 bias_a[2], bias_b[2];
  u32 co[2][2], si[2][2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    int channel = eighth * 16 + 8 * j + pair;
    bias_a[j] = *(const float2 *)(bias + head * HEAD_DIM + channel);
    bias_b[j] = *(const float2 *)(bias + head * HEAD_DIM + channel + HALF);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      co[h][j] = 0x3f803f80, si[h][j] = 0;
      if (row + 8 * h < HORIZON && head <= HEADS) {
        co[h][j] = *(const u32 *)(flow.cos + (position + 8 * h) * HEAD_DIM + channel);
        si[h][j] = *(const u32 *)(flow.sin + (position + 8 * h) * HEAD_DIM + channel);
      }
    }
  }
  float c[16];
  product(c, D_GROUPS, w, x);
  barrier_wait(scale_ready, scale_parity);
  scale_parity ^= 1;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int r = row + 8 * h, key = layer.n_prefix + r;
    if (r >= HORIZON) continue;
    float scale = row_scale[r];
    int in = head < HEADS ? r : key % KEYS;
    bf16 *to = head < HEADS ? flow.queries + head * 4 * CHUNK : (head == HEADS ? layer.keys : layer.values) + key / KEYS * 4 * CHUNK;
    to += eighth / 4 * CHUNK + pair;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float *a = c + 4 * j + 2 * h, *b = a + 8;
      float a0 = a[0] * scale + bias_a[j].x, a1 = a[1] * scale + bias_a[j].y;
      float b0 = b[0] * scale + bias_b[j].x, b1 = b[1] * scale + bias_b[j].y;
      int at = swizzled(in, eighth % 4 * 2 + j);
      *(u32 *)(to + at) = pack(a0 * low(co[h][j]) - b0 * low(si[h][j]), a1 * high(co[h][j]) - b1 * high(si[h][j]));
      *(u32 *)(to + 2 * CHUNK + at) = pack(b0 * low(co[h][j]) + a0 * low(si[h][j]), b1 * high(co[h][j]) + a1 * high(si[h][j]));
    }
  }
  announce_warp(counter(flow, head < HEADS ? QUERIES + head : KEYS_VALUES));
  w.pending++;
}

// The rows of one head against one block of keys.
// Its probabilities are written, as round watched_round, where that is not 0.
__device__ __forceinline__ void attend(const Flow &flow, const Layer &layer, int head, int part, u32 round, u32 watched_round,
                                       Weights &w, Inputs &x) {
  constexpr float SCALE = 1.4426950408889634f / 16.f;  // log2(e) / sqrt(256)
  int thread = this_thread(), warp = thread / 32, lane = thread % 32, t = lane % 4, row = warp * 16 + lane / 4;
  int n_read = layer.n_prefix, n_keys = layer.n_prefix + HORIZON;
  if (flow.n_valid) n_read += (int)*flow.n_valid - flow.n_slots;
  float s[32];
  w.wait(0);
  x.wait(0);
  w.free_pending();
  multiply_group<SLOT>(s, w.slot(), x, 0);
  multiply_wait<0>(s);
  w.next();
  x.next();
  x.free(1);
  if (part * KEYS + KEYS > n_read) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      int key = part * KEYS + i / 4 * 8 + 2 * t + i % 2;
      if (key >= n_read && (key < layer.n_prefix || key >= n_keys)) s[i] = -1e30f;
    }
  }
  float top[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 32; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    top[h] = fmaxf(top[h], -1e29f) * SCALE;  // no key at all: shares of 0
  }
#pragma unroll
  for (int i = 0; i < 32; i++) {
    s[i] = exp2_fast(s[i] * SCALE - top[i / 2 % 2]);
    total[i / 2 % 2] += s[i];
  }
  u32 p[4][4];
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[k][i] = pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    total[h] += __shfl_xor_sync(~0u, total[h], 1);
    total[h] += __shfl_xor_sync(~0u, total[h], 2);
  }
  float share[2] = {total[0] > 0.f ? 1.f / total[0] : 0.f, total[1] > 0.f ? 1.f / total[1] : 0.f};
  if (watched_round && part * KEYS < flow.n_visual) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (row + 8 * h >= HORIZON) continue;
      float *to = flow.shares + (long long)(head * HORIZON + row + 8 * h) * flow.n_visual + part * KEYS + t * 2;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        u32 a = __float_as_uint(s[4 * j + 2 * h] * share[h]), b = __float_as_uint(s[4 * j + 2 * h + 1] * share[h]);
        store_marked(to + 8 * j, a, marked(b, watched_round), watched_round);
      }
    }
  }
  // [warp, chunk, row or row + 8, 2, lane, 8 channels]: what a lane has, in two pieces.
  bf16 *to = layer.parts + ((part * HEADS + head) * 4 + warp) * 4096 + lane * 8;
  w.wait(0);
  u32 b = same_in_all(operand(w.slot()));
  float o[4][32];
  multiply_begin();
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk++) multiply(o[chunk], p[k], b + chunk * (SLOT / 16) + k * 128, k > 0);
  multiply_commit();
  multiply_wait<0>();
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (row + 8 * h >= HORIZON) continue;
      u32 v[8];
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = pack(o[chunk][4 * j + 2 * h] * share[h], o[chunk][4 * j + 2 * h + 1] * share[h]);
      store_marked(to + (chunk * 2 + h) * 512, v[0], v[1], v[2], v[3], round);
      store_marked(to + (chunk * 2 + h) * 512 + 256, v[4], v[5], v[6], v[7], round);
    }
  // Behind the rest: who waits looks here first.
  if (t < 2 && row + 8 * t < HORIZON) {
    float all = t ? total[1] : total[0], most = t ? top[1] : top[0];
    store_marked(layer.lse + (part * HEADS + head) * HORIZON + row + 8 * t, __float_as_uint(all > 0.f ? most + log2f(all) : -1e30f), round);
  }
  w.next();
  w.free(2 + w.pending), w.pending = 0;
}

// Rows t, t + 16 and so on of head s, one to a warp; at most 32 parts. Returns a lane's part's log of the softmax's sum.
__device__ __forceinline__ float join(const Flow &flow, const Layer &layer, u32 round) {
  constexpr int AT_ONCE = 16;
  int thread = this_thread(), program = this_program(), parts = parts_of(layer), lane = thread % 32, head = program % SHARES;
  int row = program / SHARES + thread / 32 * TILES;
  if (row >= HORIZON) return -1e30f;
  // As `attend` has left them: a lane reads 8 channels, 8 * j + 2 * t (+ 1) of a chunk.
  int chunk = lane / 8, t = lane % 8 / 2, half = lane % 2;
  const bf16 *from = layer.parts + (head * 4 + row / 16) * 4096 + (chunk * 2 + row % 16 / 8) * 512 + half * 256 + (row % 8 * 4 + t) * 8;
  float lse = -1e30f, out[8] = {}, weight = 0.f;
  int tries = 0;
#pragma unroll 1
  for (int start = 0; start < parts; start += AT_ONCE) {
    uint4 v[AT_ONCE];
    bool all;
    if (start == 0) {
      do {
        all = true;
        if (lane < parts) {
          u32 word = look4(layer.lse + (lane * HEADS + head) * HORIZON + row);
          lse = __uint_as_float(word);
          all = is_marked(word, round);
        }
        one_more(tries);
      } while (!__all_sync(~0u, all));
    }
    do {
      all = true;
#pragma unroll
      for (int p = 0; p < AT_ONCE; p++)
        v[p] = start + p < parts ? look16(from + (start + p) * HEADS * 4 * 4096) : make_uint4(round, round, round, round);
#pragma unroll
      for (int p = 0; p < AT_ONCE; p++) all = all && is_marked(v[p], round);
      one_more(tries);
    } while (!__all_sync(~0u, all));
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
  bf16 *to = flow.attended + (head * 4 + chunk) * X_CHUNK + t * 2;
#pragma unroll
  for (int j = 0; j < 4; j++) *(u32 *)(to + swizzled(row, half * 4 + j)) = pack(out[2 * j], out[2 * j + 1]);
  announce_warp(counter(flow, ATTENDED + head));
  return lse;
}

// Shares of the visual tokens in this program's rows, added to what it has of them. lse: from `join`.
__device__ __forceinline__ void add_saliency(const Flow &flow, int parts, int place, u32 round, float lse) {
  constexpr int ROWS_HERE = COMPUTING / 32, AT_ONCE = 3;  // pairs of keys: all 768 of three cameras, in one look
  int thread = this_thread(), program = this_program();
  int warp = thread / 32, lane = thread % 32, head = program % SHARES, first_row = program / SHARES;
  float *weights = (float *)(shared_memory() + SCRATCH_AT);  // [ROWS_HERE, 32]: of each part
  if (lane >= (flow.over_all ? parts : flow.n_visual / KEYS)) lse = -1e30f;
  float weight = exp2_fast(lse - largest(lse)), whole = sum(weight);
  int counted = HEADS * HORIZON * (flow.last_watched - flow.first_watched + 1);
  weights[warp * 32 + lane] = first_row + warp * TILES < HORIZON ? weight / (whole * counted) : 0.f;
  computing_sync();
  const float *from = flow.shares + (long long)(head * HORIZON + first_row) * flow.n_visual;
  float *to = flow.saliency + (long long)(place * PROGRAMS + program) * flow.n_visual;
#pragma unroll 1
  for (int first = thread * 2; first < flow.n_visual; first += AT_ONCE * COMPUTING * 2) {
    uint2 v[AT_ONCE][ROWS_HERE];
    float2 total[AT_ONCE];
    bool all;
    int tries = 0;
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      int key = first + j * COMPUTING * 2;
      total[j] = key < flow.n_visual ? load_float2(to + key) : make_float2(0.f, 0.f);
    }
    do {
      all = true;
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int i = 0; i < ROWS_HERE; i++) {
          int key = first + j * COMPUTING * 2, row = i * TILES;
          bool is_there = key < flow.n_visual && first_row + row < HORIZON;
          v[j][i] = is_there ? look8(from + (long long)row * flow.n_visual + key) : make_uint2(round & 1, round & 1);
        }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int i = 0; i < ROWS_HERE; i++) all = all && is_marked(v[j][i], round);
      one_more(tries);
    } while (!all);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      int key = first + j * COMPUTING * 2;
      if (key >= flow.n_visual) continue;
#pragma unroll
      for (int i = 0; i < ROWS_HERE; i++) {
        float w = weights[i * 32 + key / KEYS];
        total[j].x += w * __uint_as_float(v[j][i].x);
        total[j].y += w * __uint_as_float(v[j][i].y);
      }
      *(float2 *)(to + key) = total[j];
    }
  }
  computing_sync();  // the scratch is free again
}

// 64 columns: gate of 32 channels, and up.
__device__ __forceinline__ void gate_up(const Flow &flow, const float *bias, Weights &w, Inputs &x, const float *row_scale,
                                        u32 scale_ready, u32 &scale_parity) {
  int thread = this_thread(), program = this_program();
  int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
  float2 bias_gate[4], bias_up[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    bias_gate[j] = *(const float2 *)(bias + program * 32 + 8 * j + pair);
    bias_up[j] = *(const float2 *)(bias + MLP + program * 32 + 8 * j + pair);
  }
  float c[32];
  product(c, D_GROUPS, w, x);
  barrier_wait(scale_ready, scale_parity);
  scale_parity ^= 1;
  bf16 *to = flow.hidden + program / 2 * X_CHUNK + pair;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int r = row + 8 * h;
    if (r >= HORIZON) continue;
    float scale = row_scale[r];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float a = c[4 * j + 2 * h + e] * scale + (e ? bias_gate[j].y : bias_gate[j].x);
        float b = c[16 + 4 * j + 2 * h + e] * scale + (e ? bias_up[j].y : bias_up[j].x);
        // gelu(a) = a * sigmoid(2 sqrt(2/pi) (a + 0.044715 a^3)): the tanh form, without a tanh
        y[e] = __fdividef(a * b, 1.f + exp2_fast(-2.302208198f * (a + 0.044715f * a * a * a)));
      }
      *(u32 *)(to + swizzled(r, program % 2 * 4 + j)) = pack(y[0], y[1]);
    }
  }
  announce_warp(counter(flow, HIDDEN + program / TILES));
  w.pending++;
}

// x += gate * (inputs @ weight.T): this program has 64 channels and a share of K. Afterwards channels
// 8 * s and on of its tile are its own, all the flow long: a lane has two of a row, and of row + 8.
__device__ __forceinline__ void residual(const Flow &flow, int groups, bf16 *exchange, const float *gate, const float *scale, Weights &w,
                                         Inputs &x, float (&own)[4], bool from_memory, bool to_memory, u32 round) {
  constexpr int PIECE = 512;  // numbers from one program to another: 128 threads, 4 each
  int thread = this_thread(), program = this_program(), tile = program / SHARES, me = program % SHARES;
  int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2, channel = tile * 64 + me * 8 + pair;
  float2 g = *(const float2 *)(gate + channel), next = *(const float2 *)(scale + channel);
  if (from_memory)
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (row + 8 * h < HORIZON) {
        float2 v = load_float2(flow.x + (row + 8 * h) * WIDTH + channel);
        own[2 * h] = v.x, own[2 * h + 1] = v.y;
      }
  float c[32];
  product(c, groups, w, x);
  float total[4] = {0.f, 0.f, 0.f, 0.f};
  if (row < HORIZON) {
    bf16 *to = exchange + (tile * SHARES * SHARES + me) * PIECE + thread * 4;
#pragma unroll
    for (int j = 0; j < SHARES; j++)
      store_marked(to + j * SHARES * PIECE, pack(c[4 * j], c[4 * j + 1]), pack(c[4 * j + 2], c[4 * j + 3]), round);
    const bf16 *from = exchange + (tile * SHARES + me) * SHARES * PIECE + thread * 4;
    uint2 v[SHARES];
    bool all;
    int tries = 0;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < SHARES; i++) v[i] = look8(from + i * PIECE);
#pragma unroll
      for (int i = 0; i < SHARES; i++) all = all && is_marked(v[i], round);
      one_more(tries);
    } while (!all);
#pragma unroll
    for (int i = 0; i < SHARES; i++) total[0] += low(v[i].x), total[1] += high(v[i].x), total[2] += low(v[i].y), total[3] += high(v[i].y);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int r = row + 8 * h;
    own[2 * h] += g.x * total[2 * h];
    own[2 * h + 1] += g.y * total[2 * h + 1];
    float square = own[2 * h] * own[2 * h] + own[2 * h + 1] * own[2 * h + 1];
    square += __shfl_xor_sync(~0u, square, 1);
    square += __shfl_xor_sync(~0u, square, 2);
    if (r < HORIZON) {
      *(u32 *)(flow.scaled + tile * X_CHUNK + swizzled(r, me) + pair) = pack(own[2 * h] * next.x, own[2 * h + 1] * next.y);
      if (to_memory) *(float2 *)(flow.x + r * WIDTH + channel) = make_float2(own[2 * h], own[2 * h + 1]);
      if (pair == 0) flow.squares[program * 64 + r] = square;
    }
  }
  computing_sync();
  if (thread == 0) announce(counter(flow, X + tile));
  w.pending++;
}

// The end of an Euler step (if there was one) and the beginning of the next: program = row.
__device__ __forceinline__ void advance(const Flow &flow, int step) {
  int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *small = (float *)(shared_memory() + SCRATCH_AT);  // new actions, then sums of squares
  const float *before = (step > 1 ? flow.actions : flow.noise) + row * ACTION_DIM;
  if (step > 0) {
    const float *scale = flow.final_scale + (step - 1) * WIDTH, *shift = flow.final_shift + (step - 1) * WIDTH;
    float square = 0.f;
    for (int i = lane; i < PROGRAMS; i += 32) square += load_float(flow.squares + i * 64 + row);
    float r = rsqrtf(sum(square) / WIDTH + 1e-6f);
    float y[WIDTH / 64][2];
#pragma unroll
    for (int i = 0; i < WIDTH / 64; i++) {
      int k = i * 64 + lane * 2;
      float2 x = load_float2(flow.x + row * WIDTH + k), s = *(const float2 *)(scale + k), b = *(const float2 *)(shift + k);
      y[i][0] = round_bf16(x.x * r * s.x + b.x);
      y[i][1] = round_bf16(x.y * r * s.y + b.y);
    }
#pragma unroll 4
    for (int a = warp; a < ACTION_DIM; a += COMPUTING / 32) {
      float v = 0.f;
#pragma unroll
      for (int i = 0; i < WIDTH / 64; i++) {
        float2 w = *(const float2 *)(flow.out_weight + a * WIDTH + i * 64 + lane * 2);
        v += w.x * y[i][0] + w.y * y[i][1];
      }
      v = sum(v);
      if (lane == 0) {
        float action = load_float(before + a) + flow.dt * (v + flow.out_bias[a]);
        flow.actions[row * ACTION_DIM + a] = action;
        small[a] = action;
      }
    }
  } else if (threadIdx.x < ACTION_DIM) {
    small[threadIdx.x] = load_float(before + threadIdx.x);
  }
  if (step == STEPS) return;
  computing_sync();
  const float *scale = flow.attention_scale + (long long)step * DEPTH * WIDTH;
  float square = 0.f;
#pragma unroll 1
  for (int k = threadIdx.x * 4; k < WIDTH; k += COMPUTING * 4) {
    float4 x = *(const float4 *)(flow.in_bias + k), s = *(const float4 *)(scale + k);
#pragma unroll
    for (int a = 0; a < ACTION_DIM; a += 4) {
      float4 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = *(const float4 *)(flow.in_weight + (a + i) * WIDTH + k);
      x.x += w[0].x * small[a] + w[1].x * small[a + 1] + w[2].x * small[a + 2] + w[3].x * small[a + 3];
      x.y += w[0].y * small[a] + w[1].y * small[a + 1] + w[2].y * small[a + 2] + w[3].y * small[a + 3];
      x.z += w[0].z * small[a] + w[1].z * small[a + 1] + w[2].z * small[a + 2] + w[3].z * small[a + 3];
      x.w += w[0].w * small[a] + w[1].w * small[a + 1] + w[2].w * small[a + 2] + w[3].w * small[a + 3];
    }
    square += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    *(float4 *)(flow.x + row * WIDTH + k) = x;
    *(uint2 *)(flow.scaled + k / 64 * X_CHUNK + swizzled(row, k % 64 / 8) + k % 8) =
        make_uint2(pack(x.x * s.x, x.y * s.y), pack(x.z * s.z, x.w * s.w));
  }
  square = sum(square);
  if (lane == 0) small[ACTION_DIM + warp] = square;
  computing_sync();
  float total = 0.f;
  if (threadIdx.x == 0)
    for (int i = 0; i < COMPUTING / 32; i++) total += small[ACTION_DIM + i];
  flow.squares[threadIdx.x * 64 + row] = total;
  computing_sync();
  if (threadIdx.x == 0) announce(counter(flow, X + row % TILES));
}

// ---- the warps ----------------------------------------------------------------------------------

__device__ __forceinline__ void bring_weights(const Flow &flow, Weights ring) {
  int p = blockIdx.x;
  u32 layers = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; step++)
#pragma unroll 1
    for (int number = 0; number < DEPTH; number++) {
      const Layer &layer = flow.layers[number];
      layers++;
      if (projects(p)) ring.bring<ONCE, GROUP>(D_GROUPS / 2, layer.qkv + (p - FIRST_QKV) * D_GROUPS * 2 * CHUNK);
#pragma unroll 1
      for (int unit = p; unit < parts_of(layer) * HEADS; unit += PROGRAMS) {
        int part = part_of(layer, unit);
        if ((part + 1) * KEYS > layer.n_prefix) {  // the suffix's are among them
          await(counter(flow, KEYS_VALUES), 64 * layers);
          order_copies();
        }
        ring.bring<EVERY_STEP, GROUP>(1, layer.keys + part * 4 * CHUNK);
        ring.bring<EVERY_STEP, GROUP>(1, layer.values + part * 4 * CHUNK);
      }
      ring.bring<ONCE, GROUP>(HEAD_GROUPS, layer.o + p * HEAD_GROUPS * 4 * CHUNK);
      ring.bring<ONCE, GROUP>(D_GROUPS, layer.gate_up + p * D_GROUPS * 4 * CHUNK);
      ring.bring<ONCE, GROUP>(DOWN_GROUPS, layer.down + p * DOWN_GROUPS * 4 * CHUNK);
    }
}

// By a whole warp, of which one lane does it.
__device__ __forceinline__ void bring_inputs(const Flow &flow, Inputs ring, u32 x_seen) {
  int p = blockIdx.x, share = p % SHARES;
  bool leads = threadIdx.x % 32 == 0;
  u32 layers = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; step++) {
#pragma unroll 1
    for (int number = 0; number < DEPTH; number++) {
      const Layer &layer = flow.layers[number];
      if (projects(p)) {
        await_x(flow, 2 * SHARES * layers, step + 1);
        if (leads) {
          barrier_arrive(x_seen);
          order_copies();
          ring.bring<EVERY_LAYER, 8 * X_CHUNK>(D_GROUPS, flow.scaled);
        }
      }
      layers++;
      if (leads) {
#pragma unroll 1
        for (int unit = p; unit < parts_of(layer) * HEADS; unit += PROGRAMS) {
          await(counter(flow, QUERIES + share), 32 * layers);
          order_copies();
          ring.bring<EVERY_LAYER, GROUP>(1, flow.queries + share * 4 * CHUNK);
        }
        await(counter(flow, ATTENDED + share), HORIZON * layers);
        order_copies();
        ring.bring<EVERY_LAYER, 8 * X_CHUNK>(HEAD_GROUPS, flow.attended + share * 4 * X_CHUNK);
      }
      __syncwarp();
      await_x(flow, 2 * SHARES * layers - SHARES, step + 1);
      if (leads) {
        barrier_arrive(x_seen);
        order_copies();
        ring.bring<EVERY_LAYER, 8 * X_CHUNK>(D_GROUPS, flow.scaled);
        await(counter(flow, HIDDEN + share), 4 * TILES * layers);
        order_copies();
        ring.bring<EVERY_LAYER, 8 * X_CHUNK>(DOWN_GROUPS, flow.hidden + share * DOWN_GROUPS * 4 * X_CHUNK);
      }
      __syncwarp();
    }
  }
}

// 1 / rms(x) of every row, before every product of x: by two warps.
__device__ __forceinline__ void scale_rows(const Flow &flow, float *row_scale, u32 x_seen, u32 ready) {
  int i = threadIdx.x % 64, warp = i / 32, lane = i % 32;
  float *others = row_scale + 64;  // [64], of the second warp
  int times = STEPS * DEPTH * (projects(blockIdx.x) ? 2 : 1);
#pragma unroll 1
  for (int time = 0; time < times; time++) {
    barrier_wait(x_seen, time & 1);
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    const float *from = flow.squares + (warp * (PROGRAMS / 2) + lane / 16) * 64 + lane % 16 * 4;
#pragma unroll 16
    for (int n = 0; n < 32; n++) {
      float4 v = load_float4(from + n * 128);
      total.x += v.x; total.y += v.y; total.z += v.z; total.w += v.w;
    }
    total.x += __shfl_xor_sync(~0u, total.x, 16);
    total.y += __shfl_xor_sync(~0u, total.y, 16);
    total.z += __shfl_xor_sync(~0u, total.z, 16);
    total.w += __shfl_xor_sync(~0u, total.w, 16);
    if (warp == 1 && lane < 16) *(float4 *)(others + lane * 4) = total;
    asm volatile("bar.sync 2, 64;" ::: "memory");
    if (warp == 0 && lane < 16) {
      float4 v = *(float4 *)(others + lane * 4);
      *(float4 *)(row_scale + lane * 4) =
          make_float4(rsqrtf((total.x + v.x) / WIDTH + 1e-6f), rsqrtf((total.y + v.y) / WIDTH + 1e-6f),
                      rsqrtf((total.z + v.z) / WIDTH + 1e-6f), rsqrtf((total.w + v.w) / WIDTH + 1e-6f));
    }
    if (warp == 0) {
      __syncwarp();
      if (lane == 0) barrier_arrive(ready);
    }
    asm volatile("bar.sync 2, 64;" ::: "memory");
  }
}

__device__ __forceinline__ void compute(const Flow &flow, Weights w, Inputs x, const float *row_scale, u32 scale_ready) {
  constexpr int EXCHANGE = PROGRAMS * SHARES * 512;
  int p = blockIdx.x, head = p % SHARES;
  u32 scale_parity = 0, watched_round = 0;  // of the shares: how many layers were watched so far
  float own[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int step = 0;; step++) {
    if (p < HORIZON) {
      await_x(flow, 2 * SHARES * DEPTH * step, step);
      computing_sync();
      advance(flow, step);
    }
    if (step == STEPS) return;
#pragma unroll 1
    for (int number = 0; number < DEPTH; number++) {
      const Layer &layer = flow.layers[number];
      int at = step * DEPTH + number, parts = parts_of(layer);
      bool last = number == DEPTH - 1, more = at + 1 < STEPS * DEPTH;
      bool watched = flow.saliency && flow.watched[number] >= 0 && step >= flow.first_watched && step <= flow.last_watched;
      if (watched) watched_round++;
      if (projects(p)) query_key_value(flow, layer, flow.qkv_bias + (long long)at * QKV, w, x, row_scale, scale_ready, scale_parity);
      u32 round = step * layer.kinds + layer.of_kind + 1;  // of the parts of a layer with so many keys
#pragma unroll 1
      for (int unit = p; unit < parts * HEADS; unit += PROGRAMS)
        attend(flow, layer, head, part_of(layer, unit), round, watched ? watched_round : 0, w, x);
      float lse = join(flow, layer, round);
      if (watched) add_saliency(flow, parts, flow.watched[number], watched_round, lse);
      residual(flow, HEAD_GROUPS, flow.exchange, flow.attention_gate + (long long)at * WIDTH, flow.mlp_scale + (long long)at * WIDTH,
               w, x, own, number == 0, false, at + 1);
      gate_up(flow, flow.gate_up_bias + (long long)at * 2 * MLP, w, x, row_scale, scale_ready, scale_parity);
      // The scale of the next layer's norm; after the last layer nobody reads the product.
      residual(flow, DOWN_GROUPS, flow.exchange + EXCHANGE, flow.mlp_gate + (long long)at * WIDTH,
               flow.attention_scale + (long long)(more ? at + 1 : at) * WIDTH, w, x, own, false, last, at + 1);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) expert_flow(const __grid_constant__ Flow flow) {
  unsigned char *memory = shared_memory();
  u32 base = shared_address(memory);
  Weights w(base, base + SMALL_AT);
  Inputs x(base + X_AT, w.barriers + Weights::BARRIERS * 8);
  u32 scale_ready = x.barriers + Inputs::BARRIERS * 8, x_seen = scale_ready + 8;
  float *row_scale = (float *)(memory + SCALES_AT);  // [2, 64]
  if (threadIdx.x == 0) {
    w.init();
    x.init();
    barrier_init(scale_ready, 1);
    barrier_init(x_seen, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  int warp = threadIdx.x / 32;
  if (warp < 4) compute(flow, w, x, row_scale, scale_ready);
  else if (warp == 4 && threadIdx.x % 32 == 0) bring_weights(flow, w);
  else if (warp == 4) return;
  else if (warp == 5) bring_inputs(flow, x, x_seen);
  else scale_rows(flow, row_scale, x_seen, scale_ready);
}

// ---- before the flow ----------------------------------------------------------------------------

// Puts every layer's prefix into its images, with zeros behind it, and makes zero what has to be.
// 2 * DEPTH programs for every block of keys of the longest layer: one has a block of a layer's keys or of its values.
extern "C" __global__ void __launch_bounds__(THREADS) prepare(const __grid_constant__ Flow flow) {
  constexpr int PIECES = HEAD_DIM / 8, EACH = KEYS * PIECES / THREADS;  // 16 bytes: of a row, of a thread
  int part = blockIdx.x / (2 * DEPTH), which = blockIdx.x % (2 * DEPTH), thread = threadIdx.x;
  const Layer &layer = flow.layers[which / 2];
  const uint4 *from = (const uint4 *)(which % 2 ? layer.prefix_values : layer.prefix_keys);
  uint4 *to = (uint4 *)(which % 2 ? layer.values : layer.keys) + part * KEYS * PIECES;
  const uint4 zero = {};
  uint4 v[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int key = part * KEYS + (i * THREADS + thread) / PIECES;
    v[i] = key < layer.n_prefix ? from[key * PIECES + thread % PIECES] : zero;
  }
  for (int i = blockIdx.x * THREADS + thread; i < flow.n_zeros; i += gridDim.x * THREADS) ((uint4 *)flow.zeros)[i] = zero;
  if (part >= parts_of(layer)) return;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int row = (i * THREADS + thread) / PIECES, piece = thread % PIECES;
    to[piece / 8 * (CHUNK / 8) + row * 8 + (piece % 8 ^ row % 8)] = v[i];
  }
}
