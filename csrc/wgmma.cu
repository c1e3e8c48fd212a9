// W4A16 for many tokens on Hopper: one warp keeps the copy engine busy, two warpgroups multiply by wgmma.
//
// A stage holds one chunk: 128 rows of k of 256 features, their scales and the activations. Each warp has its own 64
// features, as fragments of 16; a warpgroup takes two of the four fragments of its warps. The codes of 16 rows of k
// are unpacked and scaled while the tensor cores still multiply the 16 rows before.
constexpr int GROUPS = GROUP ? 128 / GROUP : 1;  // per chunk
constexpr int STEPS = 8 / GROUPS;                // of 16 rows of k, per group
constexpr int WEIGHTS = 16384, SCALES = GROUP ? 512 * GROUPS : 0, FILLED = WEIGHTS + TOKENS * 256 + SCALES;
constexpr int STAGE = (FILLED + 1023) / 1024 * 1024;
constexpr int SUMS = TOKENS / 2;  // of a thread, per fragment: features l / 4 and + 8, tokens 8 i + 2 (l % 4) and + 1
#ifndef P
#define P 4
#endif
constexpr int PARTS = TOKENS / 8 < P ? TOKENS / 8 : P;  // of a warp's share of a tile, that are summed up each by itself
constexpr int ROWS = TOKENS / PARTS / 8;             // of eight tokens, in a part
static_assert(PARTS <= TICKETS / 8);

typedef float Sums[2][SUMS];
__device__ __forceinline__ void output_registers(const Problem& p, const Schedule& plan, int tile, Sums& acc, u32 staging);

extern "C" __global__ void __launch_bounds__(384, 1)
marlin_wgmma(const __grid_constant__ Problem p, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap x) {
  extern __shared__ __align__(1024) unsigned char unaligned[];
  const u32 stages = (shared_address(unaligned) + 1023) & ~1023u, full = stages + STAGES * STAGE, empty = full + 8 * STAGES;
  const Schedule plan(p);
  const int begin = plan.first(blockIdx.x), count = plan.first(blockIdx.x + 1) - begin;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      flag_init(full + 8 * s, 1);
      flag_init(empty + 8 * s, 8);
    }
    flags_ready();
  }
  __syncthreads();
  if (warp >= 8) {
    give_registers<GIVE>();
    if (threadIdx.x != 256) return;
    Position at(plan, begin);
    for (int i = 0, s = 0, phase = 1; i < count; i++, at.advance(plan, 1)) {
      const u32 stage = stages + s * STAGE, flag = full + s * 8;
      flag_wait(empty + s * 8, phase);
      flag_expect(flag, FILLED);
      copy_tile(stage, &weights, 256 * at.column, 8 * at.k, flag);
      if (GROUP) copy_tile(stage + WEIGHTS + TOKENS * 256, &scales, 256 * at.column, GROUPS * at.k, flag);
      if (i == 0) {
        let_next_kernel_start();
        wait_for_previous_kernel();
      }
      copy_tile(stage + WEIGHTS, &x, 128 * at.k, TOKENS * at.token_tile, flag);
      copy_tile(stage + WEIGHTS + TOKENS * 128, &x, 128 * at.k + 64, TOKENS * at.token_tile, flag);
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    return;
  }
  take_registers<TAKE>();
  const int group = warp / 4, column = warp % 4;
  Sums acc;
  wait_for_previous_kernel();
  int i = 0, s = 0, phase = 0;
  for (int tile = begin / plan.chunks; tile * plan.chunks < begin + count; tile++) {
    const int stop = min(count, (tile + 1) * plan.chunks - begin);
    u32 multiplied = 0;  // flag of the stage before, which the tensor cores still read
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int k = 0; k < SUMS; k++) acc[j][k] = 0.f;
    for (; i < stop; i++) {
      const u32 stage = stages + s * STAGE;
      const u32 codes = stage + column * 512 + lane * 16 + group * 8;
      const u32 scale = stage + WEIGHTS + TOKENS * 256 + column * 128 + lane / 4 * 16 + group * 8;
      const u64 tokens = matrix(stage + WEIGHTS);
      flag_wait(full + s * 8, phase);
      uint2 words[8];
#pragma unroll
      for (int r = 0; r < 8; r++) words[r] = load_shared_pair(codes + r * 2048);
      Factor factor[2][2];
      u32 a[2][2][4];
#pragma unroll
      for (int r = 0; r < 8; r++) {
        if (GROUP && r % STEPS == 0) {
          const uint2 pairs = load_shared_pair(scale + r / STEPS * 512);
          factors(pairs.x, factor[0]);
          factors(pairs.y, factor[1]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
          unpack(j ? words[r].y : words[r].x, a[r & 1][j]);
          if (GROUP) multiply_by(factor[j], a[r & 1][j]);
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2; j++) wgmma(acc[j], a[r & 1][j], tokens + (r / 4 * (TOKENS * 128) + r % 4 * 32) / 16, 1);
        wgmma_commit();
        wgmma_wait<1>();
        if (r == 0 && multiplied && lane == 0) flag_arrive(multiplied);
      }
      multiplied = empty + s * 8;
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    wgmma_wait<0>();
    if (lane == 0) flag_arrive(multiplied);
    output_registers(p, plan, tile, acc, empty + 8 * STAGES + warp * 512);
  }
}

// Eight tokens at a time through shared memory: a lane then has eight neighbouring features of one token.
__device__ __forceinline__ void store_part(const Problem& p, int token, int feature, const Sums& acc, int part, u32 staging) {
  const int lane = threadIdx.x % 32, row = lane % 8, to = staging + row * 64 + ((lane / 8 ^ row / 2) & 3) * 16;
  const int back = lane / 4, from = staging + back * 64 + ((lane % 4 ^ back / 2) & 3) * 16;
  float factor[2][2] = {{1.f, 1.f}, {1.f, 1.f}}, bias[2][2] = {};
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int f = feature + 16 * j + 8 * h + lane / 4;
      if (GROUP == 0) factor[j][h] = single_scale(p, f);
      if (p.bias) bias[j][h] = number(p.bias[f]);
    }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int i = 4 * (part * ROWS + r), t = token + 2 * i + back;
    u32 pairs[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
      const float* v = &acc[m / 2][i + m % 2 * 2];
      pairs[m] = pair(v[0] * factor[m / 2][m % 2] + bias[m / 2][m % 2], v[1] * factor[m / 2][m % 2] + bias[m / 2][m % 2]);
    }
    __syncwarp();
    store_matrices(to, pairs);
    __syncwarp();
    if (t < p.m) *(uint4*)(p.y + (u64)t * p.n + feature + lane % 4 * 8) = load_shared(from);
  }
}

