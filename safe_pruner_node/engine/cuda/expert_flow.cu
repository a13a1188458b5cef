// The whole flow of the action expert in one launch: every Euler step, every layer.
//
// 128 programs, one per multiprocessor, stay for the whole flow. A layer is six phases; program p is
// tile t = p / 8 and share s = p % 8 of a split product:
//
//   1 query/key/value   64 channels x all rows, K whole     40 programs; rotary embedding
//   2 attention         rows of head s x 64 keys            8 * P programs, P blocks of keys
//   3 join              the blocks' softmaxes made one      rows t, t + 16, .. of head s
//   4 output            64 channels x all rows, K of head s, exchanged among the tile's 8 programs
//   5 gate/up           64 channels x all rows, K whole     GELU
//   6 down              as 4, K of hidden channels s * M/8 and on
//
// Four warps compute (`wgmma`: weights are its A operand, the action rows its N). Beside them one warp
// brings weights and the prefix's keys and values, through a ring in shared memory and as far ahead as
// the ring allows, so that memory never idles; one brings what other programs have computed, as soon
// as it is announced; two sum up the squares for the norms.
//
// Who has written something adds 1 to a counter of those who read it; who reads waits for the sum. The
// parts of a split product need no counter: their buffer is full of EMPTY, which no arithmetic gives,
// until they are there.
//
// Everything an operand is read from lies as shared memory wants it ("images"): chunks of rows of 64
// numbers, 128 bytes each, the eight 16-byte pieces of row r at piece ^ (r % 8).
//
// Norms as in kernels/modulated_pair.py: norm(x) @ W = r * ((x * (1 + s)) @ W) + b @ W.
//
// Compiled with WIDTH, MLP, HEADS, HEAD_DIM, DEPTH, STEPS, HORIZON, ACTION_DIM defined, behind
// multiply_rows (ROWS = HORIZON in whole eights) and multiply_keys, which `compile.py` writes.

constexpr int PROGRAMS = 128, SHARES = 8, TILES = PROGRAMS / SHARES, COMPUTING = 128, THREADS = 256;
constexpr int ROWS = (HORIZON + 7) / 8 * 8, BLOCKS = ROWS / 8;  // of action rows
constexpr int KEYS = 64, HALF = HEAD_DIM / 2;
constexpr int QKV = (HEADS + 2) * HEAD_DIM, QKV_TILES = QKV / 64, FIRST_QKV = 72;  // program of tile 0
constexpr int CHUNK = 64 * 64, X_CHUNK = ROWS * 64;  // numbers in a chunk of weights, of action rows
constexpr int D_CHUNKS = WIDTH / 64, HEAD_CHUNKS = HEAD_DIM / 64, DOWN_CHUNKS = MLP / SHARES / 64;
static_assert(HEADS == SHARES && HEAD_DIM == 256 && WIDTH == 64 * TILES && MLP == 32 * PROGRAMS, "sizes");
static_assert(HORIZON <= 64 && FIRST_QKV + QKV_TILES <= PROGRAMS && ACTION_DIM <= 32 && ACTION_DIM % 4 == 0, "sizes");

// Shared memory.
constexpr int SLOT = CHUNK * 2, W_SLOTS = 18, X_SLOTS = 8;
constexpr int STAGE_PITCH = 144;  // bytes: eight rows of it are written without conflicts
constexpr int X_AT = W_SLOTS * SLOT, STAGE_AT = X_AT + X_SLOTS * SLOT, SMALL_AT = STAGE_AT + 64 * STAGE_PITCH;
constexpr int SMALL_BYTES = 1536;
// + 1024 to align it, + SMALL_BYTES: SHARED_BYTES of the launch

struct Layer {
  const bf16 *qkv, *o, *gate_up, *down;  // images
  bf16 *keys, *values;                   // images [P, 4, 64 keys, 64], the prefix is there
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
  float *x;                                                  // [H, D], between steps
  bf16 *scaled;                                              // image of x * (1 + s), [D/64, ROWS, 64]
  bf16 *queries;                                             // images [h, 4, 64 rows, 64]
  bf16 *attended;                                            // images [h, 4, ROWS, 64]
  bf16 *hidden;                                              // image [M/64, ROWS, 64]
  bf16 *parts;                                               // [P, h, H, d]
  float *lse;                                                // [P, h, H], base 2
  float *squares;                                            // [PROGRAMS, 64] sums of x * x
  float *exchange;                                           // [2, TILES, SHARES to, SHARES from, BLOCKS, 32, 2]
  u32 *counters;                                             // zero at launch
  float *shares;                                             // a keyframe's: [h, H, n_visual], scratch
  float *saliency;                                           // out: [slots, PROGRAMS, n_visual], or null
  int n_slots;                                               // text tokens and padding
  int n_visual;                                              // a multiple of 64 where there is saliency
  int over_all;                                              // its softmax: over all keys, else visual ones
  int first_watched, last_watched;                           // steps whose saliency is taken
  int watched[DEPTH];                                        // per layer its place, or -1
  int n_watched;                                             // layers
  float dt;
  long long *clocks;                                         // [PROGRAMS, 64], or null
};

