// wgmma with the weights in registers: 64 features x TOKENS tokens x 16 rows of k, or 32 of which 16 are held; then
// two `lanes` of every four have the metadata.
// The low half of what describes a matrix in shared memory; the high half is the same for all: rows of 128 bytes,
// swizzled, groups of eight rows 1024 bytes apart.
__device__ __forceinline__ u32 matrix(u32 address) { return 1 << 16 | address >> 4; }
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
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
#if TOKENS == 16
  asm volatile(WGMMA("16")
      "%0, %1, %2, %3, %4, %5, %6, %7"
      INPUTS("{%8, %9, %10, %11}", "%12", "%13", "%14")
      : D4(0), D4(4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 24
  asm volatile(WGMMA("24")
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"
      INPUTS("{%12, %13, %14, %15}", "%16", "%17", "%18")
      : D4(0), D4(4), D4(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 32
  asm volatile(WGMMA("32")
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      INPUTS("{%16, %17, %18, %19}", "%20", "%21", "%22")
      : D16(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 48
  asm volatile(WGMMA("48")
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23"
      INPUTS("{%24, %25, %26, %27}", "%28", "%29", "%30")
      : D16(0), D4(16), D4(20)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 64
  asm volatile(WGMMA("64")
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      INPUTS("{%32, %33, %34, %35}", "%36", "%37", "%38")
      : D16(0), D16(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 96
  asm volatile(WGMMA("96")
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
      INPUTS("{%48, %49, %50, %51}", "%52", "%53", "%54")
      : D16(0), D16(16), D16(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
#if TOKENS == 128
  asm volatile(WGMMA("128")
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      INPUTS("{%64, %65, %66, %67}", "%68", "%69", "%70")
      : D16(0), D16(16), D16(32), D16(48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) METADATA_OPERANDS);
#endif
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
