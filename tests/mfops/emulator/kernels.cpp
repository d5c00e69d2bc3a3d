// Kernels for the emulator's own tests; those that misbehave do so on purpose.
#include "cuda/common/primitives.cuh"

namespace mfops::cuda {
namespace {

struct Params {
    const void* in;
    void* out;
    int a, b, c;

    template <class T>
    const T* input() const {
        return static_cast<const T*>(in);
    }
    template <class T>
    T* output() const {
        return static_cast<T*>(out);
    }
};

template <class T>
__device__ __forceinline__ T* shared_as() {
    return reinterpret_cast<T*>(shared_memory());
}

// A thread's registers: a, b, d.
struct Fragments {
    uint32_t a[4], b[2];
    float d[4];
};

template <auto Mma>
__global__ void mma_kernel(const __grid_constant__ Params p) {
    Fragments f = p.input<Fragments>()[threadIdx.x];
    Mma(f.d, f.a, f.b);
    for (int i = 0; i < 4; ++i) p.output<float>()[4 * threadIdx.x + i] = f.d[i];
}
__device__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<bf16>(d, a, b);
}
__device__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<f16>(d, a, b);
}
__device__ void mma_tf32_(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
}

// 32 rows of 16 bytes; a: transposed; b: bytes to add to the address of lane 5.
__global__ void ldmatrix_kernel(const __grid_constant__ Params p) {
    const unsigned lane = threadIdx.x;
    for (int i = 0; i < 8; ++i) {
        shared_as<uint16_t>()[8 * lane + i] = p.input<uint16_t>()[8 * lane + i];
    }
    __syncthreads();
    uint32_t r[4];
    const char* row = shared_memory() + 16 * (31 - lane) + (lane == 5 ? p.b : 0);
    if (p.a) {
        ldmatrix_trans(r, row);
    } else {
        ldmatrix(r, row);
    }
    for (int i = 0; i < 4; ++i) p.output<uint32_t>()[4 * lane + i] = r[i];
}

// Copies three groups of 4 floats and one that is not closed to where there are ones, and waits for
// all but the last kPending; 3: not at all.
template <int kPending>
__global__ void copies_kernel(const __grid_constant__ Params p) {
    for (int i = 0; i < 16; ++i) shared_as<float>()[i] = 1;
    for (int group = 0; group < 4; ++group) {
        cp_async_16(shared_as<float>() + 4 * group, p.input<float>() + 4 * group, 16);
        if (group < 3) cp_async_commit();
    }
    if (kPending < 3) cp_async_wait<kPending>();
    for (int i = 0; i < 16; ++i) p.output<float>()[i] = shared_as<float>()[i];
}

// One copy of c bytes, from byte a to byte b.
__global__ void copy_kernel(const __grid_constant__ Params p) {
    cp_async_16(shared_memory() + p.b, p.input<char>() + p.a, p.c);
    cp_async_commit();
    cp_async_wait<0>();
    std::memcpy(p.out, shared_memory() + p.b, 16);
}

// Stores 16 bytes at byte a in three parts, loads them at byte b.
__global__ void words_kernel(const __grid_constant__ Params p) {
    const uint32_t* const in = p.input<uint32_t>();
    char* const to = shared_memory() + p.a;
    store_shared(to, uint2{in[0], in[1]});
    store_shared(to + 8, in[2]);
    store_shared(to + 12, in[3]);
    const char* const from = shared_memory() + p.b;
    uint4 four;
    load_shared(four, from);
    uint2 two;
    load_shared(two, from + 8);
    uint32_t one;
    load_shared(one, from);
    store_global(p.output<char>() + p.c, uint4{one, four.y, two.x, two.y});
}

// Passes each thread's input on to the thread a further; b: what is missing.
__global__ void pass_kernel(const __grid_constant__ Params p) {
    enum { kNothing, kFirstBarrier, kSecondBarrier };
    const unsigned from = (threadIdx.x + p.a) % blockDim.x;
    float* const s = shared_as<float>();
    s[4 * threadIdx.x] = p.input<float>()[4 * threadIdx.x];
    if (p.b != kFirstBarrier) __syncthreads();
    p.output<float>()[threadIdx.x] = s[4 * from];
    if (p.b != kSecondBarrier) __syncthreads();
    cp_async_16(s + 4 * threadIdx.x, p.in, 16);
    cp_async_commit();
    cp_async_wait<0>();
}

