// Tokens in the order of the experts they go to, and the tiles of tokens that these make. One block; the order of an
// expert's tokens is theirs, so that all that follows is the same every time.
constexpr int WARPS = 32;  // of the block

// Inclusive sums over all threads of two numbers.
__device__ __forceinline__ int2 sums_so_far(int a, int b) {
  __shared__ int2 sums[WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int d = 1; d < 32; d *= 2) {
    const int before_a = __shfl_up_sync(~0u, a, d), before_b = __shfl_up_sync(~0u, b, d);
    if (lane >= d) { a += before_a; b += before_b; }
  }
  if (lane == 31) sums[warp] = make_int2(a, b);
  __syncthreads();
  for (int w = 0; w < warp; w++) { a += sums[w].x; b += sums[w].y; }
  return make_int2(a, b);
}

// What a warp does with its part of all choices, in order, 32 at a time and eight times as many on their way: count
// those of every expert in `mine`, which in the second pass begins with where they go, and are put.
template <bool second> __device__ __forceinline__ void pass_through_part(const Routing& r, int* mine) {
  const int lane = threadIdx.x % 32, part = (r.slots + 1023) / 1024 * 32;
  const int from = threadIdx.x / 32 * part, to = min(r.slots, from + part);
  for (int first = from + lane; first - lane < to; first += 8 * 32) {
    int e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = first + 32 * i < to ? r.expert(first + 32 * i) : -1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int slot = first + 32 * i;
      const u32 same = __match_any_sync(~0u, e[i]);
      const int before = __popc(same & ((1u << lane) - 1));
      if (second && slot < to) {
        const int place = e[i] < 0 ? -1 : mine[e[i]] + before;
        r.places[slot] = place;
        if (e[i] >= 0) r.rows[place] = slot / r.choices;
      }
      __syncwarp();
      if (e[i] >= 0 && !before) mine[e[i]] += __popc(same);
      __syncwarp();
    }
  }
}

extern "C" __global__ void __launch_bounds__(1024, 1) marlin_route(const __grid_constant__ Routing r) {
  extern __shared__ int of_warps[];  // (WARPS, count)
  const int thread = threadIdx.x;
  int* const mine = of_warps + thread / 32 * r.count;
  for (int i = thread; i < WARPS * r.count; i += 1024) of_warps[i] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  pass_through_part<false>(r, mine);
  __syncthreads();
  int here[WARPS], rows = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) rows += here[w] = thread < r.count ? of_warps[w * r.count + thread] : 0;
  const int tiles = (rows + r.tokens - 1) / r.tokens;
  const int2 end = sums_so_far(rows, tiles);
  if (thread < r.count) {
    const Batch batch = {thread, end.y - tiles, tiles, end.x - rows, rows};
    for (int t = 0; t < tiles; t++) r.batches[batch.tile + t] = batch;
    int next = batch.row;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      of_warps[w * r.count + thread] = next;
      next += here[w];
    }
  }
  if (thread == 1023) *r.token_tiles = end.y;
  __syncthreads();
  pass_through_part<true>(r, mine);
}
