// W4A16 for many tokens on Hopper: one warp keeps the copy engine busy, two warpgroups multiply by wgmma.
//
// A stage holds one chunk: 128 rows of k of 256 features, their scales and the activations. Each warp has its own 64
// features, as fragments of 16; a warpgroup takes two of the four fragments of its warps, one after the other: while
// one warpgroup scales what it has summed over a group, the other one multiplies.
constexpr int GROUPS = GROUP ? 128 / GROUP : 1;  // per chunk
constexpr int STEPS = 8 / GROUPS;                // of 16 rows of k, per group
constexpr int WEIGHTS = 16384, SCALES = GROUP ? 512 * GROUPS : 0, FILLED = WEIGHTS + TOKENS * 256 + SCALES;
constexpr int STAGE = (FILLED + 1023) / 1024 * 1024;
constexpr int SUMS = TOKENS / 2;  // of a thread, per fragment: features l / 4 and + 8, tokens 8 i + 2 (l % 4) and + 1

__device__ __forceinline__ void output_registers(const Problem& p, const Schedule& plan, int tile, float (&acc)[2][SUMS], u32 staging);

extern "C" __global__ void __launch_bounds__(384, 1)
marlin_wgmma(const __grid_constant__ Problem p, const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap x) {
  extern __shared__ __align__(1024) unsigned char unaligned[];
  const u32 stages = (shared_address(unaligned) + 1023) & ~1023u, full = stages + STAGES * STAGE, empty = full + 8 * STAGES;
  const Schedule plan(p);
  const int begin = plan.first(blockIdx.x), count = plan.first(blockIdx.x + 1) - begin;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      flag_init(full + 8 * s, 1);
      flag_init(empty + 8 * s, 8);
    }
    flags_ready();
  }
  __syncthreads();
  if (warp >= 8) {
    give_registers<GIVE>();
    if (threadIdx.x != 256) return;
    Position at(plan, begin);
    for (int i = 0, s = 0, phase = 1; i < count; i++, at.advance(plan, 1)) {
      const u32 stage = stages + s * STAGE, flag = full + s * 8;
      flag_wait(empty + s * 8, phase);
      flag_expect(flag, FILLED);
      copy_tile(stage, &weights, 256 * at.column, 8 * at.k, flag);
      if (GROUP) copy_tile(stage + WEIGHTS + TOKENS * 256, &scales, 256 * at.column, GROUPS * at.k, flag);
      if (i == 0) {
        let_next_kernel_start();
        wait_for_previous_kernel();
      }
      copy_tile(stage + WEIGHTS, &x, 128 * at.k, TOKENS * at.token_tile, flag);
      copy_tile(stage + WEIGHTS + TOKENS * 128, &x, 128 * at.k + 64, TOKENS * at.token_tile, flag);
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    return;
  }
  take_registers<TAKE>();
  const int group = warp / 4, column = warp % 4;
  float acc[2][SUMS];
  auto clear = [&]() {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) acc[j][i] = 0.f;
  };
  clear();
  wait_for_previous_kernel();
  int i = 0, s = 0, phase = 0;
  for (int tile = begin / plan.chunks; tile * plan.chunks < begin + count; tile++) {
    const int stop = min(count, (tile + 1) * plan.chunks - begin);
    for (; i < stop; i++) {
      const u32 stage = stages + s * STAGE, at = stage + WEIGHTS;
      flag_wait(full + s * 8, phase);
      uint2 words[8];
#pragma unroll
      for (int r = 0; r < 8; r++) words[r] = load_shared_pair(stage + r * 2048 + column * 512 + lane * 16 + group * 8);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        const uint2 scale = GROUP ? load_shared_pair(at + TOKENS * 256 + g * 512 + column * 128 + lane / 4 * 16 + group * 8) : make_uint2(0, 0);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float part[SUMS];
          u32 a[2][4];
#pragma unroll
          for (int r = g * STEPS; r < (g + 1) * STEPS; r++) {
            unpack(j ? words[r].y : words[r].x, a[r & 1]);
            wgmma_fence();
            wgmma(GROUP ? part : acc[j], a[r & 1], matrix(at + r / 4 * (TOKENS * 128) + r % 4 * 32), GROUP ? r > g * STEPS : 1);
            wgmma_commit();
            if (r + 1 < (g + 1) * STEPS) wgmma_wait<1>(); else wgmma_wait<0>();
          }
          if (GROUP) {
            const float low = scale_low(j ? scale.y : scale.x), high = scale_high(j ? scale.y : scale.x);
#pragma unroll
            for (int k = 0; k < SUMS; k++) acc[j][k] += (k % 4 < 2 ? low : high) * part[k];
          }
        }
      }
      if (lane == 0) flag_arrive(empty + s * 8);
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    output_registers(p, plan, tile, acc, empty + 8 * STAGES + warp * 512);
    clear();
  }
}

// A tile whose sums are in registers; parts of it lie in memory as they do in the registers, thread beside thread.
__device__ __forceinline__ void output_registers(const Problem& p, const Schedule& plan, int tile, float (&acc)[2][SUMS], u32 staging) {
  const int first_token = tile % plan.token_tiles * TOKENS, first_feature = tile / plan.token_tiles * 256;
  const int begin = tile * plan.chunks, head = plan.owner(begin), tail = plan.owner(begin + plan.chunks - 1);
  const int late = begin > plan.first(head), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (head != tail) {
    float* mine = p.parts + (u64)(2 * blockIdx.x + (blockIdx.x == head && late)) * (TOKENS * 256) + 4 * threadIdx.x;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < SUMS; i += 4)
        *(float4*)(mine + (j * SUMS + i) * 256) = make_float4(acc[j][i], acc[j][i + 1], acc[j][i + 2], acc[j][i + 3]);
    if (!comes_last(p, head, tail, 256)) return;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) acc[j][i] = 0.f;
    for (int b = head; b <= tail; b++) {
      const float* theirs = p.parts + (u64)(2 * b + (b == head && late)) * (TOKENS * 256) + 4 * threadIdx.x;
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
          const float4 v = load_global(theirs + (j * SUMS + i) * 256);
          acc[j][i] += v.x; acc[j][i + 1] += v.y; acc[j][i + 2] += v.z; acc[j][i + 3] += v.w;
        }
    }
  }
  // eight tokens at a time through shared memory: a lane then has eight neighbouring features of one token
  const int feature = first_feature + warp % 4 * 64 + warp / 4 * 32;
  if (feature >= p.n) return;
  float factor[2][2] = {{1.f, 1.f}, {1.f, 1.f}}, bias[2][2] = {};
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int f = feature + 16 * j + 8 * h + lane / 4;
      if (GROUP == 0) factor[j][h] = single_scale(p, f);
      if (p.bias) bias[j][h] = number(p.bias[f]);
    }
  const int row = lane / 4, part = lane % 4;
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    const int token = first_token + 2 * i;
    if (token >= p.m) return;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const u32 v = pair(acc[j][i + e] * factor[j][e / 2] + bias[j][e / 2], 0.f);
        store_shared(staging + (2 * (lane % 4) + e % 2) * 64 + (16 * j + 8 * (e / 2) + lane / 4) * 2, (u16)v);
      }
    __syncwarp();
    if (token + row < p.m) *(uint4*)(p.y + (u64)(token + row) * p.n + feature + 8 * part) = load_shared(staging + row * 64 + part * 16);
    __syncwarp();
  }
}