extern __shared__ unsigned char unaligned[];
#ifdef CLOCKS
__shared__ long long clocks_[64];
__device__ __forceinline__ void mark(int i) {
  if (threadIdx.x == 0) {
    long long now = clock64();
    clocks_[i] += now - clocks_[63];
    clocks_[63] = now;
  }
}
#else
__device__ __forceinline__ void mark(int) {}
#endif

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

// ---- between programs ---------------------------------------------------------------------------

// Counters, each in a line of its own: who adds, and how often per layer.
enum Counter {
  X = 0,                     // x is new: 128 after the output and the down projection, HORIZON per step
  KEYS_VALUES = 1,           // 8 tiles
  QUERIES = 2,               // of a head: 4 tiles
  PARTS = QUERIES + HEADS,   // of a head: its blocks of keys
  ATTENDED = PARTS + HEADS,  // of a head: its rows
  HIDDEN = ATTENDED + HEADS, // of a share: 16 programs
};
__device__ __forceinline__ u32 *counter(const Flow &flow, int which) { return flow.counters + which * 32; }

// By one thread, after whatever makes the others' writes come before it.
__device__ __forceinline__ void announce(u32 *counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void await(u32 *counter, u32 target) {
  u32 seen;
  int tries = 0;
  do {
#ifdef RELAXED
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
#else
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
#endif
#ifdef SLEEP
    __nanosleep(SLEEP);
#endif
    if (++tries > (1 << 24)) asm volatile("trap;");  // seconds: an error is better than a GPU that hangs
  } while ((int)(seen - target) < 0);
#ifdef RELAXED
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}
// Ordinary writes come before what the copy engine reads.
__device__ __forceinline__ void order_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- barriers and rings in shared memory --------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count));
}
__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
  u32 done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(at), "r"(parity) : "memory");
  } while (!done);
}
__device__ __forceinline__ void barrier_arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory");
}

// One side of a ring: its slots, and where this side is. Full barriers lie before empty ones.
template <int SLOTS>
struct Ring {
  u32 slots, barriers, at = 0, parity = 0;
  __device__ __forceinline__ Ring(u32 slots, u32 barriers) : slots(slots), barriers(barriers) {}
  __device__ __forceinline__ u32 full() const { return barriers + at * 8; }
  __device__ __forceinline__ u32 empty() const { return barriers + (SLOTS + at) * 8; }
  __device__ __forceinline__ u32 slot() const { return slots + at * SLOT; }
  __device__ __forceinline__ void next() {
    if (++at == SLOTS) at = 0, parity ^= 1;
  }
  // By one thread: bring so many chunks, each as soon as a slot is free, beginning with one of them.
  __device__ __forceinline__ void bring(int chunks, const bf16 *chunk, u32 bytes, int first = 0) {
    const bf16 *from = chunk + first * (bytes / 2);
#pragma unroll 1
    for (int i = 0; i < chunks; i++) {
      barrier_wait(empty(), parity ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(full()), "r"(bytes) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(slot()),
                   "l"(from), "r"(bytes), "r"(full()) : "memory");
      from = ++first == chunks ? (first = 0, chunk) : from + bytes / 2;
      next();
    }
  }
  __device__ __forceinline__ void wait() const { barrier_wait(full(), parity); }
  // By every warp that computes.
  __device__ __forceinline__ void free_slot(u32 which) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(barriers + (SLOTS + which) * 8);
  }
  __device__ __forceinline__ void free_from(u32 first, int count) const {
    if (threadIdx.x % 32 < count) barrier_arrive(barriers + (SLOTS + (first + threadIdx.x % 32) % SLOTS) * 8);
  }
};
using Weights = Ring<W_SLOTS>;
using Inputs = Ring<X_SLOTS>;

// ---- tensor cores -------------------------------------------------------------------------------

