// The copy engine's descriptions of matrices are on their way before it is known what to copy.
__device__ __forceinline__ void fetch_maps(const TensorMap& weights, const TensorMap& weights_up, const TensorMap& scales, const TensorMap& scales_up) {
  if (threadIdx.x == 0) {
    fetch_map(&weights);
    fetch_map(&weights_up);
    fetch_map(&scales);
    fetch_map(&scales_up);
  }
}

// What the loading warpgroup does: one thread has the copy engine load weights and scales, all of them load tokens.
__device__ __forceinline__ void load_experts(const Problem& p, int count, u32 stages, u32 full, u32 empty, const TensorMap& weights, const TensorMap& weights_up, const TensorMap& scales, const TensorMap& scales_up) {
  const Schedule& plan = p.plan;
  const int thread = threadIdx.x % 128;
  auto load = [&](const Position& at, int s) {
    const u32 stage = stages + s * STAGE, flag = full + s * 8;
    const int step = at.tile.expert * (p.k / 16) + STEPS * at.k;
    flag_expect(flag, WEIGHTS + SCALES);
    copy_tile(stage, &weights, at.tile.feature, step, flag);
    if (PAIRED) copy_tile(stage + CODES / 2, &weights_up, at.tile.feature, step, flag);
    if (GROUP) {
      const int group = at.tile.expert * (p.k / (GROUP ? GROUP : 1)) + GROUPS * at.k;
      const u32 to = stage + WEIGHTS + TOKENS * 256;
      copy_tile(to, &scales, at.tile.feature, group, flag);
      if (PAIRED) copy_tile(to + SCALES / 2, &scales_up, at.tile.feature, group, flag);
    }
  };
  Rows rows;
  auto load_x = [&](const Position& at, int s) {
    const u32 stage = stages + s * STAGE + WEIGHTS;
    rows.find(p, at);
    const int v = thread % 16, k = at.k * 128 + v * 8;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
      const int token = 8 * i + thread / 16;
      const bool there = rows.row[i] >= 0 && k < p.k;
      copy_async(stage + v / 8 * (TOKENS * 128) + token * 128 + (((v ^ token) & 7) << 4), p.x + (there ? (u64)rows.row[i] * p.k + k : 0), there);
    }
    flag_arrive_copied(full + s * 8);
  };
  Position at(plan, 0), at_x(plan, 0);
  const int ahead = min(count, STAGES);
  if (thread == 0)
    for (int i = 0; i < ahead; i++, at.advance(plan, 1)) load(at, i);
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int i = 0; i < ahead; i++, at_x.advance(plan, 1)) load_x(at_x, i);
  for (int i = STAGES, s = 0, phase = 0; i < count; i++, at_x.advance(plan, 1)) {
    flag_wait(empty + s * 8, phase);
    if (thread == 0) load(at_x, s);
    load_x(at_x, s);
    if (++s == STAGES) { s = 0; phase ^= 1; }
  }
}
