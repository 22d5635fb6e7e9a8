// CUDA C as C++ on the CPU, for tests: one block at a time, its threads as fibers that change places at barriers and
// shuffles. A kernel that has neither runs as a plain loop over its threads.
//
// Found are: a barrier or shuffle that some threads do not reach, threads at different ones, a sum over threads that
// have ended, memory shared by a block that is read before it is written (it holds NaN), and results that depend on the
// order of threads or blocks (a seed shuffles both).
#pragma once
#include <math.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <link.h>
#include <ucontext.h>
#include <vector>

#define __global__ __attribute__((visibility("hidden")))
#define __device__ static
#define __constant__ static const
#define __shared__ static thread_local  // all lie in one block, which is found and poisoned before each block of threads
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated {
// A context is where a fiber stopped. On other processors than x86-64 the C library changes contexts, with two calls of
// the kernel.
#if defined(__x86_64__)
typedef void* Context;  // the stack pointer, with the registers that a function keeps below it
asm(R"(
.pushsection .text
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
.popsection
)");
extern "C" __attribute__((visibility("hidden"))) void emulated_switch(Context* from, const Context* to);
static void change(Context* from, const Context* to) { emulated_switch(from, to); }
static void make(Context* context, char* stack, size_t size, void (*function)()) {
    auto* top = (uintptr_t*)((uintptr_t)(stack + size) & ~(uintptr_t)15);
    *--top = 0;  // where the function would return to, which it never does
    *--top = (uintptr_t)function;
    for (int i = 0; i < 6; i++) *--top = 0;
    *context = top;
}
#else
typedef ucontext_t Context;
static void change(Context* from, const Context* to) { swapcontext(from, to); }
static void make(Context* context, char* stack, size_t size, void (*function)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = size;
    context->uc_link = nullptr;
    makecontext(context, function, 0);
}
#endif

enum { RUNS, BARRIER, SHUFFLE };
struct Fiber {
    Context at;
    bool begun, done;
    unsigned id, waits, turn;
    const char* place;           // the kind of barrier or shuffle at which it waits
    unsigned long long slot[2];  // what it gives to a shuffle: alternating, as others may read the last one still
    char* stack;
};
static const size_t STACK = (1 << 15) + 448;  // no power of two: or all stacks would want the same lines of the cache
static std::vector<Fiber*> fibers;
static Fiber* now;
static Context home;                 // of run_warp
static std::vector<unsigned> order;  // in which the threads of a warp go on
static unsigned position;            // in the order
static const std::function<void()>* body;
static unsigned long long state;  // of the random order; 0: as threads and blocks are numbered
static char message[256];

static unsigned random_below(unsigned n) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((state >> 32) * n >> 32);
}
static void shuffle(std::vector<unsigned>& numbers) {
    for (size_t i = numbers.size(); state && i > 1; i--) std::swap(numbers[i - 1], numbers[random_below((unsigned)i)]);
}
static void fail(const char* what) {
    if (!message[0]) snprintf(message, sizeof message, "%s (block %u %u)", what, blockIdx.x, blockIdx.y);
}
static void change_from(Context* from);
static void entry() {
    for (;;) {
        (*body)();
        now->done = true;
        change_from(&now->at);
    }
}
// Goes on with the next thread of the order that can, or at home.
static void change_from(Context* from) {
    while (position < order.size() && !message[0]) {
        Fiber* next = fibers[order[position++]];
        if (next->done || next->waits != RUNS) continue;
        now = next;
        threadIdx = {next->id, 0, 0};
        if (!next->begun) {
            next->begun = true;
            make(&next->at, next->stack, STACK, entry);
        }
        return change(from, &next->at);
    }
    change(from, &home);
}
static void wait(unsigned what, const char* place) {
    now->waits = what;
    now->place = place;
    change_from(&now->at);
}
static void prepare(unsigned threads) {
    while (fibers.size() < threads) {
        auto* fiber = new Fiber();
        fiber->stack = (char*)malloc(STACK);
        fiber->id = (unsigned)fibers.size();
        fibers.push_back(fiber);
    }
    for (unsigned i = 0; i < threads; i++) {
        Fiber* fiber = fibers[i];
        fiber->done = false;
        fiber->waits = RUNS;
        fiber->turn = 0;
    }
}
// Runs the threads of a warp until none can go on before a barrier of the block.
static void run_warp(unsigned first) {
    for (;;) {
        for (unsigned i = 0; i < 32; i++) order[i] = first + i;
        shuffle(order);
        position = 0;
        change_from(&home);
        if (message[0]) return;
        unsigned here = 0;
        bool alike = true;
        for (unsigned i = first; i < first + 32; i++) {
            here += !fibers[i]->done && fibers[i]->waits == SHUFFLE;
            alike = alike && fibers[i]->place == fibers[first]->place;
        }
        if (!here) return;
        if (here < 32) return fail("some threads of a warp are not at its shuffle");
        if (!alike) return fail("threads of a warp are at different shuffles");
        for (unsigned i = first; i < first + 32; i++) fibers[i]->waits = RUNS;
    }
}
// The memory of this library's thread_local variables, which are those that a block shares.
static thread_local volatile char first_touch;  // it is there once it has been used
struct Block { void* begin; size_t size; };
static int find_shared(dl_phdr_info* info, size_t, void* found) {
    bool own = false;
    size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& part = info->dlpi_phdr[i];
        auto here = (uintptr_t)&find_shared - info->dlpi_addr - part.p_vaddr;
        own = own || (part.p_type == PT_LOAD && here < part.p_memsz);
        if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (own) *(Block*)found = {info->dlpi_tls_data, size};
    return own;
}
static void run_block(unsigned threads, const Block& shared, std::vector<unsigned>& warps) {
    memset(shared.begin, 0xFF, shared.size);  // NaN
    prepare(threads);
    for (;;) {
        shuffle(warps);
        for (unsigned warp : warps) {
            run_warp(32 * warp);
            if (message[0]) return;
        }
        unsigned done = 0;
        for (unsigned i = 0; i < threads; i++) done += fibers[i]->done;
        if (done == threads) return;
        if (done) return fail("some threads have ended, others wait at __syncthreads");
        for (unsigned i = 0; i < threads; i++) fibers[i]->waits = RUNS;
    }
}
static std::vector<unsigned> numbers(unsigned count) {
    std::vector<unsigned> all(count);
    for (unsigned i = 0; i < count; i++) all[i] = i;
    return all;
}
static const char* begin(unsigned gx, unsigned gy, unsigned threads, unsigned long long seed) {
    gridDim = {gx, gy, 1};
    blockDim = {threads, 1, 1};
    state = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9ull;
    message[0] = 0;
    if (!threads || threads > 1024 || threads % 32 || gy > 65535) fail("a launch of a size that no GPU takes");
    return message[0] ? message : nullptr;
}
// The threads of a kernel that waits for others.
static const char* run(unsigned gx, unsigned gy, unsigned threads, unsigned long long seed,
                       const std::function<void()>& kernel) {
    if (begin(gx, gy, threads, seed)) return message;
    body = &kernel;
    std::vector<unsigned> blocks = numbers(gx * gy), warps = numbers(threads / 32);
    Block shared = {};
    first_touch = 0;
    if (!dl_iterate_phdr(find_shared, &shared) || !shared.begin) return "memory shared by a block is not found";
    order = numbers(32);
    shuffle(blocks);
    for (unsigned b : blocks) {
        blockIdx = {b % gx, b / gx, 0};
        run_block(threads, shared, warps);
        if (!message[0]) continue;
        for (Fiber* fiber : fibers) fiber->begun = false;  // they stand somewhere in the kernel
        return message;
    }
    return nullptr;
}
// The threads of a kernel that does not.
template <typename F>
static const char* loop(unsigned gx, unsigned gy, unsigned threads, unsigned long long seed, F kernel) {
    if (begin(gx, gy, threads, seed)) return message;
    unsigned blocks = gx * gy, first = seed ? random_below(blocks) : 0;
    bool backward = seed && random_below(2), downward = seed && random_below(2);
    for (unsigned k = 0; k < blocks; k++) {
        unsigned b = (unsigned)(((unsigned long long)first + (backward ? blocks - k : k)) % blocks);
        blockIdx = {b % gx, b / gx, 0};
        for (unsigned i = 0; i < threads; i++) {
            threadIdx = {downward ? threads - 1 - i : i, 0, 0};
            kernel();
        }
    }
    return nullptr;
}
template <typename T> static T exchange(const char* place, unsigned mask, T v, unsigned lane) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    if (mask != 0xffffffffu) fail("a shuffle of part of a warp");
    unsigned turn = now->turn++ & 1, warp = now->id & ~31u;
    memcpy(&now->slot[turn], &v, sizeof v);
    wait(SHUFFLE, place);
    memcpy(&v, &fibers[warp | (lane & 31)]->slot[turn], sizeof v);
    return v;
}
}  // namespace emulated

