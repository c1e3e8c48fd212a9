// Tokens in the order of the experts they go to, and the tiles of tokens that these make. One block; the order of an
// expert's tokens is theirs, so that all that follows is the same every time.
constexpr int MOST = 512, WARPS = 32;  // experts; warps of the block

// Inclusive sums over all threads of two numbers.
__device__ __forceinline__ int2 sums_so_far(int a, int b) {
  __shared__ int2 of_warps[WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int d = 1; d < 32; d *= 2) {
    const int before_a = __shfl_up_sync(~0u, a, d), before_b = __shfl_up_sync(~0u, b, d);
    if (lane >= d) { a += before_a; b += before_b; }
  }
  if (lane == 31) of_warps[warp] = make_int2(a, b);
  __syncthreads();
  for (int w = 0; w < warp; w++) { a += of_warps[w].x; b += of_warps[w].y; }
  return make_int2(a, b);
}

extern "C" __global__ void __launch_bounds__(1024, 1) marlin_route(const __grid_constant__ Routing r) {
  __shared__ int start[MOST];        // rows of an expert; then where its next token goes
  __shared__ u16 of_warp[WARPS][MOST];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  let_next_kernel_start();
  if (thread < MOST) start[thread] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  for (int slot = thread; slot < r.slots; slot += 1024) {
    const int e = r.expert(slot);
    if (e >= 0) atomicAdd(&start[e], 1);
  }
  __syncthreads();
  const int rows = thread < r.count ? start[thread] : 0, tiles = (rows + r.tokens - 1) / r.tokens;
  const int2 end = sums_so_far(rows, tiles);
  if (thread < r.count) {
    const Batch batch = {thread, end.y - tiles, tiles, end.x - rows, rows};
    start[thread] = batch.row;
    for (int t = 0; t < tiles; t++) r.batches[batch.tile + t] = batch;
  }
  if (thread == 1023) *r.token_tiles = end.y;
  // 1024 choices at a time: before each those of earlier ones, of earlier warps, and of earlier lanes
  for (int first = 0; first < r.slots; first += 1024) {
    const int slot = first + thread, e = r.expert(slot), warps = min(WARPS, (r.slots - first + 31) / 32);
    for (int i = thread; i < warps * MOST / 2; i += 1024) ((u32*)of_warp)[i] = 0;
    __syncthreads();
    const u32 same = __match_any_sync(~0u, e);
    const int before = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && !before) of_warp[warp][e] = __popc(same);
    __syncthreads();
    if (thread < r.count) {
      int next = start[thread];
      for (int w = 0; w < warps; w++) {
        const int here = of_warp[w][thread];
        of_warp[w][thread] = next - start[thread];
        next += here;
      }
    }
    __syncthreads();
    if (slot < r.slots) {
      const int place = e < 0 ? -1 : start[e] + of_warp[warp][e] + before;
      r.places[slot] = place;
      if (e >= 0) r.rows[place] = slot / r.choices;
    }
    __syncthreads();
    if (first + 1024 < r.slots) {
      // where the next ones go
      if (e >= 0 && !before) atomicAdd(&start[e], __popc(same));
      __syncthreads();
    }
  }
}
