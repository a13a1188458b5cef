// Rows times a weight matrix: out[n, f] = sum over k of x[n, k] * w[f, k], and what follows it.
//
// A block has a tile of FEATURES x ROWS of the output and takes one after the other. One warp brings
// operands through a ring in shared memory, two groups of four warps multiply (`wgmma`), each its half of
// the features. The features are the rows of the tensor cores' tile, so that the rows of x, of which
// there are some hundred and no power of two, can be cut into any multiple of 32.
//
// Blocks form clusters of CLUSTER_F x CLUSTER_N: those with the same features bring a part of the weights
// each, for all of them, those with the same rows a part of x. What is read from L2 is the limit otherwise.
//
// Launched so that it may begin before its inputs are there: weights are on their way to shared memory then.
//
// AFTER: 0 nothing, 1 adds a bias, 2 adds a bias, then GELU; 3 gelu(gate) * up, where weight rows alternate: half
// of a tile's features are gates then, half what they are multiplied with.
// Sums of SPLITS parts of K are terms of their own: out [splits, n, f].
//
// Compiled with ROWS (of a tile, a multiple of 32 up to 256), PIECES (how many products of 64 features x ROWS a
// group of warps does with one step of K), CLUSTER_F, CLUSTER_N, STAGES, AFTER defined. `multiply` is written by
// product.py: its registers have to be listed one by one.

#include "sm90.cuh"

constexpr int GROUPS = 2, COMPUTING = GROUPS * 128, THREADS = COMPUTING + 128;
constexpr int FEATURES = GROUPS * 64 * PIECES, DEPTH = 64;
constexpr int CLUSTER = CLUSTER_F * CLUSTER_N;
constexpr int W_BYTES = FEATURES * DEPTH * 2, X_BYTES = ROWS * DEPTH * 2, STAGE = W_BYTES + X_BYTES;
constexpr int W_PART = W_BYTES / CLUSTER_N, X_PART = X_BYTES / CLUSTER_F;  // that one block brings
constexpr int SUMS = ROWS / 2;                                              // of a thread and a product
constexpr bool GATED = AFTER == 3;
// What leaves: 32 rows of 64 features at once, twice per group of warps.
constexpr int OUT_PITCH = 128, OUT_ROWS = 32, OUT_BYTES = OUT_ROWS * OUT_PITCH;
constexpr int OUT_AT = STAGES * STAGE, BARRIERS_AT = OUT_AT + GROUPS * 2 * OUT_BYTES;
static_assert(ROWS % 32 == 0 && ROWS <= 256 && X_PART % 1024 == 0 && W_PART % 1024 == 0, "tiles");
static_assert(!GATED || PIECES == 2 && CLUSTER_N <= 2, "gates are one piece, what they are multiplied with the other");

struct alignas(64) Map {
  u64 opaque[16];
};

struct Product {
  Map weights;  // [k, f, 1]: box of 64 x rows of a part x 1; gated [k, f / 2, 2]: box of 64 x 128 x 1
  Map inputs;   // [k, n]: box of 64, rows of a part
  const bf16 *bias;
  bf16 *out;                    // [splits, n, out_features]
  int n, out_features;
  int depth_steps, splits;      // K in steps, in parts
  int feature_groups, row_groups;  // of tiles that a cluster does at once
};

extern __shared__ unsigned char unaligned[];

__device__ __forceinline__ float number(bf16 x) { return __uint_as_float((u32)x << 16); }
// The tanh form, by the multiprocessor's own tanh: one slow instruction where an exponential and a division are two.
__device__ __forceinline__ float gelu(float a) {
  float u = a * (0.7978845608f + 0.0356774081f * a * a), t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(u));
  return 0.5f * a + 0.5f * a * t;
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// ---- between blocks -----------------------------------------------------------------------------

// At the same place in the memory of another block of the cluster. Not `.release.cluster`: that is a fence for all
// memory in the machine code, which waits for every operand on its way, and takes a third of the speed. What it would
// order, reads of shared memory by tensor cores, `multiply_wait` has seen the end of.
__device__ __forceinline__ void barrier_arrive(u32 at, u32 rank) {
  asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
               "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(at), "r"(rank) : "memory");
}

