// W4A16 for many tokens on Hopper: one warp keeps the copy engine busy, two warpgroups multiply by wgmma.
//
// Two warps share 64 features, two fragments of 16 each; of PAIRED's features four warps share 64 of gate and those of
// up, a fragment of either each. The codes of a step are unpacked and scaled while the tensor cores still multiply the
// step before.
constexpr int SUMS = TOKENS / 2;  // of a thread, per fragment: features l / 4 and + 8, tokens 8 i + 2 (l % 4) and + 1
constexpr int PARTS = TOKENS < 64 ? 1 : 2;  // of a warp's share of a tile, that are summed up each by itself
constexpr int ROWS = TOKENS / PARTS / 8;    // of eight tokens, in a part
static_assert(PARTS * 8 <= TICKETS);

typedef float Sums[2][SUMS];
__device__ __forceinline__ void output_registers(const Problem& p, const Tile& tile, Sums& acc, u32 staging, int column, int half);
__device__ __forceinline__ void output_in_cluster(const Problem& p, const Tile& tile, const Sums& acc, u32 memory, u32 staging, int column, int half);

extern "C" __global__ void __launch_bounds__(384, 1)
#if EXPERTS
marlin_wgmma(const __grid_constant__ Problem given, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap weights_up, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap scales_up) {
  fetch_maps(weights, weights_up, scales, scales_up);
  const Problem& p = planned(given);
#else
marlin_wgmma(const __grid_constant__ Problem p, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap metadata, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap x) {
#endif
  extern __shared__ __align__(1024) unsigned char unaligned[];
  const u32 stages = (shared_address(unaligned) + 1023) & ~1023u, full = stages + STAGES * STAGE, empty = full + 8 * STAGES;
  const Schedule& plan = p.plan;
  const int count = uniform(plan.count());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      flag_init(full + 8 * s, EXPERTS ? 1 + 128 : 1);
      flag_init(empty + 8 * s, 8);
    }
    flags_ready();
  }
  __syncthreads();
  if (warp >= 8) {
    give_registers<GIVE>();
#if EXPERTS
    load_experts(p, count, stages, full, empty, weights, weights_up, scales, scales_up);
    return;
#else
    if (threadIdx.x != 256) return;
    Position at(plan, 0);
    for (int s = 0, phase = 1; at.i < count; at.advance(plan, 1)) {
      const u32 stage = stages + s * STAGE, flag = full + s * 8;
      flag_wait(empty + s * 8, phase);
      flag_expect(flag, FILLED);
      copy_tile(stage, &weights, at.tile.feature, STEPS * at.k, flag);
      if (SPARSE) copy_tile(stage + CODES, &metadata, at.tile.feature, 4 * at.k, flag);
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
#endif
  }
  take_registers<TAKE>();
  // Fragments 2 half and 2 half + 1 of 64 features; the warps of a column of Sparse-MARLIN are of one warpgroup. Of PAIRED
  // fragment `half` of both columns.
  const int column = PAIRED ? warp / 4 : SPARSE ? warp / 4 * 2 + warp % 2 : warp % 4;
  const int half = PAIRED ? warp % 4 : SPARSE ? warp / 2 % 2 : warp / 4;
  Sums acc;
  u32 which[STEPS] = {};  // rows of four the codes of a step are
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
      const u32 codes = stage + column * 512 + lane * 16 + half * (PAIRED ? 4 : 8);
      const u32 scale = stage + WEIGHTS + TOKENS * 256 + column * 128 + lane / 4 * 16 + half * (PAIRED ? 4 : 8);
      const u32 tokens = uniform(matrix(stage + WEIGHTS));
      flag_wait(full + s * 8, phase);
      if (EXPERTS) show_to_tensor_cores();
      // of two fragments
      const auto load_words = [&](u32 (&words)[2], u32 from, int up) {
        if (PAIRED) { words[0] = load_shared_word(from); words[1] = load_shared_word(from + up); }
        else load_shared(words, from);
      };
      const auto metadata = [&](int step) { return load_shared_word(stage + CODES + step * 1024 + column * 256 + half * 128 + lane * 4); };
      u32 words[STEPS][2], pairs[2], a[2][2][4];
      Factor factor[2][2];
#pragma unroll
      for (int r = 0; r < STEPS; r++) {
        load_words(words[r], codes + r * CODES_ROW, CODES / 2);
        if (SPARSE && r < STEPS - 1) which[r] = metadata(r);
      }
#pragma unroll
      for (int r = 0; r < STEPS; r++) {
        if (GROUP && r % GROUP_STEPS == 0) load_words(pairs, scale + r / GROUP_STEPS * SCALES_ROW, SCALES / 2);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          if (GROUP && r % GROUP_STEPS == 0) factors(pairs[j], factor[j]);
          unpack(words[r][j], a[r % 2][j]);
          if (GROUP) multiply_by(factor[j], a[r % 2][j]);
        }
        constexpr int PER_ROWS = STEPS / 2;  // steps of 64 rows of k, the bytes of a swizzled token
        const u32 rows = tokens + (r / PER_ROWS * (TOKENS * 128) + r % PER_ROWS * (128 / PER_ROWS)) / 16;
        wgmma_fence();
        wgmma<0>(acc[0], a[r % 2][0], which[r], rows);
        wgmma<1>(acc[1], a[r % 2][1], which[r], rows);
        wgmma_commit();
        wgmma_wait<1>();
        // The tensor cores read metadata while they multiply, which ptxas does not know: until here the last step of
        // the chunk before needs its register, and anything that is loaded into it makes products wrong.
        if (SPARSE && r == 0) which[STEPS - 1] = metadata(STEPS - 1);
        if (r == 0 && done && lane == 0) flag_arrive(done);
      }
      done = empty + s * 8;
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    wgmma_wait<0>();
    if (lane == 0) flag_arrive(done);
    const u32 staging = empty + 8 * STAGES + column * 1024;
    if (cluster_size() > 1) output_in_cluster(p, here.tile, acc, stages, staging, column, half);
    else output_registers(p, here.tile, acc, staging, column, half);
  }
}