// An operand in shared memory: rows of 128 bytes, swizzled, eight rows 1024 bytes apart.
__device__ __forceinline__ u64 operand(u32 at) {
  return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// c[channel][row] = weights @ inputs.T over so many chunks of both rings. A lane has channels
// 16 * warp + lane / 4 (+ 8) and rows 8 * j + lane % 4 * 2 (+ 1): c[4 * j + 2 * (+8) + (+1)].
__device__ __forceinline__ void product(float (&c)[4 * BLOCKS], int chunks, Weights &w, Inputs &x, int mark_at = 60) {
  float part[CHAINS][4 * BLOCKS];  // a multiplication waits for the one before on the same sums, so four take turns
  u32 last_w = 0, last_x = 0;
#pragma unroll 1
  for (int i = 0; i < chunks; i++) {
    w.wait();
    if (i == 0) mark(mark_at);
    x.wait();
    if (i == 0) mark(mark_at + 1);
    multiply_begin();
    u64 a = operand(w.slot()), b = operand(x.slot());
#pragma unroll
    for (int k = 0; k < 4; k++) multiply_rows(part[k % CHAINS], a + k * 2, b + k * 2, i + k / CHAINS > 0);
    multiply_commit();
    if (i > 0) {
      multiply_wait<1>();
      w.free_slot(last_w);
      x.free_slot(last_x);
    }
    last_w = w.at, last_x = x.at;
    w.next();
    x.next();
  }
  multiply_wait<0>();
  w.free_slot(last_w);
  x.free_slot(last_x);
#pragma unroll
  for (int i = 0; i < 4 * BLOCKS; i++) c[i] = CHAINS == 2 ? part[0][i] + part[1][i] : part[0][i] + part[1][i] + (part[2 % CHAINS][i] + part[3 % CHAINS][i]);
}

// Channels and rows change places: [row][channels of the warp, 16 bytes] of values as `product` has them.
__device__ __forceinline__ void stage_rows(u32 stage, const u32 *pairs, int place) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) {
    u32 to = stage + (8 * j + lane % 8) * STAGE_PITCH + place * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(pairs[j]) : "memory");
  }
}

// ---- phases -------------------------------------------------------------------------------------

__device__ __forceinline__ void query_key_value(const Flow &flow, const Layer &layer, const float *bias, Weights &w, Inputs &x,
                                                const float *row_scale, u32 scale_ready, u32 &scale_parity) {
  int thread = this_thread();
  int program = this_program();
  int tile = program - FIRST_QKV, head = tile / 4, quarter = tile % 4;
  int warp = thread / 32, lane = thread % 32;
  int channel = quarter * 32 + warp * 8 + lane / 4;  // and the one HALF further on
  float bias_a = bias[head * HEAD_DIM + channel], bias_b = bias[head * HEAD_DIM + channel + HALF];
  u32 turn[2 * BLOCKS];  // cos and sin of every row
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; i++) {
    int row = 8 * (i / 2) + lane % 4 * 2 + i % 2;
    u32 c = 0x3f80, s = 0;
    if (row < HORIZON && head <= HEADS) c = flow.cos[row * HEAD_DIM + channel], s = flow.sin[row * HEAD_DIM + channel];
    turn[i] = c | s << 16;
  }
  float c[4 * BLOCKS];
  product(c, D_CHUNKS, w, x, 40);
  mark(2);
  barrier_wait(scale_ready, scale_parity);
  scale_parity ^= 1;
  unsigned char *memory = shared_memory();
  u32 first[BLOCKS], second[BLOCKS];
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) {
    float out[2][2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float r = row_scale[8 * j + lane % 4 * 2 + e], co = low(turn[2 * j + e]), si = high(turn[2 * j + e]);
      float a = c[4 * j + e] * r + bias_a, b = c[4 * j + 2 + e] * r + bias_b;
      out[0][e] = a * co - b * si;
      out[1][e] = b * co + a * si;
    }
    first[j] = pack(out[0][0], out[0][1]);
    second[j] = pack(out[1][0], out[1][1]);
  }
  u32 stage = shared_address(memory + STAGE_AT);
  stage_rows(stage, first, warp);
  stage_rows(stage, second, 4 + warp);
  computing_sync();
  for (int i = thread; i < HORIZON * 8; i += COMPUTING) {
    int row = i / 8, part = i % 8, piece = quarter % 2 * 4 + part % 4, chunk = part / 4 * 2 + quarter / 2;
    uint4 v = *(uint4 *)(memory + STAGE_AT + row * STAGE_PITCH + part * 16);
    bf16 *to;
    if (head < HEADS) {
      to = flow.queries + (head * HEAD_CHUNKS + chunk) * CHUNK + row * 64 + (piece ^ row % 8) * 8;
    } else {
      int key = layer.n_prefix + row, in = key % KEYS;
      to = (head == HEADS ? layer.keys : layer.values) + (key / KEYS * HEAD_CHUNKS + chunk) * CHUNK + in * 64 + (piece ^ in % 8) * 8;
    }
    *(uint4 *)to = v;
  }
  computing_sync();
  if (thread == 0) announce(counter(flow, head < HEADS ? QUERIES + head : KEYS_VALUES));
}