// A place in the ring, and which time round.
struct Place {
  u32 stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// ---- what a cluster has to do -------------------------------------------------------------------

struct Unit {
  int feature_tile, row_tile, split, first_step, steps;
};
// Row groups first, so that weights are read once from memory and then from L2.
__device__ __forceinline__ int units(const Product &p) { return p.splits * p.feature_groups * p.row_groups; }
__device__ __forceinline__ Unit unit_of(const Product &p, int number, u32 rank) {
  Unit unit;
  unit.row_tile = number % p.row_groups * CLUSTER_N + rank / CLUSTER_F;
  number /= p.row_groups;
  unit.feature_tile = number % p.feature_groups * CLUSTER_F + rank % CLUSTER_F;
  unit.split = number / p.feature_groups;
  int of_split = (p.depth_steps + p.splits - 1) / p.splits;
  unit.first_step = unit.split * of_split;
  unit.steps = min(of_split, p.depth_steps - unit.first_step);
  return unit;
}

// ---- operands -----------------------------------------------------------------------------------

// A box of the weights, to all blocks with the same features.
__device__ __forceinline__ void bring_box(const Product &p, int k, int feature, int which, u32 to, u32 barrier, u32 rank) {
  if (CLUSTER_N == 1) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(&p.weights), "r"(barrier), "r"(k), "r"(feature), "r"(which) : "memory");
  } else {
    u32 mask = 0;
#pragma unroll
    for (int i = 0; i < CLUSTER_N; i++) mask |= 1u << (rank % CLUSTER_F + i * CLUSTER_F);
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
                 "l"(&p.weights), "r"(barrier), "r"(k), "r"(feature), "r"(which), "h"((unsigned short)mask) : "memory");
  }
}
// In shared memory: all gates, then what they are multiplied with.
__device__ __forceinline__ void bring_weights(const Product &p, const Unit &unit, int step, u32 to, u32 barrier, u32 rank) {
  int k = (unit.first_step + step) * DEPTH, part = rank / CLUSTER_F;
  if (!GATED) {
    bring_box(p, k, unit.feature_tile * FEATURES + part * (FEATURES / CLUSTER_N), 0, to + part * W_PART, barrier, rank);
  } else if (CLUSTER_N == 2) {
    bring_box(p, k, unit.feature_tile * (FEATURES / 2), part, to + part * W_PART, barrier, rank);
  } else {
    bring_box(p, k, unit.feature_tile * (FEATURES / 2), 0, to, barrier, rank);
    bring_box(p, k, unit.feature_tile * (FEATURES / 2), 1, to + W_BYTES / 2, barrier, rank);
  }
}
__device__ __forceinline__ void bring_inputs(const Product &p, const Unit &unit, int step, u32 to, u32 barrier, u32 rank) {
  u32 part = rank % CLUSTER_F;
  int k = (unit.first_step + step) * DEPTH, row = unit.row_tile * ROWS + part * (ROWS / CLUSTER_F);
  to += W_BYTES + part * X_PART;
  if (CLUSTER_F == 1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(&p.inputs), "r"(barrier), "r"(k), "r"(row) : "memory");
  } else {
    u32 mask = ((1u << CLUSTER_F) - 1) << (rank / CLUSTER_F * CLUSTER_F);  // blocks with the same rows
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(&p.inputs), "r"(barrier), "r"(k), "r"(row), "h"((unsigned short)mask) : "memory");
  }
}

// By one thread: everything that this block brings.
__device__ __forceinline__ void bring(const Product &p, u32 base, u32 full, u32 empty, u32 rank) {
  Place place;
  int clusters = gridDim.x / CLUSTER, first = blockIdx.x / CLUSTER;
  Unit unit = unit_of(p, first, rank);
  // Weights of the first steps before the inputs are there.
  int early = min(STAGES, unit.steps);
  for (int step = 0; step < early; step++) {
    barrier_expect(full + step * 8, STAGE);
    bring_weights(p, unit, step, base + step * STAGE, full + step * 8, rank);
  }
  wait_for_inputs();
  for (int step = 0; step < early; step++) {
    bring_inputs(p, unit, step, base + step * STAGE, full + step * 8, rank);
    place.next();
  }
  for (int number = first; number < units(p); number += clusters) {
    unit = unit_of(p, number, rank);
    for (int step = number == first ? early : 0; step < unit.steps; step++) {
      u32 to = base + place.stage * STAGE, barrier = full + place.stage * 8;
      barrier_wait(empty + place.stage * 8, place.parity ^ 1);
      barrier_expect(barrier, STAGE);
      bring_weights(p, unit, step, to, barrier, rank);
      bring_inputs(p, unit, step, to, barrier, rank);
      place.next();
    }
  }
}

// ---- tensor cores -------------------------------------------------------------------------------

// c[64 features, ROWS] (+)= a[features, 16 of K] @ b[rows, 16 of K].T. A lane has features
// 16 * warp + lane / 4 (+ 8) and rows 8 * j + lane % 4 * 2 (+ 1): c[4 * j + 2 * (+8) + (+1)].
__device__ __forceinline__ void multiply(float (&c)[SUMS], u64 a, u64 b, int accumulate);

// ---- what leaves --------------------------------------------------------------------------------

