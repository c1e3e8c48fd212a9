// W4A16 by mma.sync for many tokens, for every architecture from sm_80 on: out^T (features x tokens) = W^T x^T.
//
// Eight warps have 32 features each and all tokens of a tile, so that its codes are unpacked once and its sums stay in
// registers. Two warps share 64 features, two fragments of 16 each; of PAIRED's features four warps share 64 of gate and
// those of up, a fragment of either each. STAGES chunks are in shared memory: one is multiplied, the others on their way.
constexpr int TILES = TOKENS / 8;
constexpr int LOADS = STEPS / 2;  // parts of a chunk that are loaded, one after a step: two rows of codes, and tokens

// A chunk of a warp's two fragments x TOKENS tokens. `load` begins a part of what is loaded meanwhile.
template <class Load> __device__ __forceinline__ void multiply(Sums& acc, u32 stage, int column, int half, Load load) {
  const int lane = threadIdx.x % 32;
  const u32 codes = stage + column * 512 + lane * 16 + half * (PAIRED ? 4 : 8);
  const u32 scale = stage + WEIGHTS + TOKENS * 256 + column * 128 + lane / 4 * 16 + half * (PAIRED ? 4 : 8);
  // of a token 16 bytes of every 64 rows of k: of two times eight tokens two each or, SPARSE, of eight tokens four
  const int token = SPARSE ? lane % 8 : lane % 8 + lane / 16 * 8, v = SPARSE ? lane / 8 : lane / 8 % 2;
  const u32 x = stage + WEIGHTS + place(token, v);
  const auto load_words = [&](u32 (&words)[2], u32 from, int up) {
    if (PAIRED) { words[0] = load_shared_word(from); words[1] = load_shared_word(from + up); }
    else load_shared(words, from);
  };
  Factor factor[2][2];
  u32 words[2][2];
  load_words(words[0], codes, CODES / 2);
#pragma unroll
  for (int r = 0; r < STEPS; r++) {
    constexpr int PER_ROWS = STEPS / 2;  // steps of 64 rows of k, the bytes of a swizzled token
    if (r < STEPS - 1) load_words(words[(r + 1) % 2], codes + (r + 1) * CODES_ROW, CODES / 2);
    if (GROUP && r % GROUP_STEPS == 0) {
      u32 pairs[2];
      load_words(pairs, scale + r / GROUP_STEPS * SCALES_ROW, SCALES / 2);
#pragma unroll
      for (int j = 0; j < 2; j++) factors(pairs[j], factor[j]);
    }
    u32 a[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      unpack(words[r % 2][j], a[j]);
      if (GROUP) multiply_by(factor[j], a[j]);
    }
    const u32 which = SPARSE ? load_shared_word(stage + CODES + r * 1024 + column * 256 + half * 128 + lane * 4) : 0;
    const u32 rows = (x ^ (r % PER_ROWS * (128 / PER_ROWS))) + r / PER_ROWS * (TOKENS * 128);
#pragma unroll
    for (int t = 0; t < TILES; t += SPARSE ? 1 : 2) {
      u32 b[4];
      load_matrices(b, rows + t * 1024);
      float* const sums[2] = {&acc[0][4 * t], &acc[1][4 * t]};
      if (SPARSE) {
        mma_sparse<0>(sums[0], a[0], b, which);
        mma_sparse<1>(sums[1], a[1], b, which);
      } else {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          mma(sums[j], a[j], b[0], b[1]);
          mma(sums[j] + 4, a[j], b[2], b[3]);
        }
      }
    }
    if (r < LOADS) load(r);
  }
}

