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
constexpr int PARTS = TOKENS < 64 ? 1 : 2;  // of a warp's share of a tile, that are summed up each by itself
constexpr int ROWS = TOKENS / PARTS / 8;    // of eight tokens, in a part
static_assert(PARTS * 8 <= TICKETS);

typedef float Sums[2][SUMS];
__device__ __forceinline__ void output_registers(const Problem& p, const Tile& tile, Sums& acc, u32 staging);

extern "C" __global__ void __launch_bounds__(384, 1)
marlin_wgmma(const __grid_constant__ Problem p, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap x) {
  extern __shared__ __align__(1024) unsigned char unaligned[];
  const u32 stages = (shared_address(unaligned) + 1023) & ~1023u, full = stages + STAGES * STAGE, empty = full + 8 * STAGES;
  const Schedule& plan = p.plan;
  const int count = uniform(plan.count());
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
    Position at(plan, 0);
    for (int s = 0, phase = 1; at.i < count; at.advance(plan, 1)) {
      const u32 stage = stages + s * STAGE, flag = full + s * 8;
      flag_wait(empty + s * 8, phase);
      flag_expect(flag, FILLED);
      copy_tile(stage, &weights, at.tile.feature, 8 * at.k, flag);
      if (GROUP) copy_tile(stage + WEIGHTS + TOKENS * 256, &scales, at.tile.feature, GROUPS * at.k, flag);
      if (at.i == 0) {
        let_next_kernel_start();
        wait_for_previous_kernel();
      }
      copy_tile(stage + WEIGHTS, &x, 128 * at.k, at.tile.token, flag);
      copy_tile(stage + WEIGHTS + TOKENS * 128, &x, 128 * at.k + 64, at.tile.token, flag);
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    return;
  }
  take_registers<TAKE>();
  const int group = warp / 4, column = warp % 4;
  Sums acc;
  wait_for_previous_kernel();
  int s = 0, phase = 0;
  for (int i = 0; i < count;) {
    const Position here(plan, i);
    const int stop = uniform(min(count, here.stop));
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int k = 0; k < SUMS; k++) acc[j][k] = 0.f;
    u32 done = 0;  // the flag of the stage before, which the tensor cores still read
    for (; i < stop; i++) {
      const u32 stage = stages + s * STAGE;
      const u32 codes = stage + column * 512 + lane * 16 + group * 8;
      const u32 scale = stage + WEIGHTS + TOKENS * 256 + column * 128 + lane / 4 * 16 + group * 8;
      const u32 tokens = uniform(matrix(stage + WEIGHTS));
      flag_wait(full + s * 8, phase);
      u32 words[8][2], pairs[2], a[2][2][4];
      Factor factor[2][2];
#pragma unroll
      for (int r = 0; r < 8; r++) load_shared(words[r], codes + r * 2048);
#pragma unroll
      for (int r = 0; r < 8; r++) {
        if (GROUP && r % STEPS == 0) load_shared(pairs, scale + r / STEPS * 512);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          if (GROUP && r % STEPS == 0) factors(pairs[j], factor[j]);
          unpack(words[r][j], a[r % 2][j]);
          if (GROUP) multiply_by(factor[j], a[r % 2][j]);
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2; j++) wgmma(acc[j], a[r % 2][j], tokens + (r / 4 * (TOKENS * 128) + r % 4 * 32) / 16);
        wgmma_commit();
        wgmma_wait<1>();
        if (r == 0 && done && lane == 0) flag_arrive(done);
      }
      done = empty + s * 8;
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    wgmma_wait<0>();
    if (lane == 0) flag_arrive(done);
    output_registers(p, here.tile, acc, empty + 8 * STAGES + warp * 512);
  }
}

// Eight tokens at a time through shared memory: a lane then has eight neighbouring features of one token.
__device__ __forceinline__ void store_part(const Problem& p, int token, int feature, const Sums& acc, int part, u32 staging) {
  const int lane = threadIdx.x % 32, row = lane % 8, back = lane / 4;
  const u32 to = staging + row * 64 + ((lane / 8 ^ row / 2) & 3) * 16, from = staging + back * 64 + ((lane ^ back / 2) & 3) * 16;
  float factor[2][2], bias[2][2];
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int f = feature + 16 * j + 8 * h + lane / 4;
      factor[j][h] = GROUP ? 1.f : single_scale(p, f);
      bias[j][h] = p.bias ? number(p.bias[f]) : 0.f;
    }
