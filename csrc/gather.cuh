// Tokens of experts: which blocks compute what, known on the GPU alone, and the loading of tokens that lie anywhere.

// Few choices, and what route.cu makes of many. Where tiles are large there is no room for it.
constexpr int FEW = TOKENS <= 16 ? 32 : 1;
struct Few {
  Batch batches[FEW];
  int expert[FEW], tiles[FEW], rows[FEW];
};
__device__ __forceinline__ void route_few(const Routing& r, Few& few) {
  const int slot = threadIdx.x, e = slot < FEW ? r.expert(slot) : -1;
  int row = 0, same = 0, before = 0, tile = 0;
  if (slot < FEW) few.expert[slot] = e;
  __syncthreads();
  for (int i = 0; i < r.slots; i++) {
    const int other = few.expert[i];
    row += other >= 0 && other < e;
    same += other == e;
    before += other == e && i < slot;
  }
  const int tiles = (same + TOKENS - 1) / TOKENS;
  if (slot < FEW) few.tiles[slot] = e >= 0 && !before ? tiles : 0;
  __syncthreads();
  for (int i = 0; i < r.slots; i++) tile += few.expert[i] < e ? few.tiles[i] : 0;
  const bool shown = blockIdx.x == 0;  // to the kernels that follow
  if (slot < r.slots) {
    if (shown) r.places[slot] = e < 0 ? -1 : row + before;
    if (e >= 0) few.rows[row + before] = slot / r.choices;
    for (int i = 0; e >= 0 && !before && i < tiles; i++) {
      few.batches[tile + i] = {e, tile, tiles, row, same};
      if (shown) r.batches[tile + i] = {e, tile, tiles, row, same};
    }
  }
}

// Which blocks compute which of so many tiles: each as many of its own as there are, if it takes no longer than to share
// them, which costs as much as REDUCTION chunks; else an equal part of each, if that leaves few blocks idle; else as
// schedule() of configurations.py says. By one thread.
constexpr int REDUCTION = 3;
__device__ __forceinline__ void plan_experts(Schedule& plan, int tiles) {
  const int processors = gridDim.x, share = tiles ? processors / tiles : 0;
  plan.tiles = tiles;
  plan.whole = (tiles + processors - 1) / processors;
  plan.run = plan.each = plan.more = 0;
  plan.share = 1;
  if (plan.whole * plan.chunks <= tiles * plan.chunks / processors + REDUCTION) return;
  if (10 * share * tiles >= 7 * processors) {
    plan.whole = 0;
    plan.run = plan.chunks;
    plan.share = share;
  } else {
    plan.whole = max(0, tiles / processors - 1);
    plan.run = (tiles - plan.whole * processors) * plan.chunks;
    plan.share = processors;
  }
  plan.each = plan.run / plan.share;
  plan.more = plan.run % plan.share;
}

__device__ __forceinline__ const Problem& planned(const Problem& given) {
  __shared__ Problem known;
  __shared__ Few few;
  const bool routes = TOKENS <= 16 && given.routing.index;
  for (int i = threadIdx.x; i < sizeof(Problem) / 4; i += blockDim.x) ((u32*)&known)[i] = ((const u32*)&given)[i];
  if (given.routed) see_others_writes(); else wait_for_previous_kernel();
  if (routes) route_few(given.routing, few);
  __syncthreads();
  if (threadIdx.x == 0) {
    int token_tiles = 0;
    if (routes) {
      for (int i = 0; i < given.routing.slots; i++) token_tiles += few.tiles[i];
      known.plan.batches = few.batches;
      known.rows = few.rows;
      if (blockIdx.x == 0) *given.routing.token_tiles = token_tiles;
    } else {
      token_tiles = *given.token_tiles;
    }
    plan_experts(known.plan, token_tiles * given.plan.columns);
  }
  if (routes) see_others_writes();  // and are seen by the next kernel, which may begin now
  __syncthreads();
  return known;
}

// The rows of x of the tokens of a tile that one of LOADERS threads loads: 16 bytes of every eighth or sixteenth token.
constexpr int LOADED = LOADERS / 16;  // tokens at a time
struct Rows {
  int stop = -1, row[TOKENS / LOADED];
  __device__ __forceinline__ void find(const Problem& p, const Position& at) {
    if (at.stop == stop) return;
    stop = at.stop;
#pragma unroll
    for (int i = 0; i < TOKENS / LOADED; i++) {
      const int t = at.tile.token + LOADED * i + threadIdx.x % LOADERS / 16;
      row[i] = !at.tile.holds(p, t) ? -1 : p.rows ? p.rows[t] : t;
    }
  }
};
