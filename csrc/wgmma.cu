// W4A16 for many tokens on Hopper: one warp keeps the copy engine busy, two warpgroups multiply by wgmma.
//
// Two warps share 64 features, two fragments of 16 each; of PAIRED's features four warps share 64 of gate and those of
// up, a fragment of either each. The codes of a step are unpacked and scaled while the tensor cores still multiply the
// step before.

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
  cluster_meets();  // none ends whose sums another reads
}

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
        wait_for_previous_kernel();
        let_next_kernel_start();
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
