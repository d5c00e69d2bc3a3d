// The few instructions the kernels are made of, each behind one function, and the element types.
// A mma.sync fragment is named as in the PTX manual: lane = 4 g + t, g in 0..7, t in 0..3.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cuda/common/check.cuh"

namespace mfops::cuda {

// 16-bit floats as kernels see them: bits to move, numbers only after to_float.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) {
    return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
    return {__half_as_ushort(__float2half_rn(v))};
}

// v rounded to TF32 (to nearest), as mma_tf32 takes it.
__device__ __forceinline__ uint32_t to_tf32(float v) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return bits;
}

// `v`, but what is computed from it stays where it is used: of a path that is seldom taken nothing
// is computed ahead, which would take registers from all others.
__device__ __forceinline__ int no_hoist(int v) {
    asm volatile("" : "+r"(v));
    return v;
}
__device__ __forceinline__ unsigned no_hoist(unsigned v) {
    asm volatile("" : "+r"(v));
    return v;
}
__device__ __forceinline__ int64_t no_hoist(int64_t v) {
    asm volatile("" : "+l"(v));
    return v;
}

// 4, 8 or 16 bytes at once; addresses are multiples of as many.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void load_shared(uint32_t& bits, const void* from) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(shared_address(from)) : "memory");
}
__device__ __forceinline__ void load_shared(uint2& bits, const void* from) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(bits.x), "=r"(bits.y)
                 : "r"(shared_address(from))
                 : "memory");
}
__device__ __forceinline__ void load_shared(uint4& bits, const void* from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(shared_address(from))
                 : "memory");
}
__device__ __forceinline__ void store_shared(void* to, uint32_t bits) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared_address(to)), "r"(bits) : "memory");
}
__device__ __forceinline__ void store_shared(void* to, uint2 bits) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared_address(to)), "r"(bits.x),
                 "r"(bits.y)
                 : "memory");
}
__device__ __forceinline__ void store_shared(void* to, uint4 bits) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
}
__device__ __forceinline__ void load_global(uint4& bits, const void* from) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
}
__device__ __forceinline__ void store_global(void* to, uint4 bits) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
}

// Copies 16 bytes to shared memory without waiting: the first `bytes` from `global`, the rest zeros
// (bytes = 0 reads nothing). Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}
// All 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the kPending groups closed last are still on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane l passes the address (a multiple of 16) of row l % 8
// of matrix l / 8; r[i] is then the pair (row g, columns 2t and 2t + 1) of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same with each matrix transposed: r[i] is the pair (rows 2t and 2t + 1, column g).
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8).
//   d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
//   a: pairs along the second index (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8)
//   b: pairs along the first index (2t, g), (2t+8, g); the lower index in the lower half
// volatile: it must not move into a branch, which parts of a warp may not take.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<f16>(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d (16 x 8) += a (16 x 8) b (8 x 8) on TF32 operands.
//   a: (g, t), (g+8, t), (g, t+4), (g+8, t+4);  b: (t, g), (t+4, g)
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Waits for the lanes of the warp; what they wrote is then seen by all.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// The value of the lane `offset` further up in the warp.
__device__ __forceinline__ double shuffle_down(double v, int offset) {
    return __shfl_down_sync(0xffffffff, v, offset);
}
// The value of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ float shuffle_xor(float v, int mask) {
    return __shfl_xor_sync(0xffffffff, v, mask);
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ uint4 mfops_shared[];
    return reinterpret_cast<char*>(mfops_shared);
}

// Clusters of blocks, from compute capability 9.0 on; before, a kernel that uses them is empty.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MFOPS_CLUSTERS 1
#endif
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Waits for all threads of the cluster; what they wrote to any block's shared memory is then seen.
__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
}
// The address in block `rank` of what lies at `shared` in this one.
__device__ __forceinline__ uint32_t in_block(const void* shared, unsigned rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(shared_address(shared)), "r"(rank));
    return address;
}
__device__ __forceinline__ void load_cluster(uint4& bits, const void* from, unsigned rank) {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(in_block(from, rank))
                 : "memory");
}
__device__ __forceinline__ void store_cluster(void* to, unsigned rank, uint2 bits) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(in_block(to, rank)), "r"(bits.x),
                 "r"(bits.y)
                 : "memory");
}

// Lets blocks of Kernel have all the dynamic shared memory that the current device offers. Never
// less than all: other threads may be about to launch the same kernel with more than this one.
template <auto Kernel>
void allow_shared_memory() {
    static std::atomic<uint64_t> allowed{0};  // a bit for each device; beyond 64 it is asked again
    int device = 0;
    MFOPS_CUDA_CHECK(cudaGetDevice(&device));
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (allowed.load(std::memory_order_acquire) & bit) return;
    int bytes = 0;
    MFOPS_CUDA_CHECK(
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    MFOPS_CUDA_CHECK(
        cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    // And a multiprocessor all of its own: blocks planned to run side by side need it.
    MFOPS_CUDA_CHECK(cudaFuncSetAttribute(Kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared));
    allowed.fetch_or(bit, std::memory_order_release);
}

// Launches Kernel(params) in clusters of `cluster` blocks and checks the launch.
template <auto Kernel, class Params>
void launch_clusters(unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes,
                     void* stream, const Params& params) {
    allow_shared_memory<Kernel>();
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    MFOPS_CUDA_CHECK(cudaLaunchKernelEx(&config, Kernel, params));
}

// Launches Kernel(params) and checks the launch. `stream` is a cudaStream_t.
template <auto Kernel, class Params>
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, void* stream,
            const Params& params) {
    if (shared_bytes > 48 * 1024) allow_shared_memory<Kernel>();  // no need to ask for less
    Kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    MFOPS_CUDA_CHECK(cudaGetLastError());
}

}  // namespace mfops::cuda
