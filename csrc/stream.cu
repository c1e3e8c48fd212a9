// W4A16 for few tokens on Hopper: one warp keeps the copy engine busy, the others multiply.
//
// Four warps (a team) take a stage, 64 features each; SPLITS teams take stages in turn.
//
// A stage always belongs to the same team: a warp waits for a flag by the parity of its round, and a team that ran
// ahead by a whole round of another team's stages would take the round before for its own.
static_assert(STAGES % SPLITS == 0);

extern "C" __global__ void __launch_bounds__(128 * SPLITS + 128, 1)
#if EXPERTS
marlin_stream(const __grid_constant__ Problem given, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap weights_up, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap scales_up) {
  fetch_maps(weights, weights_up, scales, scales_up);
  const Problem& p = planned(given);
#else
marlin_stream(const __grid_constant__ Problem p, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap metadata, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap x) {
#endif
  extern __shared__ __align__(1024) unsigned char unaligned[];
  unsigned char* memory = unaligned + (-shared_address(unaligned) & 1023);
  const u32 stages = shared_address(memory), full = stages + STAGES * STAGE, empty = full + 8 * STAGES;
  float* sums = (float*)(memory + STAGES * STAGE + 16 * STAGES);
  const Schedule& plan = p.plan;
  const int count = plan.count();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      flag_init(full + 8 * s, EXPERTS ? 1 + 128 : 1);
      flag_init(empty + 8 * s, 4);
    }
    flags_ready();
  }
  __syncthreads();
  if (warp >= 4 * SPLITS) {
    give_registers<GIVE>();
#if EXPERTS
    load_experts(p, count, stages, full, empty, weights, weights_up, scales, scales_up);
    return;
#else
    if (threadIdx.x != 128 * SPLITS) return;
    auto load = [&](const Position& at, int s) {
      const u32 stage = stages + s * STAGE, flag = full + s * 8;
      flag_expect(flag, FILLED);
      copy_tile(stage, &weights, at.tile.feature, STEPS * at.k, flag);
      if (SPARSE) copy_tile(stage + CODES, &metadata, at.tile.feature, 4 * at.k, flag);
      if (GROUP) copy_tile(stage + WEIGHTS + TOKENS * 256, &scales, at.tile.feature, GROUPS * at.k, flag);
    };
    auto load_x = [&](const Position& at, int s) {
      const u32 stage = stages + s * STAGE + WEIGHTS, flag = full + s * 8;
      copy_tile(stage, &x, 128 * at.k, at.tile.token, flag);
      copy_tile(stage + TOKENS * 128, &x, 128 * at.k + 64, at.tile.token, flag);
    };
    Position at(plan, 0), at_x(plan, 0);
    const int ahead = min(count, STAGES);
    for (int i = 0; i < ahead; i++, at.advance(plan, 1)) load(at, i);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int i = 0; i < ahead; i++, at_x.advance(plan, 1)) load_x(at_x, i);
    for (int i = STAGES, s = 0, phase = 0; i < count; i++, at.advance(plan, 1)) {
      flag_wait(empty + s * 8, phase);
      load(at, s);
      load_x(at, s);
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    return;
#endif
  }
  take_registers<TAKE>();
  const int team = warp / 4, column = warp % 4;
  Sums acc;
  clear(acc);
  wait_for_previous_kernel();
  int i = team, s = team, phase = 0;
  for (int begin = 0, stop; begin < count; begin = stop) {
    const Position here(plan, begin);
    stop = min(count, here.stop);
    for (; i < stop; i += SPLITS) {
      const u32 stage = stages + s * STAGE;
      flag_wait(full + s * 8, phase);
      multiply(acc, stage + WEIGHTS, [&](int step) { return load_shared(stage + step * CODES_ROW + codes_at(column) + lane * 16); },
               [&](int step) { return load_metadata(stage + CODES + step * 1024 + column * 256 + lane * 4); },
               [&](int g) { return load_shared(stage + WEIGHTS + TOKENS * 256 + g * SCALES_ROW + scales_at(column) + lane / 4 * 16); });
      __syncwarp();
      if (lane == 0) flag_arrive(empty + s * 8);
      if ((s += SPLITS) >= STAGES) { s -= STAGES; phase ^= 1; }
    }
    barrier(1, 128 * SPLITS);
    put(acc, sums + team * TOKENS * ROW, column);
    barrier(1, 128 * SPLITS);
    output(p, here.tile, sums, 128 * SPLITS);
    clear(acc);
  }
}
