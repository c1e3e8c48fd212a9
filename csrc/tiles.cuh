// Which block of the grid computes what, and how the parts of a tile become its output.
//
// A tile is 256 features x TOKENS tokens; its work is k / 128 chunks. All chunks of all tiles stand in one row, tile
// after tile, and every block takes an equal run of them. A tile that more than one block worked on is summed by the
// block that comes last, always in the order of the chunks: the result does not depend on who that is.

constexpr int TICKETS = 32;

struct Problem {
  const uint4* weights;   // (k / 16, n / 64, 32 lanes) of 16 bytes: B of the MARLIN layout
  const u16* x;           // (m, k)
  const u16* scales;      // (k / group, n) in the order of the MARLIN layout
  const u16* bias;        // (n) or null
  u16* y;                 // (m, n)
  float* parts;           // per block of the grid two tiles, of 256 x TOKENS
  u32* tickets;           // per block of the grid TICKETS; zero between launches
  int m, n, k;
};

struct Schedule {
  int token_tiles, chunks;
  int run, share, each, more;  // every `run` chunks go to `share` blocks, of which the first `more` take one above `each`
  __device__ Schedule(const Problem& p) {
    token_tiles = (p.m + TOKENS - 1) / TOKENS;
    chunks = p.k / 128;
    const u32 tiles = (u32)((p.n + 255) / 256) * token_tiles;
    const bool even = gridDim.x % tiles == 0;  // then no block has two tiles
    run = even ? chunks : tiles * chunks;
    share = even ? gridDim.x / tiles : gridDim.x;
    each = run / share;
    more = run % share;
  }
  __device__ int first(int block) const {
    const int b = block % share;
    return block / share * run + b * each + min(b, more);
  }
  __device__ int owner(int chunk) const {
    const int there = more * (each + 1), c = chunk % run;
    return chunk / run * share + (c < there ? c / (each + 1) : more + (c - there) / each);
  }
};

// A chunk: which 128 rows of k, of which 256 features, for which tokens. Divides once, then only counts.
struct Position {
  int k, token_tile, column;
  __device__ Position(const Schedule& plan, int chunk) {
    const int tile = chunk / plan.chunks;
    k = chunk % plan.chunks;
    column = tile / plan.token_tiles;
    token_tile = tile % plan.token_tiles;
  }
  __device__ __forceinline__ void advance(const Schedule& plan, int by) {
    for (k += by; k >= plan.chunks; k -= plan.chunks)
      if (++token_tile == plan.token_tiles) {
        token_tile = 0;
        column++;
      }
  }
};

// The scale of a feature where there is one for all of k: inside 32 features, 8 i + 2 m + e holds 2 i + e + 8 m.
__device__ __forceinline__ float single_scale(const Problem& p, int feature) {
  const int r = feature % 32;
  return scale_low(p.scales[(feature & ~31) + 8 * (r % 8 / 2) + 2 * (r / 8) + r % 2]);
}

// What is left to do to four neighbouring features of a token.
__device__ __forceinline__ void finish(const Problem& p, int token, int feature, float4 v) {
  if (feature >= p.n) return;
  if (GROUP == 0) {
    v.x *= single_scale(p, feature); v.y *= single_scale(p, feature + 1);
    v.z *= single_scale(p, feature + 2); v.w *= single_scale(p, feature + 3);
  }
  if (p.bias) {
    const u16* b = p.bias + feature;
    v.x += number(b[0]); v.y += number(b[1]); v.z += number(b[2]); v.w += number(b[3]);
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
__device__ __forceinline__ void output(const Problem& p, const Schedule& plan, int tile, const float* sums, int threads) {
  const int first_token = tile % plan.token_tiles * TOKENS, first_feature = tile / plan.token_tiles * 256;
  const int begin = tile * plan.chunks, head = plan.owner(begin), tail = plan.owner(begin + plan.chunks - 1);
  const int tokens = min(TOKENS, p.m - first_token), late = begin > plan.first(head);
  // the block that begins a tile after another one has a second place for it
  float* mine = p.parts + (2 * blockIdx.x + (blockIdx.x == head && late)) * (TOKENS * 256);
  for (int i = threadIdx.x; i < tokens * 64; i += threads) {
    const int token = i / 64, feature = 4 * (i % 64);
    float4 v = *(const float4*)(sums + token * ROW + feature);
#pragma unroll
    for (int split = 1; split < SPLITS; split++) {
      float4 w = *(const float4*)(sums + (split * TOKENS + token) * ROW + feature);
      v.x += w.x; v.y += w.y; v.z += w.z; v.w += w.w;
    }
    if (head == tail) finish(p, first_token + token, first_feature + feature, v);
    else *(float4*)(mine + 4 * i) = v;
  }
  if (head == tail || !comes_last(p, head, tail, threads)) return;
  for (int i = threadIdx.x; i < tokens * 64; i += threads) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int b0 = head; b0 <= tail; b0 += 8) {  // eight loads at a time, added in order
      float4 w[8];
#pragma unroll
      for (int b = 0; b < 8; b++)
        if (b0 + b <= tail) w[b] = load_global(p.parts + (2 * (b0 + b) + (b0 + b == head && late)) * (TOKENS * 256) + 4 * i);
#pragma unroll
      for (int b = 0; b < 8; b++)
        if (b0 + b <= tail) { v.x += w[b].x; v.y += w[b].y; v.z += w[b].z; v.w += w[b].w; }
    }
    finish(p, first_token + i / 64, first_feature + 4 * (i % 64), v);
  }
}