// Who stores together: a warp has 32 features side by side; of Sparse-MARLIN's it has every other two, and the other
// warp of the column those between.
__device__ __forceinline__ void meet(int column) {
  if (SPARSE) barrier(2 + column, 64); else __syncwarp();
}

// Of a thread: two fragments, features l / 4 and + 8.
struct ScaleAndBias {
  float factor[2][2], bias[2][2];
  __device__ __forceinline__ ScaleAndBias(const Problem& p, const Tile& tile, int feature, int half) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int f = feature + feature_in_column(PAIRED ? half : 2 * half + j, h, threadIdx.x % 32);
        factor[j][h] = GROUP ? 1.f : single_scale(p, tile, f, PAIRED && j);
        bias[j][h] = bias_of(p, tile, f, PAIRED && j);
      }
  }
};

// Eight tokens through shared memory: a lane then has eight neighbouring features of one token. Sums are those of two
// fragments.
__device__ __forceinline__ void store_row(const Problem& p, const Tile& tile, const ScaleAndBias& left, int token, int feature, const float (&sums)[8], u32 staging, int column, int half) {
  const int lane = threadIdx.x % 32, row = lane % 8, back = SPARSE ? 4 * half + lane / 8 : lane / 4;
  const u32 to = staging + half * 512 + row * 64 + ((lane / 8 ^ row / 2) & 3) * 16;
  const u32 from = SPARSE ? staging + back * 128 + ((lane ^ back) & 7) * 16
                          : staging + half * 512 + back * 64 + ((lane ^ back / 2) & 3) * 16;
  float v[2][2][2];  // of two fragments, features l / 4 and + 8, tokens 2 (l % 4) and + 1
#pragma unroll
  for (int i = 0; i < 8; i++) v[i / 4][i / 2 % 2][i % 2] = sums[i] * left.factor[i / 4][i / 2 % 2] + left.bias[i / 4][i / 2 % 2];
  if (PAIRED) {  // 16 features of eight tokens, 32 bytes each
    u32 pairs[2];
#pragma unroll
    for (int h = 0; h < 2; h++) pairs[h] = pair(silu_times(v[0][h][0], v[1][h][0]), silu_times(v[0][h][1], v[1][h][1]));
    const u32 there = staging + half * 256 + lane % 8 * 32;
    __syncwarp();
    store_matrices(there + lane / 8 % 2 * 16, pairs);
    __syncwarp();
    const int t = token + lane % 8;
    if (lane < 16 && tile.holds(p, t)) *(uint4*)(p.y + (u64)t * p.n + feature + 16 * half + lane / 8 * 8) = load_shared(there + lane / 8 * 16);
    return;
  }
  meet(column);
  if (SPARSE) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int t = 2 * (lane % 4) + e;
        store_shared(staging + t * 128 + ((lane / 4 ^ t) & 7) * 16 + 8 * h + 4 * half, pair(v[0][h][e], v[1][h][e]));
      }
  } else {
    const u32 pairs[4] = {pair(v[0][0][0], v[0][0][1]), pair(v[0][1][0], v[0][1][1]), pair(v[1][0][0], v[1][0][1]), pair(v[1][1][0], v[1][1][1])};
    store_matrices(to, pairs);
  }
  meet(column);
  const int t = token + back, f = feature + (SPARSE ? lane % 8 * 8 : 32 * half + lane % 4 * 8);
  if (tile.holds(p, t)) *(uint4*)(p.y + (u64)t * p.n + f) = load_shared(from);
}
__device__ __forceinline__ void store_part(const Problem& p, const Tile& tile, int feature, const Sums& acc, int part, u32 staging, int column, int half) {
  const ScaleAndBias left(p, tile, feature, half);
#pragma unroll
  for (int r = part * ROWS; r < (part + 1) * ROWS; r++) {
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = acc[i / 4][4 * r + i % 4];
    store_row(p, tile, left, tile.token + 8 * r, feature, sums, staging, column, half);
  }
}

