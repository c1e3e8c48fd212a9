// W4A16 by mma.sync for few tokens, for every architecture from sm_80 on: out^T (features x tokens) = W^T x^T.
//
// Four warps side by side take 64 features each of the same 128 rows of k (a chunk); SPLITS such teams take chunks in
// turn. Weights go from memory to registers one chunk ahead; activations go through shared memory, shared by a team.
// A last chunk of 64 rows has its weights twice, the second time for activations that are zeros.
// TOKENS: 8 or 16. GROUP: rows of k per scale, 0 for one scale for all.
struct Chunk {
  uint4 codes[STEPS];
  uint2 metadata[4];
  uint4 scales[GROUPS];
};

extern "C" __global__ void __launch_bounds__(128 * SPLITS, 1)
#if EXPERTS
marlin_mma(const __grid_constant__ Problem given) {
  const Problem& p = planned(given);
#else
marlin_mma(const Problem p) {
#endif
  extern __shared__ __align__(128) unsigned char memory[];
  const int thread = threadIdx.x % 128, team = threadIdx.x / 128, warp = thread / 32, lane = thread % 32;
  const u32 xs = shared_address(memory) + team * (2 * TOKENS * 256);
  float* sums = (float*)(memory + SPLITS * 2 * TOKENS * 256);
  const Schedule& plan = p.plan;
  const int count = plan.count();
#if EXPERTS
  const int stride = p.pitch, columns = stride / 64;  // of a row of scales and of codes
#else
  const int stride = p.n, columns = stride / 64;
#endif

  // whether a chunk has all its rows: groups of 128 leave no half of one
  auto whole = [&](const Position& at) { return GROUP == 128 || at.k * 128 + 64 < p.k; };
  auto load = [&](Chunk& c, const Position& at) {
    // of a narrower last tile the last column, again: its sums are not used
    const int column = min(at.tile.feature / 64 + (PAIRED ? warp % 2 : warp), p.n / 64 - 1);
    const uint4* w = p.weights + ((u64)at.k * STEPS * columns + column) * 32 + lane;
    const u16* scales = p.scales + column * 64 + 8 * (lane / 4);
#if EXPERTS
    if (PAIRED && warp >= 2) { w += p.weights_up - p.weights; scales += p.scales_up - p.scales; }
    w += (u64)at.tile.expert * (p.k / 16) * columns * 32;
    if (GROUP) scales += (u64)at.tile.expert * (p.k / (GROUP ? GROUP : 1)) * stride;
#endif
    const uint4* rest = whole(at) ? w + (u64)(STEPS / 2) * columns * 32 : w;
    auto held = [&](int i, int all) { return i < all / 2 || whole(at) ? i : i - all / 2; };
#pragma unroll
    for (int s = 0; s < STEPS; s++)
      c.codes[s] = load_once((s < STEPS / 2 ? w : rest) + (u64)(s % (STEPS / 2)) * columns * 32);
#if SPARSE
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const u32* m = p.metadata + (((u64)at.k * 4 + held(s, 4)) * columns + column) * 64 + lane;
      c.metadata[s] = make_uint2(m[0], m[32]);
    }
#endif
#if GROUP
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
      c.scales[g] = *(const uint4*)(scales + (u64)(at.k * GROUPS + held(g, GROUPS)) * stride);
#endif
  };
#if EXPERTS
  Rows rows;
#endif
  auto load_x = [&](int buffer, const Position& at) {
#if EXPERTS
    rows.find(p, at);
#endif
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      const int token = i * 8 + thread / 16, v = thread % 16;
#if EXPERTS
      const int row = rows.row[i];
#else
      const int row = at.tile.token + token < p.m ? at.tile.token + token : -1;
#endif
      const bool there = row >= 0 && (whole(at) || v < 8);
      copy_async(xs + buffer * (TOKENS * 256) + place(token, v), p.x + (there ? (u64)row * p.k + at.k * 128 + v * 8 : 0), there);
    }
    copies_commit();
  };

  Sums acc;
  clear(acc);
  Chunk a, b;
  Position at(plan, team);
  if (at.i < count) load(a, at);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (at.i < count) load_x(0, at);
  int buffer = 0;
  // one chunk: the next one is on its way while this one is multiplied
  auto step = [&](Chunk& now, Chunk& next) {
    copies_wait<0>();
    barrier(2 + team, 128);
    at.advance(plan, SPLITS);
    if (at.i < count) {
      load_x(buffer ^ 1, at);
      load(next, at);
    }
    multiply(acc, xs + buffer * (TOKENS * 256), [&](int s) { return now.codes[s]; }, [&](int s) { return now.metadata[s]; },
             [&](int g) { return now.scales[g]; });
    buffer ^= 1;
  };
  for (int i = 0, stop; i < count; i = stop) {
    const Position here(plan, i);
    stop = min(count, here.stop);
    while (at.i < stop) {
      step(a, b);
      if (at.i >= stop) { a = b; break; }
      step(b, a);
    }
    barrier(1, 128 * SPLITS);
    put(acc, sums + team * TOKENS * ROW, warp);
    barrier(1, 128 * SPLITS);
    output(p, here.tile, sums, 128 * SPLITS);
    clear(acc);
  }
}