#pragma unroll
  for (int r = part * ROWS; r < (part + 1) * ROWS; r++) {
    u32 pairs[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
      const int j = m / 2, h = m % 2;
      const float* v = &acc[j][4 * r + 2 * h];
      pairs[m] = pair(v[0] * factor[j][h] + bias[j][h], v[1] * factor[j][h] + bias[j][h]);
    }
    __syncwarp();
    store_matrices(to, pairs);
    __syncwarp();
    const int t = token + 8 * r + back;
    if (t < p.m) *(uint4*)(p.y + (u64)t * p.n + feature + lane % 4 * 8) = load_shared(from);
  }
}

// A tile whose sums are in registers. Of a tile that other blocks work on too, every warp writes its share down in
// parts; who comes last to a part sums it up, in the order of the chunks. Blocks begin with different parts, so that
// each comes last to some of them.
__device__ __forceinline__ void output_registers(const Problem& p, const Tile& tile, Sums& acc, u32 staging) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, me = blockIdx.x;
  const int head = tile.head, tail = tile.tail, feature = tile.feature + warp % 4 * 64 + warp / 4 * 32;
  if (feature >= p.n) return;
  u32 mine = (1 << PARTS) - 1;  // parts that are this warp's to store
  if (head != tail) {
    constexpr int QUADS = ROWS * 2;  // of sums of a thread, in a part
    auto place = [&](int block, int part) {
      return tile.part(p, block) + ((warp * PARTS + part) * QUADS * 32 + lane) * 4;
    };
    u32* const tickets = p.tickets + head * TICKETS + warp * PARTS;
    auto add = [&](int block, int part) {
#pragma unroll
      for (int r = 0; r < QUADS; r++) {
        const float4 v = load_global(place(block, part) + r * 128);
        float* sum = &acc[r % 2][4 * (part * ROWS + r / 2)];
        sum[0] += v.x; sum[1] += v.y; sum[2] += v.z; sum[3] += v.w;
      }
    };
    // a block that came late to a tile, when all others are done, adds theirs to its own: no need to write its own down
    if (me == head && tile.late && __all_sync(~0u, lane >= PARTS || load_acquire(tickets + lane % PARTS) == tail - head)) {
      if (lane < PARTS) tickets[lane] = 0;
      for (int b = head + 1; b <= tail; b++)
#pragma unroll
        for (int q = 0; q < PARTS; q++) add(b, q);
    } else {
      u32 before = ~0u;
      const bool even = p.plan.even();  // then all come at the same time
#pragma unroll
      for (int turn = 0; turn < PARTS; turn++) {
        const int part = (turn + me) % PARTS;
        float* to = place(me, part);
#pragma unroll
        for (int q = 0; q < PARTS; q++)
          if (q == part)
#pragma unroll
            for (int r = 0; r < QUADS; r++) {
              const float* v = &acc[r % 2][4 * (q * ROWS + r / 2)];
              *(float4*)(to + r * 128) = make_float4(v[0], v[1], v[2], v[3]);
            }
        __syncwarp();
        if (even && lane == part) before = take_ticket(tickets + part);
      }
      if (!even && lane < PARTS) before = take_ticket(tickets + lane);
      const bool last = before == tail - head;
      if (last) tickets[lane] = 0;
      mine = __ballot_sync(~0u, last);
#pragma unroll
      for (int q = 0; q < PARTS; q++)
        if (mine >> q & 1) {
#pragma unroll
          for (int r = 0; r < QUADS * 4; r++) acc[r / 4 % 2][4 * (q * ROWS + r / 4 / 2) + r % 4] = 0.f;
          for (int b = head; b <= tail; b++) add(b, q);
        }
    }
  }
#pragma unroll
  for (int q = 0; q < PARTS; q++)
    if (mine >> q & 1) store_part(p, tile.token, feature, acc, q, staging);
}