// A tile that the blocks of a cluster share, and the only one each of them has, so that nothing is on its way into the
// stages: each leaves its sums there, and then sums up and stores some rows of eight tokens of 64 features, in the order
// of the chunks.
__device__ __forceinline__ void output_in_cluster(const Problem& p, const Tile& tile, const Sums& acc, u32 memory, u32 staging, int column, int half) {
  constexpr int ALL = TOKENS / 8 * 4;
  static_assert(TOKENS * 1024 <= STAGES * STAGE);
  const int lane = threadIdx.x % 32, blocks = cluster_size(), me = cluster_rank();
  auto place = [&](int row, int of, int j) { return memory + (((row * 4 + of) * 2 + half) * 2 + j) * 512 + lane * 16; };
  barrier(1, 256);
#pragma unroll
  for (int r = 0; r < TOKENS / 8; r++)
#pragma unroll
    for (int j = 0; j < 2; j++) store_shared(place(r, column, j), make_float4(acc[j][4 * r], acc[j][4 * r + 1], acc[j][4 * r + 2], acc[j][4 * r + 3]));
  cluster_barrier();
  for (int i = ALL * me / blocks + column; i < ALL * (me + 1) / blocks; i += 4) {
    const int feature = tile.feature + i % 4 * 64;
    if (feature >= p.n) continue;
    float sums[8] = {};
#pragma unroll
    for (int b = 0; b < LARGEST_CLUSTER; b++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (b < blocks) {
          const float4 v = load_of_block(place(i / 4, i % 4, j), b);
          sums[4 * j] += v.x; sums[4 * j + 1] += v.y; sums[4 * j + 2] += v.z; sums[4 * j + 3] += v.w;
        }
    store_row(p, tile, ScaleAndBias(p, tile, feature, half), tile.token + i / 4 * 8, feature, sums, staging, column, half);
  }
  cluster_barrier();
}

// A tile whose sums are in registers. Of a tile that other blocks work on too, those who store together write their
// share down in parts; who comes last to a part sums it up, in the order of the chunks. Blocks begin with different
// parts, so that each comes last to some of them.
__device__ __forceinline__ void output_registers(const Problem& p, const Tile& tile, Sums& acc, u32 staging, int column, int half) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, me = blockIdx.x;
  const int head = tile.head, tail = tile.tail, feature = tile.feature + column * 64;
  if (feature >= p.n) return;
  u32 mine = (1 << PARTS) - 1;  // parts that are this warp's to store
  if (head != tail) {
    constexpr int QUADS = ROWS * 2;  // of sums of a thread, in a part
    auto place = [&](int block, int part) {
      return tile.part(p, block) + ((warp * PARTS + part) * QUADS * 32 + lane) * 4;
    };
    u32* const tickets = p.tickets + head * TICKETS + (SPARSE ? column : warp) * PARTS;
    const bool first = !SPARSE || half == 0;  // of those who store together, the warp that takes the tickets
    auto told = [&](u32 answer) {  // by the first
      if (!SPARSE) return answer;
      meet(column);
      if (first && lane == 0) store_shared(staging, answer);
      meet(column);
      answer = load_shared_word(staging);
      meet(column);
      return answer;
    };
    auto add = [&](int block, int part) {
#pragma unroll
      for (int r = 0; r < QUADS; r++) {
        const float4 v = load_global(place(block, part) + r * 128);
        float* sum = &acc[r % 2][4 * (part * ROWS + r / 2)];
        sum[0] += v.x; sum[1] += v.y; sum[2] += v.z; sum[3] += v.w;
      }
    };
    u32 all = 0;
    if (me == head && tile.late) all = told(__all_sync(~0u, !first || lane >= PARTS || load_acquire(tickets + lane % PARTS) == tail - head));
    if (all) {  // a block that came late to a tile, when all others are done, adds theirs to its own
      if (first && lane < PARTS) tickets[lane] = 0;
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
        meet(column);
        if (even && first && lane == part) before = take_ticket(tickets + part);
      }
      if (!even && first && lane < PARTS) before = take_ticket(tickets + lane);
      const bool last = before == tail - head;
      if (last) tickets[lane] = 0;
      mine = told(__ballot_sync(~0u, last));
#pragma unroll
      for (int q = 0; q < PARTS; q++)
        if (mine >> q & 1) {
#pragma unroll
          for (int r = 0; r < QUADS * 4; r++) acc[r / 4 % 2][4 * (q * ROWS + r / 8) + r % 4] = 0.f;
          for (int b = head; b <= tail; b++) add(b, q);
        }
    }
  }
#pragma unroll
  for (int q = 0; q < PARTS; q++)
    if (mine >> q & 1) store_part(p, tile, feature, acc, q, staging, column, half);
}
