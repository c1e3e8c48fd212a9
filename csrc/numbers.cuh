// Codes to fragments, and the two 16-bit types of activations. BF16 is 1 for bfloat16, 0 for float16.

// One word of the MARLIN layout: the 16 x 16 (features x k) fragment of mma's and wgmma's A operand, codes less 8.
// Bits of a nibble go under the mantissa of 1024 (float16) or 128 (bfloat16), from which the offset is subtracted.
__device__ __forceinline__ u32 under(u32 q, u32 mask, u32 top) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(q), "r"(mask), "r"(top));
  return r;
}
#if BF16
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
__device__ __forceinline__ void unpack(u32 q, u32 (&a)[4]) {
  const u32 one = 0x3f803f80u, minus = 0xc308c308u, mask = 0x000f000fu, top = 0x43004300u;
  a[0] = multiply_add(under(q, mask, top), one, minus);
  a[2] = multiply_add(under(q >> 4, mask, top), one, minus);
  a[1] = multiply_add(under(q >> 8, mask, top), one, minus);
  a[3] = multiply_add(under(q >> 12, mask, top), one, minus);
}
// A scale of float16 has more digits than bfloat16: it is the sum of two.
struct Factor { u32 high, low; };
__device__ __forceinline__ u32 multiply(u32 a, u32 b) { return multiply_add(a, b, 0x80008000u); }  // before sm_90 there is no other
__device__ __forceinline__ u32 multiply(u32 a, const Factor& f) { return multiply_add(a, f.high, multiply(a, f.low)); }
#define TYPE "bf16"
__device__ __forceinline__ u32 pair(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float number(u16 x) { return __uint_as_float((u32)x << 16); }
#else
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
__device__ __forceinline__ u32 subtract(u32 a, u32 b) {
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ void unpack(u32 q, u32 (&a)[4]) {
  const u32 low = 0x000f000fu, high = 0x00f000f0u, top = 0x64006400u;
  const u32 h = q >> 8;
  a[0] = subtract(under(q, low, top), 0x64086408u);
  a[2] = multiply_add(under(q, high, top), 0x2c002c00u, 0xd480d480u);
  a[1] = subtract(under(h, low, top), 0x64086408u);
  a[3] = multiply_add(under(h, high, top), 0x2c002c00u, 0xd480d480u);
}
struct Factor { u32 both; };
__device__ __forceinline__ u32 multiply(u32 a, const Factor& f) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(f.both));
  return r;
}
#define TYPE "f16"
__device__ __forceinline__ u32 pair(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float number(u16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
}
#endif
// Scales are float16 whatever the activations are.
__device__ __forceinline__ float scale_low(u32 s) {
  float f;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(f) : "r"(s));
  return f;
}
__device__ __forceinline__ float scale_high(u32 s) {
  float f;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b; }" : "=f"(f) : "r"(s));
  return f;
}

// The two scales of a fragment, of features l / 4 and l / 4 + 8, for multiplication of its codes.
__device__ __forceinline__ void factors(u32 scales, Factor (&f)[2]) {
#if BF16
  const float s[2] = {scale_low(scales), scale_high(scales)};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    f[h].high = pair(s[h], s[h]);
    const float rest = s[h] - __uint_as_float(f[h].high << 16);
    f[h].low = pair(rest, rest);
  }
#else
  f[0].both = __byte_perm(scales, 0, 0x1010);
  f[1].both = __byte_perm(scales, 0, 0x3232);
#endif
}
__device__ __forceinline__ void multiply_by(const Factor (&f)[2], u32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = multiply(a[i], f[i % 2]);
}
