// wgmma with the weights in registers: 64 features x TOKENS tokens x 16 rows of k, or 32 of which 16 are held; then
// two `lanes` of every four have the metadata.
// The low half of what describes a matrix in shared memory; the high half is the same for all: rows of 128 bytes,
// swizzled, groups of eight rows 1024 bytes apart.
__device__ __forceinline__ u32 matrix(u32 address) { return 1 << 16 | address >> 4; }
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_4 "%0, %1, %2, %3"
#define SUMS_8 SUMS_4 ", %4, %5, %6, %7"
#define SUMS_12 SUMS_8 ", %8, %9, %10, %11"
#define SUMS_16 SUMS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_24 SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUMS_32 SUMS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_40 SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SUMS_48 SUMS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SUMS_56 SUMS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SUMS_64 SUMS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_72 SUMS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#if SPARSE
#define WGMMA(n) "wgmma.mma_async.sp.sync.aligned.m64n" n "k32.f32." TYPE "." TYPE " {"
#define INPUTS(a, b, e, f) "}, " a ", " b ", " e ", " f ", 1, 1, 1, 0;"
#define METADATA_OPERANDS , "r"(metadata), "n"(lanes)
#else
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." TYPE "." TYPE " {"
#define INPUTS(a, b, e, f) "}, " a ", " b ", 1, 1, 1, 0;"
#define METADATA_OPERANDS
#endif
template <int lanes>
__device__ __forceinline__ void wgmma(float (&d)[TOKENS / 2], const u32 (&a)[4], u32 metadata, u32 matrix) {
  const u64 b = (u64)0x40000040 << 32 | matrix;
#if TOKENS == 8
  asm volatile(WGMMA("8") SUMS_4 INPUTS("{%4, %5, %6, %7}", "%8", "%9", "%10")
      : D4(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 16
  asm volatile(WGMMA("16") SUMS_8 INPUTS("{%8, %9, %10, %11}", "%12", "%13", "%14")
      : D8(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 24
  asm volatile(WGMMA("24") SUMS_12 INPUTS("{%12, %13, %14, %15}", "%16", "%17", "%18")
      : D8(0), D4(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 32
  asm volatile(WGMMA("32") SUMS_16 INPUTS("{%16, %17, %18, %19}", "%20", "%21", "%22")
      : D16(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 48
  asm volatile(WGMMA("48") SUMS_24 INPUTS("{%24, %25, %26, %27}", "%28", "%29", "%30")
      : D16(0), D8(16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 64
  asm volatile(WGMMA("64") SUMS_32 INPUTS("{%32, %33, %34, %35}", "%36", "%37", "%38")
      : D32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 80
  asm volatile(WGMMA("80") SUMS_40 INPUTS("{%40, %41, %42, %43}", "%44", "%45", "%46")
      : D32(0), D8(32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 96
  asm volatile(WGMMA("96") SUMS_48 INPUTS("{%48, %49, %50, %51}", "%52", "%53", "%54")
      : D32(0), D16(32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 128
  asm volatile(WGMMA("128") SUMS_64 INPUTS("{%64, %65, %66, %67}", "%68", "%69", "%70")
      : D32(0), D32(32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 144
  asm volatile(WGMMA("144") SUMS_72 INPUTS("{%72, %73, %74, %75}", "%76", "%77", "%78")
      : D32(0), D32(32), D8(64) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
