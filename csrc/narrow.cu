// W4A16 for few tokens on Hopper, where a tile of 256 features would be shared by many blocks: tiles of 64 or 128, that one
// block or those of a cluster multiply by all of k, and no other tile. The copy engine loads, two warpgroups multiply by wgmma.
//
// A chunk is four pieces of 128 rows of k of 64 features, as the columns of wgmma.cu's are, or two where three chunks of four
// find no room; here they are one or two columns, and SEGMENTS of k. A warpgroup has OWN of the segments of a column, and sums
// for each.
constexpr int OWN = PIECES / 2;
constexpr int HALVES = COLUMNS == 1 ? 2 : 1;  // warpgroups that have the same features
constexpr int METADATA_ROW = 256 * COLUMNS;  // bytes of a step
constexpr int PITCH = 128 + 16;              // of a token of a column, in what is stored together
constexpr int MOST_PARTS = NARROW_CLUSTER * HALVES;  // that a row of eight tokens is summed up of
// SENDS: the blocks of a cluster send each other their sums, so that none has to be fenced, which takes a microsecond.
constexpr int SUMMED = TOKENS * 256 * COLUMNS * (SENDS ? MOST_PARTS : HALVES);  // bytes of a block
static_assert(SUMMED + 2 * TOKENS * PITCH <= STAGES * STAGE);

// The sums of its segments become output, with those of the other warpgroup and of the other blocks of a cluster that have
// the same features: each warpgroup of these stores some of the rows of eight tokens, summed up in the order of k. Its
// `flag` counts the bytes that it is sent.
__device__ __forceinline__ void output_narrow(const Problem& p, const Tile& tile, const float (&sums)[TOKENS / 2], u32 memory, u32 flag, int column, int fragment) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = cluster_size();
  const int group = warp / 4, all = blocks * HALVES, me = cluster_rank() * HALVES + group % HALVES;
  const bool sends = SENDS && blocks > 1;
  auto place = [&](int row, int part) {
    return memory + (((row * (sends ? MOST_PARTS : HALVES) + part) * COLUMNS + (COLUMNS == 2 ? group : 0)) * 128 + threadIdx.x % 128) * 16;
  };
  auto of_row = [&](int row) { return make_float4(sums[4 * row], sums[4 * row + 1], sums[4 * row + 2], sums[4 * row + 3]); };
  if (sends) cluster_meets(); else barrier(1, 256);  // the stages are read
#pragma unroll
  for (int row = 0; all > 1 && row < TOKENS / 8; row++) {
    const int owner = row % all;
    if (sends) send_to_block(place(row, me), of_row(row), flag + 8 * (column + owner % HALVES), owner / HALVES);
    else store_shared(place(row, group % HALVES), of_row(row));
  }
  if (all > 1 && !sends) {
    if (blocks > 1) cluster_barrier(); else barrier(1, 256);
  }
  float factor[2], bias[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int feature = min(tile.feature + column * 64, p.n - 64) + feature_in_column(fragment, h, lane);
    factor[h] = GROUP ? 1.f : single_scale(p, tile, feature);
    bias[h] = bias_of(p, tile, feature);
  }
  const u32 staging = memory + SUMMED + group * TOKENS * PITCH;
  auto finish = [&](int row, float4 v) {
    const u32 to = staging + (row * 8 + lane % 4 * 2) * PITCH + feature_in_column(fragment, 0, lane) * 2;
    store_shared_pair(to, PITCH, pair(v.x * factor[0] + bias[0], v.y * factor[0] + bias[0]));
    store_shared_pair(to + (SPARSE ? 8 : 16), PITCH, pair(v.z * factor[1] + bias[1], v.w * factor[1] + bias[1]));
  };
  if (all == 1) {
#pragma unroll
    for (int row = 0; row < TOKENS / 8; row++) finish(row, of_row(row));
  }
  if (sends) flag_wait(flag + 8 * group, 0);  // what is sent is in this block's memory, past no cache
  for (int row = me; all > 1 && row < TOKENS / 8; row += all) {
    float4 v[MOST_PARTS];
#pragma unroll
    for (int i = 0; i < MOST_PARTS; i++)
      if (i < all) v[i] = sends ? load_shared_floats(place(row, i)) : load_of_block(place(row, i % HALVES), i / HALVES);
#pragma unroll
    for (int i = 1; i < MOST_PARTS; i++)
      if (i < all) { v[0].x += v[i].x; v[0].y += v[i].y; v[0].z += v[i].z; v[0].w += v[i].w; }
    finish(row, v[0]);
  }
  barrier(2 + group, 128);
  const int feature = tile.feature + column * 64 + threadIdx.x % 8 * 8;
  for (int t = threadIdx.x % 128 / 8; t < TOKENS; t += 16)
    if ((all == 1 || t / 8 % all == me) && feature < p.n && tile.holds(p, tile.token + t))
      *(uint4*)(p.y + (u64)(tile.token + t) * p.n + feature) = load_shared(staging + t * PITCH + threadIdx.x % 8 * 16);
  if (blocks > 1 && !sends) cluster_meets();  // none ends whose sums another reads
}