// The rows of one head against one block of keys.
__device__ __forceinline__ void attend(const Flow &flow, const Layer &layer, int head, int part, bool watched, Weights &w, Inputs &x) {
  int thread = this_thread();
  constexpr float SCALE = 1.4426950408889634f / 16.f;  // log2(e) / sqrt(256)
  int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  unsigned char *memory = shared_memory();
  float s[32], part_s[4 / CHAINS][32];
  u32 first_q = x.at, first_k = w.at;
#pragma unroll 1
  for (int c = 0; c < HEAD_CHUNKS; c++) {
    w.wait();
    x.wait();
    if (c == 0) mark(6);
    multiply_begin();
    u64 a = operand(x.slot()), b = operand(w.slot());
#pragma unroll
    for (int k = 0; k < 4; k++) multiply_keys(part_s[k % (4 / CHAINS)], a + k * 2, b + k * 2, c + k / (4 / CHAINS) > 0);
    multiply_commit();
    w.next();
    x.next();
  }
  mark(36);
  int n_read = layer.n_prefix, n_keys = layer.n_prefix + HORIZON;
  if (flow.n_valid) n_read += (int)*flow.n_valid - flow.n_slots;
  multiply_wait<0>();
  w.free_from(first_k, HEAD_CHUNKS);
#pragma unroll
  for (int i = 0; i < 32; i++) s[i] = CHAINS == 2 ? part_s[0][i] + part_s[1 % (4 / CHAINS)][i] : part_s[0][i];
  mark(37);
  // Rows 16 * warp + g (+ 8), keys 8 * j + 2 * t (+ 1).
  float top[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int key = part * KEYS + 8 * j + 2 * t + e;
      bool real = key < n_read || (key >= layer.n_prefix && key < n_keys);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float &v = s[4 * j + 2 * h + e];
        v = real ? v * SCALE : -1e30f;
        top[h] = fmaxf(top[h], v);
      }
    }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float &v = s[4 * j + 2 * h + e];
        v = v > -1e29f ? exp2_fast(v - top[h]) : 0.f;
        total[h] += v;
      }
    total[h] += __shfl_xor_sync(~0u, total[h], 1);
    total[h] += __shfl_xor_sync(~0u, total[h], 2);
  }
  u32 p[4][4];
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[k][i] = pack(s[8 * k + 4 * (i / 2) + 2 * (i % 2)], s[8 * k + 4 * (i / 2) + 2 * (i % 2) + 1]);
  mark(33);
  float share[2] = {total[0] > 0.f ? 1.f / total[0] : 0.f, total[1] > 0.f ? 1.f / total[1] : 0.f};
#pragma unroll 1
  for (int h = 0; h < 2; h++) {
    int row = warp * 16 + g + 8 * h;
    if (row >= HORIZON) continue;
    if (t == 0) flow.lse[(part * HEADS + head) * HORIZON + row] = total[h] > 0.f ? top[h] + log2f(total[h]) : -1e30f;
  }
  if (watched && part * KEYS < flow.n_visual) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = warp * 16 + g + 8 * h;
      if (row >= HORIZON) continue;
      float *to = flow.shares + (long long)(head * HORIZON + row) * flow.n_visual + part * KEYS + t * 2;
#pragma unroll
      for (int j = 0; j < 8; j++) *(float2 *)(to + 8 * j) = make_float2(s[4 * j + 2 * h] * share[h], s[4 * j + 2 * h + 1] * share[h]);
    }
  }
  // Through the queries' slots, so that rows are written in whole pieces.
  u32 stage = x.slots + first_q * SLOT, at_row = warp * 16 + lane % 16;
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    float o[2][32];
    u32 first_v = w.at;
    u64 v_operand[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      w.wait();
      v_operand[c] = operand(w.slot());
      w.next();
    }
    multiply_begin();
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int c = 0; c < 2; c++) multiply_values(o[c], p[k], v_operand[c] + k * 128, k > 0);
    multiply_commit();
    multiply_wait<0>();
    w.free_from(first_v, 2);
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int n = 0; n < 4; n++) {  // 16 channels: two matrices of channels times two of rows
        u32 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int j = 2 * n + i / 2, h = i % 2;
          v[i] = pack(o[c][4 * j + 2 * h] * share[h], o[c][4 * j + 2 * h + 1] * share[h]);
        }
        u32 to = stage + at_row * 128 + ((2 * n + lane / 16) ^ at_row % 8) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
      }
      stage = stage + SLOT == x.slots + X_SLOTS * SLOT ? x.slots : stage + SLOT;
    }
  }
  mark(34);
  __syncwarp();
  // Every warp its own rows: 512 bytes each.
