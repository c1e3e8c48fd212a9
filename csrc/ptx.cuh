// PTX wrappers, no headers needed.
typedef unsigned u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// What is the same in all threads of a warp, so that the compiler knows.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Weights are read once: no room for them in L1, and far ahead into L2.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ float4 load_global(const float* p) {  // past L1, which does not see other SMs' stores
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Between what a thread wrote and has others see, and between their signal and what it reads.
__device__ __forceinline__ void see_others_writes() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// 16 bytes to shared memory, zeros if there is no source.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}

__device__ __forceinline__ uint4 load_shared(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}
__device__ __forceinline__ float4 load_shared_floats(u32 from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void load_shared(u32 (&v)[2], u32 from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(from));
}
__device__ __forceinline__ u32 load_shared_word(u32 from) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}
// The metadata of four fragments: two words, 128 bytes apart.
__device__ __forceinline__ uint2 load_metadata(u32 from) {
  uint2 v = make_uint2(0, 0);
#if SPARSE
  asm volatile("ld.shared.u32 %0, [%2];\nld.shared.u32 %1, [%2 + 128];" : "=r"(v.x), "=r"(v.y) : "r"(from));
#endif
  return v;
}
__device__ __forceinline__ void store_shared(u32 to, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory"); }
__device__ __forceinline__ void store_shared(u32 to, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// Two numbers of 16 bits, so many bytes apart.
__device__ __forceinline__ void store_shared_pair(u32 to, int apart, u32 v) {
  asm volatile("{ .reg .b16 a, b;\nmov.b32 {a, b}, %2;\nst.shared.b16 [%0], a;\nst.shared.b16 [%1], b;\n}" ::"r"(to), "r"(to + apart), "r"(v) : "memory");
}
// Two or four 8 x 8 matrices, each transposed: lane l gives where row l % 8 of matrix l / 8 goes.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void store_matrices(u32 to, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void store_matrices(u32 to, const u32 (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(r[0]), "r"(r[1]) : "memory");
}
#else
__device__ __forceinline__ void store_matrix(u32 to, u32 r, int number) {
  const u32 row = __shfl_sync(~0u, to, 8 * number + threadIdx.x % 32 / 4);
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(r));
  store_shared(row + threadIdx.x % 4 * 4, r);
}
template <int count> __device__ __forceinline__ void store_matrices(u32 to, const u32 (&r)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) store_matrix(to, r[i], i);
}
#endif

// A kernel waits before it lets the next one start, so that what comes before it is complete for that one even
// where it does not wait.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
__device__ __forceinline__ void wait_for_previous_kernel() {}
__device__ __forceinline__ void let_next_kernel_start() {}
#endif

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void flag_init(u32 flag, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(flag), "r"(count)); }
__device__ __forceinline__ void flags_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void flag_expect(u32 flag, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(flag), "r"(bytes) : "memory");
}
__device__ __forceinline__ void flag_arrive(u32 flag) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(flag) : "memory"); }
__device__ __forceinline__ void flag_wait(u32 flag, u32 phase) {
  asm volatile("{ .reg .pred done;\nAGAIN: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(flag), "r"(phase) : "memory");
}
// Arrives when all that this thread has copied so far is there.
__device__ __forceinline__ void flag_arrive_copied(u32 flag) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(flag) : "memory");
}
// What copies have written is seen by the tensor cores.
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The blocks of a cluster read each other's shared memory. To the barrier come all threads that have not ended.
__device__ __forceinline__ int cluster_size() {
  int n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
__device__ __forceinline__ float4 load_of_block(u32 address, int rank) {
  float4 v;
  asm volatile("{ .reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(rank) : "memory");
  return v;
}
// A barrier that makes nothing seen: before it nothing was written that another block reads, and what was read has come, as
// it was used. It spares a fence of the whole GPU.
__device__ __forceinline__ void cluster_meets() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
// 16 bytes into a block's shared memory, counted by its flag.
__device__ __forceinline__ void send_to_block(u32 to, float4 v, u32 flag, int rank) {
  asm volatile("{ .reg .u32 there, its;\nmapa.shared::cluster.u32 there, %0, %6;\nmapa.shared::cluster.u32 its, %5, %6;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [its];\n}"
               ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(flag), "r"(rank) : "memory");
}
// A rectangle of a matrix, by the copy engine; what lies outside the matrix arrives as zeros.
struct __align__(64) TensorMap { u64 opaque[16]; };
__device__ __forceinline__ void fetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
__device__ __forceinline__ void copy_tile(u32 to, const TensorMap* map, int column, int row, u32 flag) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(flag) : "memory");
}
template <int registers> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }
#endif
