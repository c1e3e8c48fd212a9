// One chunk (128 rows of k) of 256 features x TOKENS tokens by wgmma, for one warpgroup.
//
// Each warp unpacks its own 64 features to fragments of 16; the j-th instruction multiplies the j-th fragment of all
// four warps: its 64 rows are features 64 w + 16 j + r. Activations are read from shared memory as they were copied:
// two blocks of 64 rows of k, tokens of 128 bytes, swizzled.
constexpr int GROUPS = GROUP ? 128 / GROUP : 1;  // per chunk
constexpr int STEPS = 8 / GROUPS;                // of 16 rows of k, per group

typedef float Sums[4][TOKENS / 2];

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[j][i] = 0.f;
}
template <class Codes, class Scales>
__device__ __forceinline__ void multiply(Sums& acc, u32 x, Codes codes, Scales scales) {
  uint4 q = codes(0);
  u32 a[2][4][4];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    Sums part;
#pragma unroll
    for (int s = g * STEPS; s < (g + 1) * STEPS; s++) {
      const u32 words[4] = {q.x, q.y, q.z, q.w};
      if (s < 7) q = codes(s + 1);
#pragma unroll
      for (int j = 0; j < 4; j++) unpack(words[j], a[s & 1][j]);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; j++)
        wgmma(GROUP ? part[j] : acc[j], a[s & 1][j], matrix(x + s / 4 * (TOKENS * 128) + s % 4 * 32), GROUP ? s > g * STEPS : 1);
      wgmma_commit();
      if (s + 1 < (g + 1) * STEPS) wgmma_wait<1>(); else wgmma_wait<0>();
    }
    if (GROUP) {
      const uint4 s = scales(g);
      const u32 words[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float low = scale_low(words[j]), high = scale_high(words[j]);
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) acc[j][i] += (i % 4 < 2 ? low : high) * part[j][i];
      }
    }
  }
}
__device__ __forceinline__ void put(const Sums& sums, float* tile, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++)
      tile[(8 * (i / 4) + 2 * (lane % 4) + i % 2) * ROW + 64 * column + 16 * j + lane / 4 + 8 * (i % 4 / 2)] = sums[j][i];
}