#pragma unroll 4
  for (int i = 0; i < 16; i++) {
    int row = warp * 16 + i;
    if (row >= HORIZON) break;
    const unsigned char *from = memory + X_AT + (first_q + lane / 8) % X_SLOTS * SLOT + row * 128 + (lane % 8 ^ row % 8) * 16;
    *(uint4 *)(flow.parts + ((long long)(part * HEADS + head) * HORIZON + row) * HEAD_DIM + lane * 8) = *(uint4 *)from;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the slots' next contents come after these
  __syncwarp();
  x.free_from(first_q, HEAD_CHUNKS);
  computing_sync();
  mark(35);
  if (thread == 0) announce(counter(flow, PARTS + head));
}

// Rows t, t + 16 and so on of head s; at most 32 parts.
__device__ __forceinline__ void join(const Flow &flow, const Layer &layer) {
  int thread = this_thread();
  int program = this_program();
  constexpr int AT_ONCE = 16;
  int parts = parts_of(layer), lane = thread % 32, head = program % SHARES;
  int row = program / SHARES + thread / 32 * TILES;
  if (row >= HORIZON) return;
  const bf16 *from = flow.parts + ((long long)head * HORIZON + row) * HEAD_DIM + lane * 8;
  float lse = lane < parts ? load_float(flow.lse + (lane * HEADS + head) * HORIZON + row) : -1e30f;
  float out[8] = {}, weight = 0.f;
  for (int start = 0; start < parts; start += AT_ONCE) {
    uint4 v[AT_ONCE];
#pragma unroll
    for (int p = 0; p < AT_ONCE; p++)
      v[p] = start + p < parts ? load16(from + (long long)(start + p) * HEADS * HORIZON * HEAD_DIM) : make_uint4(0, 0, 0, 0);
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
  bf16 *to = flow.attended + (head * HEAD_CHUNKS + lane / 8) * X_CHUNK + row * 64 + (lane % 8 ^ row % 8) * 8;
  *(uint4 *)to = make_uint4(pack(out[0], out[1]), pack(out[2], out[3]), pack(out[4], out[5]), pack(out[6], out[7]));
  mark(56);
  __syncwarp();
  if (lane == 0) announce(counter(flow, ATTENDED + head));
}

// Shares of the visual tokens, summed over this program's rows.
__device__ __forceinline__ void add_saliency(const Flow &flow, const Layer &layer, int slot) {
  int thread = this_thread();
  int program = this_program();
  int parts = parts_of(layer), warp = thread / 32, lane = thread % 32, head = program % SHARES;
  float *weights = (float *)(shared_memory() + STAGE_AT);  // [4, 32]: of each part in this program's rows
  int row = program / SHARES + warp * TILES;
  int counted = flow.over_all ? parts : flow.n_visual / KEYS;
  float lse = lane < counted && row < HORIZON ? load_float(flow.lse + (lane * HEADS + head) * HORIZON + row) : -1e30f;
  float weight = exp2_fast(lse - largest(lse)), whole = sum(weight);
  weights[warp * 32 + lane] = row < HORIZON ? weight / whole : 0.f;
  computing_sync();
  float *to = flow.saliency + ((long long)slot * PROGRAMS + program) * flow.n_visual;
  for (int key = thread; key < flow.n_visual; key += COMPUTING) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = program / SHARES + i * TILES;
      if (r < HORIZON) total += weights[i * 32 + key / KEYS] * load_float(flow.shares + (long long)(head * HORIZON + r) * flow.n_visual + key);
    }
    to[key] = total;
  }
  computing_sync();  // the stage is free again
}

__device__ __forceinline__ void gate_up(const Flow &flow, const float *bias, Weights &w, Inputs &x, const float *row_scale,
                                        u32 scale_ready, u32 &scale_parity) {
  int thread = this_thread();
  int program = this_program();
  int warp = thread / 32, lane = thread % 32, channel = program * 32 + warp * 8 + lane / 4;
  float bias_gate = bias[channel], bias_up = bias[MLP + channel];
  float c[4 * BLOCKS];
  product(c, D_CHUNKS, w, x, 42);
  mark(21);
  barrier_wait(scale_ready, scale_parity);
  scale_parity ^= 1;
  unsigned char *memory = shared_memory();
  u32 out[BLOCKS];
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) {
    float y[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float r = row_scale[8 * j + lane % 4 * 2 + e];
      float a = c[4 * j + e] * r + bias_gate, b = c[4 * j + 2 + e] * r + bias_up;
      // gelu(a) = a * sigmoid(2 sqrt(2/pi) (a + 0.044715 a^3)): the tanh form, without a tanh
      y[e] = __fdividef(a * b, 1.f + exp2_fast(-2.302208198f * (a + 0.044715f * a * a * a)));
    }
    out[j] = pack(y[0], y[1]);
  }
  stage_rows(shared_address(memory + STAGE_AT), out, warp);
  computing_sync();
  for (int i = thread; i < HORIZON * 4; i += COMPUTING) {
    int row = i / 4, piece = program % 2 * 4 + i % 4;
    *(uint4 *)(flow.hidden + program / 2 * X_CHUNK + row * 64 + (piece ^ row % 8) * 8) =
        *(uint4 *)(memory + STAGE_AT + row * STAGE_PITCH + i % 4 * 16);
  }
  computing_sync();
  if (thread == 0) announce(counter(flow, HIDDEN + program / TILES));
}

