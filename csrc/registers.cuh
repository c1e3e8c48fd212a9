// Sums that stay in registers, and how they become output: of eight warps each has two fragments of 16 features, and all
// tokens of the tile.
constexpr int SUMS = TOKENS / 2;  // of a thread, per fragment: features l / 4 and + 8, tokens 8 i + 2 (l % 4) and + 1
constexpr int PARTS = TOKENS < 64 ? 1 : 2;  // of a warp's share of a tile, that are summed up each by itself
constexpr int ROWS = TOKENS / PARTS / 8;    // of eight tokens, in a part
static_assert(PARTS * 8 <= TICKETS);

typedef float Sums[2][SUMS];

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