// A tile whose sums are in registers. Of a tile that other blocks work on too, every warp writes its share down in
// parts; who comes last to a part sums it up, in the order of the chunks. Each block begins with another part, so that
// each comes last to some of them.
__device__ __forceinline__ void output_registers(const Problem& p, const Schedule& plan, int tile, Sums& acc, u32 staging) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = tile % plan.token_tiles * TOKENS, feature = tile / plan.token_tiles * 256 + warp % 4 * 64 + warp / 4 * 32;
  const int begin = tile * plan.chunks, head = plan.owner(begin), tail = plan.owner(begin + plan.chunks - 1);
  const int late = begin > plan.first(head), me = blockIdx.x;
  if (feature >= p.n) return;
  u32 mine = (1 << PARTS) - 1;  // parts that are this warp's to store
  if (head != tail) {
    constexpr int SIZE = TOKENS * 256;
    float* const there = p.parts + (warp * PARTS * ROWS * 2 * 32 + lane) * 4;
    mine = 0;
#pragma unroll 1
    for (int turn = 0; turn < PARTS; turn++) {
      const int part = (turn + me) % PARTS;
      float* to = there + (u64)(2 * me + (me == head && late)) * SIZE + part * ROWS * 2 * 128;
#pragma unroll
      for (int q = 0; q < PARTS; q++)
        if (q == part)
#pragma unroll
          for (int r = 0; r < ROWS * 2; r++) {
            const float* v = &acc[r % 2][4 * (q * ROWS + r / 2)];
            *(float4*)(to + r * 128) = make_float4(v[0], v[1], v[2], v[3]);
          }
      __syncwarp();
      u32 before = 0;
      if (lane == 0) before = take_ticket(p.tickets + head * TICKETS + warp * PARTS + part, tail - head);
      if (__shfl_sync(~0u, before, 0) == tail - head) mine |= 1 << part;
    }
#pragma unroll
    for (int q = 0; q < PARTS; q++)
      if (mine >> q & 1) {
        float sum[ROWS * 8] = {};
        for (int b = head; b <= tail; b++) {
          const float* from = there + (u64)(2 * b + (b == head && late)) * SIZE + q * ROWS * 2 * 128;
#pragma unroll
          for (int r = 0; r < ROWS * 2; r++) {
            const float4 v = load_global(from + r * 128);
            sum[4 * r] += v.x; sum[4 * r + 1] += v.y; sum[4 * r + 2] += v.z; sum[4 * r + 3] += v.w;
          }
        }
#pragma unroll
        for (int r = 0; r < ROWS * 2; r++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc[r % 2][4 * (q * ROWS + r / 2) + e] = sum[4 * r + e];
      }
  }
#pragma unroll
  for (int q = 0; q < PARTS; q++)
    if (mine >> q & 1) store_part(p, token, feature, acc, q, staging);
}