constexpr u32 EMPTY = 0xffffffffu;

// x += gate * (inputs @ weight.T): this program has 64 channels and a share of K. Afterwards channels
// 8 * s and on of its tile are its own: thread i has 4 rows of one of them in `own`, all the flow long.
template <int CHUNKS>
__device__ __forceinline__ void residual(const Flow &flow, float *exchange, const float *gate, const float *scale, Weights &w, Inputs &x,
                                         float (&own)[4], bool from_memory, bool to_memory, int at) {
  int thread = this_thread();
  int program = this_program();
  constexpr int PIECE = BLOCKS * 64;  // floats from one program to another
  int tile = program / SHARES, me = program % SHARES, warp = thread / 32, lane = thread % 32;
  int block = thread / 16, pair = thread % 16, row = 8 * block + pair % 2 * 4, channel = tile * 64 + me * 8 + pair / 2;
  float g = gate[channel], next = scale[channel];
  float c[4 * BLOCKS];
  product(c, CHUNKS, w, x, at == 15 ? 44 : 46);
  mark(at);
  float *to = exchange + (long long)tile * SHARES * SHARES * PIECE + me * PIECE + lane * 2;
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
      asm volatile("st.volatile.global.v2.f32 [%0], {%1,%2};" ::"l"(to + (2 * warp + h) * SHARES * PIECE + j * 64),
                   "f"(c[4 * j + 2 * h]), "f"(c[4 * j + 2 * h + 1]) : "memory");
  mark(at == 15 ? 48 : 52);
  if (block < BLOCKS) {
    if (from_memory)
#pragma unroll
      for (int i = 0; i < 4; i++) own[i] = row + i < HORIZON ? load_float(flow.x + (row + i) * WIDTH + channel) : 0.f;
    float *from = exchange + ((long long)tile * SHARES + me) * SHARES * PIECE + thread * 4;
    uint4 v[SHARES];
    bool missing;
    int tries = 0;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < SHARES; i++)
        asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w) : "l"(from + i * PIECE) : "memory");
#pragma unroll
      for (int i = 0; i < SHARES; i++) missing |= v[i].x == EMPTY || v[i].y == EMPTY || v[i].z == EMPTY || v[i].w == EMPTY;
      if (++tries > (1 << 22)) asm volatile("trap;");
    } while (missing);
    mark(at == 15 ? 49 : 53);
    float total[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < SHARES; i++) {
      total[0] += __uint_as_float(v[i].x); total[1] += __uint_as_float(v[i].y);
      total[2] += __uint_as_float(v[i].z); total[3] += __uint_as_float(v[i].w);
      *(uint4 *)(from + i * PIECE) = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
    }
    float square[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      own[i] += g * total[i];
      square[i] = own[i] * own[i];
      if (row + i >= HORIZON) continue;
      flow.scaled[tile * X_CHUNK + (row + i) * 64 + (me ^ (row + i) % 8) * 8 + pair / 2] = (bf16)pack(own[i] * next, 0.f);
      if (to_memory) flow.x[(row + i) * WIDTH + channel] = own[i];
    }
    u32 lanes = block + 1 < BLOCKS || block % 2 ? ~0u : 0xffffu;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      square[i] += __shfl_xor_sync(lanes, square[i], 2);
      square[i] += __shfl_xor_sync(lanes, square[i], 4);
      square[i] += __shfl_xor_sync(lanes, square[i], 8);
    }
    if (pair < 2) *(float4 *)(flow.squares + program * 64 + row) = make_float4(square[0], square[1], square[2], square[3]);
  }
  mark(at == 15 ? 50 : 54);
  computing_sync();
  mark(at == 15 ? 51 : 55);
  if (thread == 0) announce(counter(flow, X));
}