extern "C" __global__ void __launch_bounds__(256, 1)
#if EXPERTS
marlin_multistage(const __grid_constant__ Problem given) {
  const Problem& p = planned(given);
#else
marlin_multistage(const Problem p) {
#endif
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 stages = shared_address(memory);
  const Schedule& plan = p.plan;
  const int thread = threadIdx.x, warp = thread / 32;
  const int column = PAIRED ? warp / 4 : warp % 4, half = PAIRED ? warp % 4 : warp / 4;
  const int count = plan.count();
#if EXPERTS
  const int stride = p.pitch;  // of a row of scales
  Rows rows;
#else
  const int stride = p.n;
#endif
  const int pitch = stride / 64 * 32;  // of a row of codes, in pieces of 16 bytes

  // A thread loads pieces of 16 bytes: of every other row of codes and of every 16th token; some of scales and metadata.
  constexpr int SIDES = PAIRED ? 2 : 1, ROW = 128 / SIDES, BESIDE = 256 / ROW, SCALE_ROW = 32 / SIDES;
  const int scale_side = thread / (SCALE_ROW * GROUPS), v = thread % 16;
  struct { const uint4* codes; const u16 *x, *scales; const u32* metadata; int tokens; } from;
  Position ahead(plan, 0);
  auto aim = [&]() {
    // of a narrower last tile the last column, again: its sums are not used
    auto of = [&](int i) { return min(ahead.tile.feature / 64 + i, p.n / 64 - 1); };
    const int piece = thread % ROW, scale = thread % SCALE_ROW;
    from.codes = p.weights + ((u64)ahead.k * STEPS + thread / ROW) * pitch + of(piece / 32) * 32 + piece % 32;
    if (GROUP) from.scales = p.scales + ((u64)ahead.k * GROUPS + thread / SCALE_ROW % GROUPS) * stride + of(scale / 8) * 64 + scale % 8 * 8;
    if (SPARSE) from.metadata = p.metadata + (((u64)ahead.k * 4 + thread / 64) * (stride / 64) + of(thread % 64 / 16)) * 64 + thread % 16 * 4;
#if EXPERTS
    from.codes += (u64)ahead.tile.expert * (p.k / 16) * pitch;
    if (GROUP) from.scales += (u64)ahead.tile.expert * (p.k / (GROUP ? GROUP : 1)) * stride;
    if (GROUP && scale_side) from.scales += p.scales_up - p.scales;
    rows.find(p, ahead);
    from.x = p.x + ahead.k * 128 + v * 8;
#else
    from.x = p.x + (u64)(ahead.tile.token + thread / 16) * p.k + ahead.k * 128 + v * 8;
    from.tokens = p.m - ahead.tile.token - thread / 16;
#endif
  };
  auto advance = [&]() {
    const int stop = ahead.stop;
    if (ahead.i + 1 >= count) { ahead.i++; return; }  // beyond there may be no tile to find
    ahead.advance(plan, 1);
    from.codes += STEPS * pitch;
    from.x += 128;
    if (GROUP) from.scales += GROUPS * stride;
    if (SPARSE) from.metadata += stride / 16 * 64;
    if (ahead.stop != stop) aim();
  };
  // What a last chunk of 64 rows has twice, the second time for activations that are zeros. Groups of 128 leave none.
  auto whole = [&]() { return GROUP == 128 || ahead.k * 128 + 64 < p.k; };
  auto load_weights = [&](int part, u32 stage) {
    const int row = part * BESIDE % STEPS, side = part * BESIDE / STEPS;
    const uint4* codes = from.codes + (row < STEPS / 2 || whole() ? row : row - STEPS / 2) * pitch;
#if EXPERTS
    if (side) codes += p.weights_up - p.weights;
#endif
    copy_async(stage + side * (CODES / 2) + (row + thread / ROW) * CODES_ROW + thread % ROW * 16, codes, true);
    if (part) return;
    const bool held = whole();
    if (SPARSE) copy_async(stage + CODES + thread * 16, from.metadata - (thread < 128 || held ? 0 : stride / 16 * 32), true);
    if (GROUP && thread < 32 * GROUPS) {
      const int group = thread / SCALE_ROW % GROUPS;
      const u16* scales = from.scales - (group < GROUPS / 2 || held ? 0 : GROUPS / 2 * stride);
      copy_async(stage + WEIGHTS + TOKENS * 256 + scale_side * (SCALES / 2) + group * SCALES_ROW + thread % SCALE_ROW * 16, scales, true);
    }
  };
  auto load_tokens = [&](int part, u32 stage) {
    constexpr int ALL = TOKENS / 16;
    const bool held = whole() || v < 8;
#pragma unroll
    for (int i = part * ALL / LOADS; i < (part + 1) * ALL / LOADS; i++) {
#if EXPERTS
      const bool there = held && rows.row[i] >= 0;
      const u16* x = from.x + (u64)(there ? rows.row[i] : 0) * p.k;
#else
      const bool there = held && 16 * i < from.tokens;
      const u16* x = from.x + (u64)(16 * i) * p.k;
#endif
      copy_async(stage + WEIGHTS + place(thread / 16, v) + i * 2048, x, there);
    }
  };

  if (count) aim();
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
#pragma unroll
    for (int part = 0; part < LOADS; part++)
      if (ahead.i < count) load_weights(part, stages + s * STAGE);
    advance();
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  ahead = Position(plan, 0);
  if (count) aim();
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
#pragma unroll
    for (int part = 0; part < LOADS; part++)
      if (ahead.i < count) load_tokens(part, stages + s * STAGE);
    copies_commit();
    advance();
  }
  int s = 0;
  for (int i = 0; i < count;) {
    const Position here(plan, i);
    const int stop = min(count, here.stop);
    Sums acc;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int k = 0; k < SUMS; k++) acc[j][k] = 0.f;
    u32 stage;
    for (; i < stop; i++) {
      copies_wait<STAGES - 2>();
      barrier(1, 256);  // the stage before this one is read, and will be filled
      stage = stages + s * STAGE;
      const u32 next = s ? stage - STAGE : stage + (STAGES - 1) * STAGE;
      multiply(acc, stage, column, half, [&](int part) {
        if (ahead.i >= count) return;
        load_weights(part, next);
        load_tokens(part, next);
      });
      copies_commit();
      advance();
      if (++s == STAGES) s = 0;
    }
    barrier(1, 256);  // what was multiplied last is where output is put together: it is filled after the next barrier
    output_registers(p, here.tile, acc, stage + column * 1024, column, half);
  }
}
