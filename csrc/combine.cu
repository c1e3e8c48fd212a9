// A token's output: the sum of its experts' answers, each times its share, in the order of the choices.
struct Combining {
  const u16* answers;  // (places, n)
  const int* places;   // (m, choices): where a choice's answer is, or -1 where there is none
  const void* shares;  // (m, choices)
  u16* y;              // (m, n)
  int n, choices, blocks;  // blocks of the grid for a token
  int full;                // shares are float32, else as y
};

extern "C" __global__ void __launch_bounds__(128) marlin_combine(const __grid_constant__ Combining c) {
  const int token = blockIdx.x / c.blocks, feature = (blockIdx.x % c.blocks * 128 + threadIdx.x) * 8;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (feature >= c.n) return;
  float sums[8] = {};
  for (int first = 0; first < c.choices; first += 8) {  // eight at a time are on their way
    uint4 answers[8];
    float share[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int slot = token * c.choices + first + i, place = first + i < c.choices ? c.places[slot] : -1;
      share[i] = 0.f;
      answers[i] = make_uint4(0, 0, 0, 0);
      if (place < 0) continue;
      share[i] = c.full ? ((const float*)c.shares)[slot] : number(((const u16*)c.shares)[slot]);
      answers[i] = *(const uint4*)(c.answers + (u64)place * c.n + feature);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u32 words[4] = {answers[i].x, answers[i].y, answers[i].z, answers[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[2 * j] += share[i] * number(words[j] & 0xffff);
        sums[2 * j + 1] += share[i] * number(words[j] >> 16);
      }
    }
  }
  *(uint4*)(c.y + (u64)token * c.n + feature) = make_uint4(pair(sums[0], sums[1]), pair(sums[2], sums[3]), pair(sums[4], sums[5]), pair(sums[6], sums[7]));
}