// The end of an Euler step (if there was one) and the beginning of the next: program = row.
__device__ __forceinline__ void advance(const Flow &flow, int step) {
  int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *small = (float *)(shared_memory() + STAGE_AT);  // new actions, then sums of squares
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
#pragma unroll 1
    for (int a = warp; a < ACTION_DIM; a += COMPUTING / 32) {
      float v = 0.f;
#pragma unroll
      for (int i = 0; i < WIDTH / 64; i++) {
        float2 w = *(const float2 *)(flow.out_weight + a * WIDTH + i * 64 + lane * 2);
        v += w.x * y[i][0] + w.y * y[i][1];
      }
      v = sum(v);
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
  computing_sync();
  const float *scale = flow.attention_scale + (long long)step * DEPTH * WIDTH;
  float square = 0.f;
#pragma unroll 1
  for (int k = threadIdx.x * 2; k < WIDTH; k += COMPUTING * 2) {
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
    *(u32 *)(flow.scaled + k / 64 * X_CHUNK + row * 64 + (k % 64 / 8 ^ row % 8) * 8 + k % 8) = pack(x[0] * scale[k], x[1] * scale[k + 1]);
  }
  square = sum(square);
  if (lane == 0) small[ACTION_DIM + warp] = square;
  computing_sync();
  float total = 0.f;
  if (threadIdx.x == 0)
    for (int i = 0; i < COMPUTING / 32; i++) total += small[ACTION_DIM + i];
  flow.squares[threadIdx.x * 64 + row] = total;
  computing_sync();
  if (threadIdx.x == 0) announce(counter(flow, X));
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
      if (p >= FIRST_QKV && p < FIRST_QKV + QKV_TILES)
        ring.bring(D_CHUNKS, layer.qkv + ((p - FIRST_QKV) * D_CHUNKS) * CHUNK, SLOT);
      for (int unit = p; unit < parts_of(layer) * HEADS; unit += PROGRAMS) {
        int part = unit / HEADS;
        if ((part + 1) * KEYS > layer.n_prefix) {  // the suffix's are among them
          await(counter(flow, KEYS_VALUES), 8 * layers);
          order_copies();
        }
        ring.bring(HEAD_CHUNKS, layer.keys + (part * HEAD_CHUNKS) * CHUNK, SLOT);
        ring.bring(HEAD_CHUNKS, layer.values + (part * HEAD_CHUNKS) * CHUNK, SLOT);
      }
      ring.bring(HEAD_CHUNKS, layer.o + (p * HEAD_CHUNKS) * CHUNK, SLOT);
      ring.bring(D_CHUNKS, layer.gate_up + (p * D_CHUNKS) * CHUNK, SLOT);
      ring.bring(DOWN_CHUNKS, layer.down + (p * DOWN_CHUNKS) * CHUNK, SLOT);
    }
}

__device__ __forceinline__ void bring_inputs(const Flow &flow, Inputs ring) {
  int p = blockIdx.x, share = p % SHARES;
  u32 layers = 0, x_target = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; step++) {
    x_target += HORIZON;
#pragma unroll 1
    for (int number = 0; number < DEPTH; number++) {
      const Layer &layer = flow.layers[number];
      layers++;
      if (p >= FIRST_QKV && p < FIRST_QKV + QKV_TILES) {
        await(counter(flow, X), x_target);
        order_copies();
        ring.bring(D_CHUNKS, flow.scaled, X_CHUNK * 2, ROTATE * (p % D_CHUNKS));
      }
      for (int unit = p; unit < parts_of(layer) * HEADS; unit += PROGRAMS) {
        await(counter(flow, QUERIES + share), 4 * layers);
        order_copies();
        ring.bring(HEAD_CHUNKS, flow.queries + (share * HEAD_CHUNKS) * CHUNK, SLOT);
      }
      await(counter(flow, ATTENDED + share), HORIZON * layers);
      order_copies();
      ring.bring(HEAD_CHUNKS, flow.attended + (share * HEAD_CHUNKS) * X_CHUNK, X_CHUNK * 2, ROTATE * (p / SHARES % HEAD_CHUNKS));
      x_target += PROGRAMS;
      await(counter(flow, X), x_target);
      order_copies();
      ring.bring(D_CHUNKS, flow.scaled, X_CHUNK * 2, ROTATE * (p % D_CHUNKS));
      await(counter(flow, HIDDEN + share), TILES * layers);
      order_copies();
      ring.bring(DOWN_CHUNKS, flow.hidden + (share * DOWN_CHUNKS) * X_CHUNK, X_CHUNK * 2, ROTATE * (p / SHARES % DOWN_CHUNKS));
      x_target += PROGRAMS;
    }
  }
}