// The same between blocks of clusters of 4, four floats a thread, each from the block a further.
__global__ void cluster_kernel(const __grid_constant__ Params p) {
    enum { kNothing, kBeginning, kFirstBarrier, kSecondBarrier };
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned from = (cluster_rank() + p.a) % 4;
    float* const s = shared_as<float>() + 4 * threadIdx.x;
    if (p.b != kBeginning) cluster_sync();
    for (int j = 0; j < 4; ++j) s[j] = p.input<float>()[4 * i + j];
    if (p.b != kBeginning && p.b != kFirstBarrier) cluster_sync();
    uint4 four;
    load_cluster(four, s, from);
    std::memcpy(p.output<float>() + 4 * i, &four, 16);
    if (p.b != kSecondBarrier) cluster_sync();
    store_cluster(s, (from + p.a) % 4, uint2{0, 0});  // what yet another block reads
    cluster_sync();
}

// a: how the threads from 40 on part ways.
__global__ void diverge_kernel(const __grid_constant__ Params p) {
    enum { kReturn, kOtherBarrier, kBarrierNotMma, kOtherCollective, kNoMma };
    float d[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x >= 40) {
        if (p.a == kReturn) return;
        if (p.a == kOtherBarrier || p.a == kBarrierNotMma) __syncthreads();
        if (p.a == kOtherCollective) ldmatrix(a, shared_memory());
        return;
    }
    if (p.a >= kBarrierNotMma) mma<bf16>(d, a, b);
    __syncthreads();
}

// Writes a byte at a.
__global__ void poke_kernel(const __grid_constant__ Params p) { shared_memory()[p.a] = 1; }

// Copies a floats.
__global__ void guard_kernel(const __grid_constant__ Params p) {
    if (threadIdx.x != 3) return;
    for (int i = 0; i < p.a; ++i) p.output<float>()[i] = p.input<float>()[i];
}

__global__ void shuffle_kernel(const __grid_constant__ Params p) {
    p.output<double>()[threadIdx.x] = shuffle_down(p.input<double>()[threadIdx.x], p.a);
}

// Who ran, and with which shared memory.
__global__ void grid_kernel(const __grid_constant__ Params p) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    p.output<unsigned>()[i] += i + gridDim.x;
    if (!std::isnan(shared_as<float>()[threadIdx.x])) p.output<unsigned>()[i] = 0;
    __syncthreads();
    shared_as<float>()[threadIdx.x] = 0;
}

}  // namespace
}  // namespace mfops::cuda

using namespace mfops::cuda;

#define ENTRY(name, kernel)                                                                       \
    extern "C" const char* name(const void* in, void* out, int blocks, int threads, int shared,   \
                                int a, int b, int c) {                                            \
        return mfops::emulator::error_of(                                                         \
            [&] { launch<kernel>(blocks, threads, shared, nullptr, Params{in, out, a, b, c}); }); \
    }

ENTRY(run_mma_bf16, mma_kernel<mma_bf16>)
ENTRY(run_mma_f16, mma_kernel<mma_f16>)
ENTRY(run_mma_tf32, mma_kernel<mma_tf32_>)
ENTRY(run_ldmatrix, ldmatrix_kernel)
ENTRY(run_copies_wait_0, copies_kernel<0>)
ENTRY(run_copies_wait_1, copies_kernel<1>)
ENTRY(run_copies_no_wait, copies_kernel<3>)
ENTRY(run_copy, copy_kernel)
ENTRY(run_words, words_kernel)
ENTRY(run_pass, pass_kernel)
extern "C" const char* run_cluster(const void* in, void* out, int blocks, int threads, int shared,
                                   int a, int b, int c) {
    return mfops::emulator::error_of([&] {
        launch_clusters<cluster_kernel>(blocks, 4, threads, shared, nullptr,
                                        Params{in, out, a, b, c});
    });
}
ENTRY(run_diverge, diverge_kernel)
ENTRY(run_poke, poke_kernel)
ENTRY(run_guard, guard_kernel)
ENTRY(run_shuffle, shuffle_kernel)
ENTRY(run_grid, grid_kernel)

#define CONVERSION(name, From, To, convert)                        \
    extern "C" const char* name(const From* from, To* to, int n) { \
        for (int i = 0; i < n; ++i) to[i] = convert(from[i]);      \
        return nullptr;                                            \
    }

CONVERSION(bf16_from_float, float, bf16, from_float<bf16>)
CONVERSION(f16_from_float, float, f16, from_float<f16>)
CONVERSION(tf32_from_float, float, uint32_t, to_tf32)
CONVERSION(bf16_to_float, bf16, float, to_float)
CONVERSION(f16_to_float, f16, float, to_float)
