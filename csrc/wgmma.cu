// W4A16 for many tokens on Hopper: one warp keeps the copy engine busy, two warpgroups multiply by wgmma.
//
// A stage holds one chunk: 128 rows of k of 256 features, their scales and the activations. Each warp has its own 64
// features, as fragments of 16; a warpgroup takes two of the four fragments of its warps. The codes of 16 rows of k
// are unpacked and scaled while the tensor cores still multiply the 16 rows before.
constexpr int GROUPS = GROUP ? 128 / GROUP : 1;  // per chunk
constexpr int STEPS = 8 / GROUPS;                // of 16 rows of k, per group
constexpr int WEIGHTS = 16384, SCALES = GROUP ? 512 * GROUPS : 0, FILLED = WEIGHTS + TOKENS * 256 + SCALES;
constexpr int STAGE = (FILLED + 1023) / 1024 * 1024;
constexpr int FRAGMENTS = 4 / SPLITS;  // of 16 features, of a warp
constexpr int SUMS = TOKENS / 2;  // of a thread, per fragment: features l / 4 and + 8, tokens 8 i + 2 (l % 4) and + 1
#ifndef P
#define P 2
#endif
#ifndef D
#define D 2
#endif
constexpr int PARTS = TOKENS < 64 ? 1 : P; // of a warp's share of a tile, that are summed up each by itself
constexpr int ROWS = TOKENS / PARTS / 8;             // of eight tokens, in a part
static_assert(PARTS * 4 * SPLITS <= TICKETS);

typedef float Sums[FRAGMENTS][SUMS];
__device__ __forceinline__ void output_registers(const Problem& p, const Schedule& plan, int tile, Sums& acc, u32 staging);

extern "C" __global__ void __launch_bounds__(128 * SPLITS + 128, 1)
marlin_wgmma(const __grid_constant__ Problem p, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap x) {
  extern __shared__ __align__(1024) unsigned char unaligned[];
  const u32 stages = (shared_address(unaligned) + 1023) & ~1023u, full = stages + STAGES * STAGE, empty = full + 8 * STAGES;
  const Schedule plan(p);
  const int begin = uniform(plan.first(blockIdx.x)), count = uniform(plan.first(blockIdx.x + 1)) - begin, chunks = uniform(plan.chunks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      flag_init(full + 8 * s, 1);
      flag_init(empty + 8 * s, 4 * SPLITS);
    }
    flags_ready();
  }
  __syncthreads();
  if (warp >= 4 * SPLITS) {
    give_registers<GIVE>();
    if (threadIdx.x != 128 * SPLITS) return;
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
  for (int tile = begin / chunks; tile * chunks < begin + count; tile++) {
    const int stop = min(count, (tile + 1) * chunks - begin);
    u32 multiplied = 0;  // flag of the stage before, which the tensor cores still read
#pragma unroll
    for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
      for (int k = 0; k < SUMS; k++) acc[j][k] = 0.f;
    for (; i < stop; i++) {
      const u32 stage = stages + s * STAGE;
      const u32 codes = stage + column * 512 + lane * 16 + group * (FRAGMENTS * 4);
      const u32 scale = stage + WEIGHTS + TOKENS * 256 + column * 128 + lane / 4 * 16 + group * (FRAGMENTS * 4);
      const u32 tokens = uniform(matrix(stage + WEIGHTS));
      flag_wait(full + s * 8, phase);
      u32 words[8][FRAGMENTS], pairs[FRAGMENTS];
#pragma unroll
      for (int r = 0; r < 8; r++) load_shared(words[r], codes + r * 2048);
      Factor factor[FRAGMENTS][2];
      u32 a[D][FRAGMENTS][4];
#pragma unroll
      for (int r = 0; r < 8; r++) {
        if (GROUP && r % STEPS == 0) load_shared(pairs, scale + r / STEPS * 512);
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j++) {
          if (GROUP && r % STEPS == 0) factors(pairs[j], factor[j]);
          unpack(words[r][j], a[r % D][j]);
          if (GROUP) multiply_by(factor[j], a[r % D][j]);
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j++) wgmma(acc[j], a[r % D][j], tokens + (r / 4 * (TOKENS * 128) + r % 4 * 32) / 16);
        wgmma_commit();
        wgmma_wait<D - 1>();
        if (r == D - 2 && multiplied && lane == 0) flag_arrive(multiplied);
      }
      multiplied = empty + s * 8;
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    wgmma_wait<0>();
    if (lane == 0) flag_arrive(multiplied);
    output_registers(p, plan, tile, acc, empty + 8 * STAGES + warp * 512);
  }
}