// 1 / rms(x) of every row, before every product of x: by two warps.
__device__ __forceinline__ void scale_rows(const Flow &flow, float *row_scale, u32 ready) {
  int i = threadIdx.x % 64, warp = i / 32, lane = i % 32;
  float *others = row_scale + 64;  // [64], of the second warp
  u32 x_target = 0;
#pragma unroll 1
  for (int step = 0; step < STEPS; step++) {
    x_target += HORIZON;
#pragma unroll 1
    for (int half = 0; half < 2 * DEPTH; half++) {
      bool needed = half % 2 || (blockIdx.x >= FIRST_QKV && blockIdx.x < FIRST_QKV + QKV_TILES);
      if (needed) {
        if (lane == 0) await(counter(flow, X), x_target);
        __syncwarp();
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
      x_target += PROGRAMS;
    }
  }
}

__device__ __forceinline__ void compute(const Flow &flow, Weights w, Inputs x, const float *row_scale, u32 scale_ready) {
  constexpr int EXCHANGE = PROGRAMS * SHARES * BLOCKS * 64;
  int p = blockIdx.x, head = p % SHARES;
  bool projects = p >= FIRST_QKV && p < FIRST_QKV + QKV_TILES;
  u32 scale_parity = 0, x_target = 0, parts_target = 0;
  float own[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int step = 0;; step++) {
    if (p < HORIZON) {
      if (threadIdx.x % 32 == 0) await(counter(flow, X), x_target);
      __syncwarp();
      computing_sync();
      advance(flow, step);
    }
    if (step == STEPS) return;
    mark(38);
    x_target += HORIZON;
#pragma unroll 1
    for (int number = 0; number < DEPTH; number++) {
      const Layer &layer = flow.layers[number];
      int at = step * DEPTH + number, parts = parts_of(layer);
      bool last = number == DEPTH - 1, more = at + 1 < STEPS * DEPTH;
      bool watched = flow.saliency && flow.watched[number] >= 0 && step >= flow.first_watched && step <= flow.last_watched;
      mark(0);
      if (projects) query_key_value(flow, layer, flow.qkv_bias + (long long)at * QKV, w, x, row_scale, scale_ready, scale_parity);
      mark(3);
      for (int unit = p; unit < parts * HEADS; unit += PROGRAMS) attend(flow, layer, head, unit / HEADS, watched, w, x);
      mark(7);
      parts_target += parts;
      if (threadIdx.x % 32 == 0) await(counter(flow, PARTS + head), parts_target);
      __syncwarp();
      mark(10);
      join(flow, layer);
      mark(11);
      if (watched) add_saliency(flow, layer, (step - flow.first_watched) * flow.n_watched + flow.watched[number]);
      residual<HEAD_CHUNKS>(flow, flow.exchange, flow.attention_gate + (long long)at * WIDTH, flow.mlp_scale + (long long)at * WIDTH, w, x,
                            own, number == 0, false, 15);
      mark(16);
      gate_up(flow, flow.gate_up_bias + (long long)at * 2 * MLP, w, x, row_scale, scale_ready, scale_parity);
      mark(22);
      // The scale of the next layer's norm; after the last layer nobody reads the product.
      residual<DOWN_CHUNKS>(flow, flow.exchange + EXCHANGE, flow.mlp_gate + (long long)at * WIDTH,
                            flow.attention_scale + (long long)(more ? at + 1 : at) * WIDTH, w, x, own, false, last, 27);
      mark(29);
      x_target += 2 * PROGRAMS;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) expert_flow(const __grid_constant__ Flow flow) {
  unsigned char *memory = shared_memory();
  u32 base = shared_address(memory), small = base + SMALL_AT;
  u32 w_barriers = small, x_barriers = w_barriers + 2 * W_SLOTS * 8, scale_ready = x_barriers + 2 * X_SLOTS * 8;
  float *row_scale = (float *)(memory + SMALL_AT + 512);  // [2, 64]
#ifdef CLOCKS
  if (threadIdx.x < 64) clocks_[threadIdx.x] = threadIdx.x == 63 ? clock64() : 0;
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < W_SLOTS; i++) barrier_init(w_barriers + i * 8, 1), barrier_init(w_barriers + (W_SLOTS + i) * 8, 4);
    for (int i = 0; i < X_SLOTS; i++) barrier_init(x_barriers + i * 8, 1), barrier_init(x_barriers + (X_SLOTS + i) * 8, 4);
    barrier_init(scale_ready, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  Weights w(base, w_barriers);
  Inputs x(base + X_AT, x_barriers);
  int warp = threadIdx.x / 32;
  if (warp < 4) compute(flow, w, x, row_scale, scale_ready);
  else if (warp == 4) { if (threadIdx.x % 32 == 0) bring_weights(flow, w); }
  else if (warp == 5) { if (threadIdx.x % 32 == 0) bring_inputs(flow, x); }
  else scale_rows(flow, row_scale, scale_ready);
#ifdef CLOCKS
  __syncthreads();
  if (threadIdx.x < 64) flow.clocks[blockIdx.x * 64 + threadIdx.x] = clocks_[threadIdx.x];
#endif
}