extern "C" __global__ void __launch_bounds__(384, 1)
marlin_narrow(const __grid_constant__ Problem p, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap metadata, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap x) {
  extern __shared__ __align__(1024) unsigned char unaligned[];
  const u32 stages = (shared_address(unaligned) + 1023) & ~1023u, full = stages + STAGES * STAGE, empty = full + 8 * STAGES, sent = empty + 8 * STAGES;
  const int count = uniform(p.plan.count());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      flag_init(full + 8 * s, 1);
      flag_init(empty + 8 * s, 8);
    }
    for (int group = 0; SENDS && group < 2; group++) flag_init(sent + 8 * group, 1);
    flags_ready();
    for (int group = 0; SENDS && group < 2; group++) {
      const int all = cluster_size() * HALVES, me = cluster_rank() * HALVES + group % HALVES;
      flag_expect(sent + 8 * group, (TOKENS / 8 + all - 1 - me) / all * all * 2048);
    }
  }
  __syncthreads();
  if (warp >= 8) {
    give_registers<GIVE>();
    if (threadIdx.x != 256) return;
    const Position first(p.plan, 0);
    for (int i = 0, s = 0, phase = 1; i < count; i++) {
      const u32 stage = stages + s * STAGE, flag = full + s * 8;
      const int k = SEGMENTS * (first.k + i);  // in 128 rows
      flag_wait(empty + s * 8, phase);
      flag_expect(flag, FILLED);
      copy_tile(stage, &weights, first.tile.feature, STEPS * k, flag);
      if (SPARSE) copy_tile(stage + CODES, &metadata, first.tile.feature, 4 * k, flag);
      if (GROUP) copy_tile(stage + WEIGHTS + ACTIVATIONS, &scales, first.tile.feature, GROUPS * k, flag);
      if (i == 0) {
        wait_for_previous_kernel();
        let_next_kernel_start();
      }
#pragma unroll
      for (int b = 0; b < 2 * SEGMENTS; b++) copy_tile(stage + WEIGHTS + b * TOKENS * 128, &x, 128 * k + 64 * b, first.tile.token, flag);
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    return;
  }
  take_registers<TAKE>();
  // Which fragment of 16 features a lane has depends on its row too: so the words of a warp are in 32 different banks.
  const int group = warp / 4, column = COLUMNS == 2 ? group : 0, segment = COLUMNS == 2 ? 0 : OWN * group;
  const int fragment = (warp + lane / 8) % 4;
  u32 which[OWN][STEPS] = {};  // rows of four the codes of a step are
  float acc[OWN][TOKENS / 2] = {};
  const Tile tile = Position(p.plan, 0).tile;
  u32 done = 0;  // the flag of the stage before, which the tensor cores still read
  wait_for_previous_kernel();
  for (int i = 0, s = 0, phase = 0; i < count; i++) {
    const u32 stage = stages + s * STAGE;
    const u32 codes = stage + segment * STEPS * CODES_ROW + column * 512 + lane * 16 + fragment * 4;
    const u32 scale = stage + WEIGHTS + ACTIVATIONS + segment * GROUPS * SCALES_ROW + column * 128 + lane / 4 * 16 + fragment * 4;
    // two lanes of each quad have a fragment's, here always the first two
    const u32 metas = stage + CODES + segment * STEPS * METADATA_ROW + column * 256 + fragment / 2 * 128 + ((lane & ~2) | fragment % 2 * 2) * 4;
    const u32 tokens = uniform(matrix(stage + WEIGHTS + segment * TOKENS * 256));
    flag_wait(full + s * 8, phase);
    u32 words[OWN][STEPS], a[2][OWN][4];
    Factor factor[OWN][2];
#pragma unroll
    for (int r = 0; r < STEPS; r++)
#pragma unroll
      for (int j = 0; j < OWN; j++) {
        words[j][r] = load_shared_word(codes + (j * STEPS + r) * CODES_ROW);
        if (SPARSE && r < STEPS - 1) which[j][r] = load_shared_word(metas + (j * STEPS + r) * METADATA_ROW);
      }
#pragma unroll
    for (int r = 0; r < STEPS; r++) {
#pragma unroll
      for (int j = 0; j < OWN; j++) {
        if (GROUP && r % GROUP_STEPS == 0) factors(load_shared_word(scale + (j * GROUPS + r / GROUP_STEPS) * SCALES_ROW), factor[j]);
        unpack(words[j][r], a[r % 2][j]);
        if (GROUP) multiply_by(factor[j], a[r % 2][j]);
      }
      constexpr int PER_ROWS = STEPS / 2;  // steps of 64 rows of k, the bytes of a swizzled token
      const u32 rows = tokens + (r / PER_ROWS * (TOKENS * 128) + r % PER_ROWS * (128 / PER_ROWS)) / 16;
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < OWN; j++) wgmma<0>(acc[j], a[r % 2][j], which[j][r], rows + j * TOKENS * 256 / 16);
      wgmma_commit();
      wgmma_wait<1>();
      // not before: the tensor cores read a register of metadata while they multiply (wgmma.cu)
      if (SPARSE && r == 0)
#pragma unroll
        for (int j = 0; j < OWN; j++) which[j][STEPS - 1] = load_shared_word(metas + (j * STEPS + STEPS - 1) * METADATA_ROW);
      if (r == 0 && done && lane == 0) flag_arrive(done);
    }
    done = empty + s * 8;
    if (++s == STAGES) { s = 0; phase ^= 1; }
  }
  wgmma_wait<0>();
  float sums[TOKENS / 2];
#pragma unroll
  for (int k = 0; k < TOKENS / 2; k++) sums[k] = OWN == 2 ? acc[0][k] + acc[OWN - 1][k] : acc[0][k];
  output_narrow(p, tile, sums, stages, sent, column, fragment);
}