static inline void __syncthreads() { emulated::wait(emulated::BARRIER, "__syncthreads"); }
static inline int __syncthreads_count(int v) {
    __shared__ int count[2];
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    count[0] += v != 0;
    __syncthreads();
    int found = count[0];
    __syncthreads();
    return found;
}
static inline int __syncthreads_or(int v) { return __syncthreads_count(v) != 0; }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::exchange("__syncwarp", mask, 0, 0); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T v, int d) {
    return emulated::exchange("__shfl_xor_sync", mask, v, (threadIdx.x & 31) ^ (unsigned)d);
}
template <typename T> static inline T __shfl_sync(unsigned mask, T v, int lane) {
    return emulated::exchange("__shfl_sync", mask, v, (unsigned)lane);
}
template <typename T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned d) {
    unsigned lane = threadIdx.x & 31;
    return emulated::exchange("__shfl_down_sync", mask, v, lane + d < 32 ? lane + d : lane);
}
template <typename T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned d) {
    unsigned lane = threadIdx.x & 31;
    return emulated::exchange("__shfl_up_sync", mask, v, lane >= d ? lane - d : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int v) {
    emulated::Fiber* me = emulated::now;
    unsigned turn = me->turn & 1, warp = me->id & ~31u, votes = 0;
    emulated::exchange("__ballot_sync", mask, (unsigned long long)(v != 0), 0);
    for (unsigned i = 0; i < 32; i++) votes |= (unsigned)(emulated::fibers[warp | i]->slot[turn] != 0) << i;
    return votes;
}
static inline int __any_sync(unsigned mask, int v) { return __ballot_sync(mask, v) != 0; }
static inline int __all_sync(unsigned mask, int v) { return __ballot_sync(mask, v) == mask; }

template <typename To, typename From> static inline To bits_as(From v) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}
static inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
static inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
static inline float __int_as_float(int v) { return bits_as<float>(v); }
static inline int __float_as_int(float v) { return bits_as<int>(v); }
static inline double __longlong_as_double(long long v) { return bits_as<double>(v); }
static inline long long __double_as_longlong(double v) { return bits_as<long long>(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline float rsqrtf(float v) { return 1 / sqrtf(v); }
static inline double rsqrt(double v) { return 1 / sqrt(v); }
template <typename T> static inline T __ldg(const T* p) { return *p; }
template <typename T> static inline T __ldcg(const T* p) { return *p; }
template <typename T> static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> static inline T max(T a, T b) { return a < b ? b : a; }
template <typename T> static inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <typename T> static inline T atomicMax(T* p, T v) { T old = *p; *p = old < v ? v : old; return old; }
template <typename T> static inline T atomicMin(T* p, T v) { T old = *p; *p = v < old ? v : old; return old; }
template <typename T> static inline T atomicOr(T* p, T v) { T old = *p; *p = old | v; return old; }
template <typename T> static inline T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
template <typename T> static inline T atomicCAS(T* p, T expected, T v) { T old = *p; if (old == expected) *p = v; return old; }