// 512 bytes at a time through shared memory: a lane then has eight neighbouring features of one token.
__device__ __forceinline__ void store_part(const Problem& p, int token, int feature, const Sums& acc, int part, u32 staging) {
  constexpr int COLUMNS = 2 * FRAGMENTS, OCTETS = 4 / COLUMNS;  // of the matrices of 8 tokens x 8 features that go at once
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = matrix / COLUMNS * 8 + lane % 8, back = lane / COLUMNS;
  const u32 to = staging + row * (32 * FRAGMENTS) + ((matrix ^ row * FRAGMENTS / 4) % COLUMNS) * 16;
  const u32 from = staging + back * (32 * FRAGMENTS) + ((lane ^ back * FRAGMENTS / 4) % COLUMNS) * 16;
  float factor[FRAGMENTS][2], bias[FRAGMENTS][2];
#pragma unroll
  for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int f = feature + 16 * j + 8 * h + lane / 4;
      factor[j][h] = GROUP ? 1.f : single_scale(p, f);
      bias[j][h] = p.bias ? number(p.bias[f]) : 0.f;
    }
#pragma unroll
  for (int r = part * ROWS; r < (part + 1) * ROWS; r += OCTETS) {
    u32 pairs[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
      const int j = m % COLUMNS / 2, h = m % 2;
      const float* v = &acc[j][4 * (r + m / COLUMNS) + 2 * h];
      pairs[m] = pair(v[0] * factor[j][h] + bias[j][h], v[1] * factor[j][h] + bias[j][h]);
    }
    __syncwarp();
    store_matrices(to, pairs);
    __syncwarp();
    const int t = token + 8 * r + back;
    if (t < p.m) *(uint4*)(p.y + (u64)t * p.n + feature + lane % COLUMNS * 8) = load_shared(from);
  }
}

// A tile whose sums are in registers. Of a tile that other blocks work on too, every warp writes its share down in
// parts; who comes last to a part sums it up, in the order of the chunks. Blocks begin with different parts, so that
// each comes last to some of them.
__device__ __forceinline__ void output_registers(const Problem& p, const Schedule& plan, int tile, Sums& acc, u32 staging) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, me = blockIdx.x;
  const int token = tile % plan.token_tiles * TOKENS;
  const int feature = tile / plan.token_tiles * 256 + warp % 4 * 64 + warp / 4 * (16 * FRAGMENTS);
  const int begin = tile * plan.chunks, head = plan.owner(begin), tail = plan.owner(begin + plan.chunks - 1);
  const int late = begin > plan.first(head);
  if (feature >= p.n) return;
  u32 mine = (1 << PARTS) - 1;  // parts that are this warp's to store
  if (head != tail) {
    constexpr int QUADS = ROWS * FRAGMENTS;  // of sums of a thread, in a part
    float* const there = p.parts + (warp * PARTS * QUADS * 32 + lane) * 4;
    auto place = [&](int block, int part) {
      return there + (u64)(2 * block + (block == head && late)) * (TOKENS * 256) + part * QUADS * 128;
    };
    u32* const tickets = p.tickets + head * TICKETS + warp * PARTS;
    u32 before[PARTS];
#pragma unroll
    for (int turn = 0; turn < PARTS; turn++) {
      const int part = (turn + me) % PARTS;
      float* to = place(me, part);
#pragma unroll
      for (int q = 0; q < PARTS; q++)
        if (q == part)
#pragma unroll
          for (int r = 0; r < QUADS; r++) {
            const float* v = &acc[r % FRAGMENTS][4 * (q * ROWS + r / FRAGMENTS)];
            *(float4*)(to + r * 128) = make_float4(v[0], v[1], v[2], v[3]);
          }
      __syncwarp();
      before[turn] = 0;
      if (lane == 0) before[turn] = take_ticket(tickets + part);
    }
    mine = 0;
#pragma unroll
    for (int turn = 0; turn < PARTS; turn++)
      if (__shfl_sync(~0u, before[turn], 0) == tail - head) {
        mine |= 1 << (turn + me) % PARTS;
        tickets[(turn + me) % PARTS] = 0;
      }
#pragma unroll
    for (int q = 0; q < PARTS; q++)
      if (mine >> q & 1) {
#pragma unroll
        for (int r = 0; r < QUADS * 4; r++) acc[r / 4 % FRAGMENTS][4 * (q * ROWS + r / 4 / FRAGMENTS) + r % 4] = 0.f;
        for (int b = head; b <= tail; b++)
#pragma unroll
          for (int r = 0; r < QUADS; r++) {
            const float4 v = load_global(place(b, q) + r * 128);
            float* sum = &acc[r % FRAGMENTS][4 * (q * ROWS + r / FRAGMENTS)];
            sum[0] += v.x; sum[1] += v.y; sum[2] += v.z; sum[3] += v.w;
          }
      }
  }
#pragma unroll
  for (int q = 0; q < PARTS; q++)
    if (mine >> q & 1) store_part(p, token, feature, acc, q, staging);
}