__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Of a staged row of features, where the 16 bytes at `piece` lie: so that eight rows lie in all banks.
__device__ __forceinline__ u32 staged(int row, int piece) {
  return row * OUT_PITCH + (piece ^ row % 8) * 16;
}
// Four 8 x 8 matrices, each turned: what was a column is a row at the address of lane 8 * matrix + column.
__device__ __forceinline__ void store_turned(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// One product's sums, of features first_feature and on, rows first_row and on, to memory. `up`: what they are
// multiplied with where they are gates.
__device__ __forceinline__ void leave(const Product &p, const float (&c)[SUMS], const float (&up)[SUMS], int first_feature, int first_row,
                                      int split, u32 staging, int group, u32 &half) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  float bias[2] = {0.f, 0.f};
  if (AFTER == 1 || AFTER == 2)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int feature = first_feature + warp * 16 + lane / 4 + 8 * h;
      if (feature < p.out_features) bias[h] = number(p.bias[feature]);
    }
  bf16 *out = p.out + (long long)split * p.n * p.out_features;
#pragma unroll
  for (int chunk = 0; chunk < ROWS / OUT_ROWS; chunk++) {
    u32 to = staging + half * OUT_BYTES;
    half ^= 1;
    u32 words[4][2];  // of 8 rows each, of 8 features each
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int at = (chunk * 4 + j) * 4 + 2 * h;
        float a = c[at] + bias[h], b = c[at + 1] + bias[h];
        if (GATED) a = gelu(a) * up[at], b = gelu(b) * up[at + 1];
        if (AFTER == 2) a = gelu(a), b = gelu(b);
        words[j][h] = pack(a, b);
      }
    int row = lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
    store_turned(to + staged(row, piece), words[0][0], words[0][1], words[1][0], words[1][1]);
    store_turned(to + staged(row + 16, piece), words[2][0], words[2][1], words[3][0], words[3][1]);
    group_sync(group);
#pragma unroll
    for (int i = 0; i < OUT_ROWS / 16; i++) {
      int row = thread / 8 + i * 16, piece = thread % 8, n = first_row + chunk * OUT_ROWS + row, feature = first_feature + piece * 8;
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(to + staged(row, piece)));
      if (n < p.n && feature < p.out_features) *(uint4 *)(out + (long long)n * p.out_features + feature) = v;
    }
  }
}

__device__ __forceinline__ void compute(const Product &p, u32 base, u32 full, u32 empty, u32 staging, u32 rank) {
  int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  int clusters = gridDim.x / CLUSTER;
  u32 half = 0;
  Place place;
  staging += group * 2 * OUT_BYTES;
#pragma unroll 1
  for (int number = blockIdx.x / CLUSTER; number < units(p); number += clusters) {
    Unit unit = unit_of(p, number, rank);
    float c[PIECES][SUMS];
    u32 before = 0;
#pragma unroll 1
    for (int step = 0; step < unit.steps; step++) {
      u32 at = base + place.stage * STAGE;
      // The same in all lanes; the compiler does not see it of itself.
      u32 w = __shfl_sync(~0u, operand(at + group * (64 * DEPTH * 2)), 0), x = __shfl_sync(~0u, operand(at + W_BYTES), 0);
      barrier_wait(full + place.stage * 8, place.parity);
      multiply_begin();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
        for (int f = 0; f < PIECES; f++)
          multiply(c[f], descriptor(w + f * (GROUPS * 64 * DEPTH * 2 / 16) + k * 2), descriptor(x + k * 2), step + k > 0);
      multiply_commit();
      if (step > 0) {
        multiply_wait<1>();
        if (thread < CLUSTER) barrier_arrive(empty + before * 8, thread);
      }
      before = place.stage;
      place.next();
    }
    multiply_wait<0>(reinterpret_cast<float (&)[PIECES * SUMS]>(c));
    if (thread < CLUSTER) barrier_arrive(empty + before * 8, thread);
#pragma unroll
    for (int f = 0; f < (GATED ? 1 : PIECES); f++) {
      int feature = unit.feature_tile * (GATED ? FEATURES / 2 : FEATURES) + (f * GROUPS + group) * 64;
      leave(p, c[f], c[PIECES - 1], feature, unit.row_tile * ROWS, unit.split, staging, group, half);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Product p) {
  u32 base = shared_address(unaligned);
  base += (1024 - base % 1024) % 1024;
  u32 full = base + BARRIERS_AT, empty = full + STAGES * 8, rank = CLUSTER == 1 ? 0 : cluster_rank();
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&p.weights) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&p.inputs) : "memory");
    for (int i = 0; i < STAGES; i++) barrier_init(full + i * 8, 1), barrier_init(empty + i * 8, GROUPS * CLUSTER);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_arrive(), cluster_wait();
  let_next_begin();
  if (threadIdx.x >= COMPUTING) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == COMPUTING) bring(p, base, full, empty, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    compute(p, base, full, empty, base + OUT_AT, rank);
  }
  // Nobody ends while another block still writes into its memory or announces something there.
  if (CLUSTER > 1) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}
