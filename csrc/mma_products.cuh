// One chunk (128 rows of k) of 64 features x TOKENS tokens by mma.sync, for one warp.
constexpr int TILES = TOKENS / 8;

typedef float Sums[4][TILES][4];  // of 16 features (rows l / 4 and + 8) x 8 tokens (2 (l % 4) and + 1) each

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[j][t][i] = 0.f;
}

// Each group is summed by itself, then scaled in float32: exact scales, and no multiplication of weights.
template <class Codes, class Metadata, class Scales>
__device__ __forceinline__ void multiply(Sums& acc, u32 x, Codes codes, Metadata metadata, Scales scales) {
  const int lane = threadIdx.x % 32;
  uint4 q = codes(0);
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    Sums part;
    if (GROUP) clear(part);
    Sums& into = GROUP ? part : acc;
#pragma unroll
    for (int k32 = g * 4 / GROUPS; k32 < (g + 1) * 4 / GROUPS; k32++) {
      u32 b[TILES][4];
#pragma unroll
      for (int t = 0; t < TILES; t++) load_matrices(b[t], x + place(8 * t + lane % 8, 4 * k32 + lane / 8));
      const uint2 which = metadata(k32);
#pragma unroll
      for (int s = k32 * STEPS / 4; s < (k32 + 1) * STEPS / 4; s++) {
        const u32 words[4] = {q.x, q.y, q.z, q.w};
        if (s < STEPS - 1) q = codes(s + 1);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          u32 a[4];
          unpack(words[j], a);
#pragma unroll
          for (int t = 0; t < TILES; t++) {
            if (!SPARSE) mma(into[j][t], a, b[t][s % 2 * 2], b[t][s % 2 * 2 + 1]);
            else if (j % 2) mma_sparse<1>(into[j][t], a, b[t], j / 2 ? which.y : which.x);
            else mma_sparse<0>(into[j][t], a, b[t], j / 2 ? which.y : which.x);
          }
        }
      }
    }
    if (GROUP) {
      const uint4 s = scales(g);
      const u32 words[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float low = scale_low(words[j]), high = scale_high(words[j]);
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[j][t][i] += (i < 2 ? low : high) * part[j][t][i];
      }
    }
  }
}
// A warp's sums to the rows of a tile in shared memory.
__device__ __forceinline__ void put(const Sums& sums, float* tile, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        tile[(8 * t + 2 * (lane % 4) + i % 2) * ROW + 64 * column + feature_in_column(j, i / 2, lane)] = sums[j][t][i];
}
