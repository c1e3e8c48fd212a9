// mma.sync with weights in registers, and activations in shared memory.

__device__ __forceinline__ void mma(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 32 rows of k, of which a holds 16; two lanes of every four have the metadata.
template <int lanes>
__device__ __forceinline__ void mma_sparse(float* d, const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(lanes));
}

// Where in shared memory 16 bytes of a token lie: two blocks of 64 rows of k, tokens of 128 bytes, swizzled.
__device__ __forceinline__ u32 place(int token, int v) {
  return v / 8 * (TOKENS * 128) + token * 128 + (((v ^ token) & 7) << 4);
}
