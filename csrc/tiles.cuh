// Which block of the grid computes what, and how the parts of a tile become its output.
//
// A tile is 256 features x TOKENS tokens; its work is chunks of 128 rows of k, of which the last may have 64 (narrow.cu's
// tiles are of 64 or 128 features, and their chunks of up to four times the rows; a cluster sums them up). Every block
// first computes the same number of tiles alone. The chunks of the tiles that are left stand in one row; every block takes
// an equal run of them, or as many blocks each share a tile of their own. Here a tile that more than one block worked on is
// summed by the block that comes last; in registers.cuh each part by who comes last to that, in wgmma.cu perhaps by a
// cluster. Always in the order of the chunks: the result does not depend on who that is.
//
// PAIRED: a tile is 128 features of gate and the same ones of up, side by side; what is stored is silu(gate) * up.

constexpr int TICKETS = 32;
constexpr int FEATURES = PAIRED ? 128 : 64 * COLUMNS;  // of a tile's output

struct Schedule {
  int columns, token_tiles, chunks;
  int whole;                   // tiles that a block computes alone
  int run, share, each, more;  // of the others every `run` chunks go to `share` blocks; the first `more` take one above `each`
#if EXPERTS
  int tiles;                   // all there are, known here alone: some blocks may have none, or one less alone
  const Batch* batches;        // of every tile of tokens
#endif
  __device__ bool even() const { return run == chunks; }  // every run is a tile: no block has parts of two
  __device__ int first(int place) const { return place * each + min(place, more); }
  __device__ int owner(int chunk) const {
    const int there = more * (each + 1);
    return chunk < there ? chunk / (each + 1) : more + (chunk - there) / each;
  }
  __device__ int count() const {
#if EXPERTS
    if (!run) return (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x * chunks;
    if (even() && blockIdx.x >= share * (tiles - whole * gridDim.x)) return 0;
#endif
    const int place = blockIdx.x % share;
    return whole * chunks + (run ? each + (place < more) : 0);
  }
};

struct Problem {
  const uint4* weights;   // (k / 16 or, SPARSE, k / 32, n / 64, 32 lanes) of 16 bytes: B or B_24
  const u16* x;           // (m, k)
  const u16* scales;      // (k / group, n) in the order of the layout
  const u16* bias;        // (n) or null
  u16* y;                 // (m, n)
  float* parts;           // per block of the grid two tiles, of 256 x TOKENS
  u32* tickets;           // per block of the grid TICKETS; zero between launches
  const u32* metadata;    // (k / 32, n / 64, 2, 32 lanes): B_meta
  int m, n, k;
  Schedule plan;
#if EXPERTS
  // weights, scales and bias are those of all experts, one after another, in rows of `pitch` features
  const uint4* weights_up;  // PAIRED: the above are gate's, these up's
  const u16 *scales_up, *bias_up;
  const int* rows;          // of every row of y that of x, or null: the same one
  const int* token_tiles;   // how many there are, known here alone
  int pitch;
  int routed;               // what the last two point at was there before the kernel before began
  Routing routing;          // with an index: few choices, that each block puts in order by itself
#endif
};

// What a tile is: where it lies, and which blocks share it.
struct Tile {
  int token, feature, head, tail;
#if EXPERTS
  int expert, end;  // the row after its last one
  __device__ int tokens(const Problem&) const { return min(TOKENS, end - token); }
  __device__ bool holds(const Problem&, int t) const { return t < end; }
#else
  __device__ int tokens(const Problem& p) const { return min(TOKENS, p.m - token); }
  __device__ bool holds(const Problem& p, int t) const { return t < p.m; }
#endif
  bool late;  // the first of them began another tile before, and has a second place for its part of this one
  __device__ Tile() {}
  __device__ Tile(const Schedule& plan, int number) {
#if EXPERTS
    // all of a column of an expert, then of its next
    const Batch at = plan.batches[number / plan.columns];
    const int place = number - at.tile * plan.columns, column = place / at.tiles;
    expert = at.expert;
    token = at.row + (place - column * at.tiles) * TOKENS;
    end = at.row + at.count;
#else
    int column = number, token_tile = 0;
    if (plan.token_tiles > 1) {
      // those computed at the same time lie together: eight token tiles of one column, then of the next
      const int band = number / (8 * plan.columns), height = min(8, plan.token_tiles - 8 * band);
      column = (number - band * 8 * plan.columns) / height;
      token_tile = 8 * band + (number - band * 8 * plan.columns) % height;
    }
    token = token_tile * TOKENS;
#endif
    feature = column * FEATURES;
    const int among = number - plan.whole * (int)gridDim.x;
    head = tail = blockIdx.x;
    late = false;
    if (among < 0) return;
    if (plan.even()) {
      head = among * plan.share;
      tail = head + min(plan.share, plan.chunks) - 1;
    } else {
      head = plan.owner(among * plan.chunks);
      tail = plan.owner((among + 1) * plan.chunks - 1);
      late = among * plan.chunks > plan.first(head);
    }
  }
  __device__ float* part(const Problem& p, int block) const {
    return p.parts + (u64)(2 * block + (block == head && late)) * (TOKENS * 256);
  }
};

// A chunk of a block: which rows of k of which tile. Divides once a tile, then only counts.
struct Position {
  int i, stop, k;
  Tile tile;
  __device__ Position(const Schedule& plan, int i) : i(i) { find(plan); }
  __device__ void find(const Schedule& plan) {
    const int alone = plan.whole * plan.chunks;
    int number = i < alone ? blockIdx.x : plan.whole * gridDim.x;
    k = i;
    if (i >= alone) {
      k += plan.first(plan.even() ? blockIdx.x % plan.share : blockIdx.x) - alone;
      if (plan.even()) number += blockIdx.x / plan.share;
    }
    if (k >= plan.chunks) {
      const int tiles = k / plan.chunks;
      number += i < alone ? tiles * gridDim.x : tiles;
      k -= tiles * plan.chunks;
    }
    stop = i + plan.chunks - k;
    tile = Tile(plan, number);
  }
  __device__ __forceinline__ void advance(const Schedule& plan, int by) {
    i += by;
    k += by;
    if (i >= stop) find(plan);
  }
};

// The scale and bias of a feature. `up`: of PAIRED's other half.
__device__ __forceinline__ float single_scale(const Problem& p, const Tile& tile, int feature, bool up = false) {
#if EXPERTS
  return scale_low((up ? p.scales_up : p.scales)[(u64)tile.expert * p.pitch + place_of_scale(feature)]);
#else
  return scale_low(p.scales[place_of_scale(feature)]);
#endif
}
__device__ __forceinline__ float bias_of(const Problem& p, const Tile& tile, int feature, bool up = false) {
#if EXPERTS
  return p.bias ? number((up ? p.bias_up : p.bias)[(u64)tile.expert * p.pitch + feature]) : 0.f;
#else
  return p.bias ? number(p.bias[feature]) : 0.f;
#endif
}
__device__ __forceinline__ float silu_times(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

// What is left to do to four neighbouring features of a token.
__device__ __forceinline__ float4 scaled(const Problem& p, const Tile& tile, int feature, float4 v, bool up = false) {
  if (GROUP == 0) {
    v.x *= single_scale(p, tile, feature, up); v.y *= single_scale(p, tile, feature + 1, up);
    v.z *= single_scale(p, tile, feature + 2, up); v.w *= single_scale(p, tile, feature + 3, up);
  }
  if (p.bias) {
    v.x += bias_of(p, tile, feature, up); v.y += bias_of(p, tile, feature + 1, up);
    v.z += bias_of(p, tile, feature + 2, up); v.w += bias_of(p, tile, feature + 3, up);
  }
  return v;
}
__device__ __forceinline__ void finish(const Problem& p, const Tile& tile, int token, int feature, float4 v, float4 up = {}) {
  if (feature >= p.n) return;
  v = scaled(p, tile, feature, v);
  if (PAIRED) {
    up = scaled(p, tile, feature, up, true);
    v = make_float4(silu_times(v.x, up.x), silu_times(v.y, up.y), silu_times(v.z, up.z), silu_times(v.w, up.w));
  }
  *(uint2*)(p.y + (u64)token * p.n + feature) = make_uint2(pair(v.x, v.y), pair(v.z, v.w));
}

// How many were here before. The last of all sets the ticket back to zero.
__device__ __forceinline__ u32 take_ticket(u32* ticket) {
  u32 before;
  asm volatile("atom.global.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
  return before;
}

// Whether this block is the last of those that share a tile, after all have written their parts.
__device__ __forceinline__ bool comes_last(const Problem& p, int head, int tail, int threads) {
  __shared__ u32 last;
  barrier(1, threads);
  if (threadIdx.x == 0) {
    last = take_ticket(p.tickets + head * TICKETS) == tail - head;
    if (last) p.tickets[head * TICKETS] = 0;
  }
  barrier(1, threads);
  return last;
}

// The sums of a tile lie in shared memory, SPLITS times (tokens, ROW) floats; all threads of the block come here.
constexpr int ROW = 256 + 4;
constexpr int QUADS = FEATURES / 4;
__device__ __forceinline__ void output(const Problem& p, const Tile& tile, const float* sums, int threads) {
  const int tokens = tile.tokens(p), head = tile.head, tail = tile.tail;
  float* mine = tile.part(p, blockIdx.x);
  auto of_splits = [&](int token, int feature) {
    float4 v = *(const float4*)(sums + token * ROW + feature);
#pragma unroll
    for (int split = 1; split < SPLITS; split++) {
      float4 w = *(const float4*)(sums + (split * TOKENS + token) * ROW + feature);
      v.x += w.x; v.y += w.y; v.z += w.z; v.w += w.w;
    }
    return v;
  };
  auto of_blocks = [&](int i) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int b0 = head; b0 <= tail; b0 += 8) {  // eight loads at a time, added in order
      float4 w[8];
#pragma unroll
      for (int b = 0; b < 8; b++)
        if (b0 + b <= tail) w[b] = load_global(tile.part(p, b0 + b) + 4 * i);
#pragma unroll
      for (int b = 0; b < 8; b++)
        if (b0 + b <= tail) { v.x += w[b].x; v.y += w[b].y; v.z += w[b].z; v.w += w[b].w; }
    }
    return v;
  };
  if (PAIRED && head == tail) {
    for (int i = threadIdx.x; i < tokens * QUADS; i += threads) {
      const int token = i / QUADS, feature = 4 * (i % QUADS);
      finish(p, tile, tile.token + token, tile.feature + feature, of_splits(token, feature), of_splits(token, FEATURES + feature));
    }
    return;
  }
  for (int i = threadIdx.x; i < tokens * 64; i += threads) {
    const int token = i / 64, feature = 4 * (i % 64);
    const float4 v = of_splits(token, feature);
    if (head == tail) finish(p, tile, tile.token + token, tile.feature + feature, v);
    else *(float4*)(mine + 4 * i) = v;
  }
  if (head == tail || !comes_last(p, head, tail, threads)) return;
  for (int i = threadIdx.x; i < tokens * QUADS; i += threads) {
    const int token = i / QUADS, quad = i % QUADS, at = token * 64 + quad;
    if (PAIRED) finish(p, tile, tile.token + token, tile.feature + 4 * quad, of_blocks(at), of_blocks(at + QUADS));
    else finish(p, tile, tile.token + token, tile.feature + 4 * quad, of_blocks(at));
  }
}
