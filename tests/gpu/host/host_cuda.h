// CUDA C as C++ on the CPU, for tests: one block at a time, its threads as fibers that change places at barriers and
// shuffles. A kernel that has neither runs as a plain loop over its threads.
//
// Found are: a barrier or shuffle that some threads do not reach, threads at different ones, a sum over threads that
// have ended, memory shared by a block that is read before it is written (it holds NaN), and results that depend on the
// order of threads or blocks (a seed shuffles both).
#pragma once
#include <math.h>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __global__ __attribute__((visibility("hidden")))
#define __device__ static
#define __constant__ static const
#define __shared__ static __attribute__((section("gpushared")))
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static dim3 gridDim, blockDim, blockIdx, threadIdx;
extern "C" char __start_gpushared[] __attribute__((weak)), __stop_gpushared[] __attribute__((weak));

namespace emulated {
enum { RUNS, BARRIER, SHUFFLE };
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool begun, done;
    unsigned id, waits, turn;
    const char* place;      // the kind of barrier or shuffle at which it waits
    unsigned long long slot[2];  // what it gives to a shuffle: alternating, as others may read the last one still
    char* stack;
};
static const size_t STACK = (1 << 15) + 448;  // no power of two: or all stacks would want the same lines of the cache
static std::vector<Fiber*> fibers;
static Fiber* now;
static jmp_buf scheduler;
static const std::function<void()>* body;
static unsigned long long state;  // of the order; 0: as the threads are numbered
static char message[256];

static unsigned random_below(unsigned n) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((state >> 33) % n);
}
static void shuffle(std::vector<unsigned>& order) {
    for (size_t i = order.size(); state && i > 1; i--) std::swap(order[i - 1], order[random_below((unsigned)i)]);
}
static void fail(const char* what) {
    if (!message[0]) snprintf(message, sizeof message, "%s (block %u %u)", what, blockIdx.x, blockIdx.y);
}
static void entry() {
    for (;;) {
        (*body)();
        now->done = true;
        if (!_setjmp(now->at)) _longjmp(scheduler, 1);
    }
}
static void resume(Fiber* fiber) {
    now = fiber;
    threadIdx = {fiber->id, 0, 0};
    if (_setjmp(scheduler)) return;
    if (fiber->begun) _longjmp(fiber->at, 1);
    fiber->begun = true;
    setcontext(&fiber->start);
}
static void wait(unsigned what, const char* place) {
    now->waits = what;
    now->place = place;
    if (!_setjmp(now->at)) _longjmp(scheduler, 1);
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
        if (fiber->begun) continue;  // it stands behind its last body
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = fiber->stack;
        fiber->start.uc_stack.ss_size = STACK;
        fiber->start.uc_link = nullptr;
        makecontext(&fiber->start, entry, 0);
    }
}
// Lets those go on that have all come to one place: true if there are any.
static bool release(unsigned threads) {
    bool freed = false;
    unsigned done = 0, waiting = 0;
    for (unsigned w = 0; w < threads; w += 32) {
        unsigned end = w + 32 < threads ? w + 32 : threads, here = 0;
        for (unsigned i = w; i < end; i++) {
            done += fibers[i]->done;
            waiting += !fibers[i]->done && fibers[i]->waits == BARRIER;
            here += !fibers[i]->done && fibers[i]->waits == SHUFFLE;
        }
        if (here != 32) continue;
        for (unsigned i = w; i < end; i++) {
            if (fibers[i]->place != fibers[w]->place) fail("threads of a warp are at different shuffles");
            fibers[i]->waits = RUNS;
        }
        freed = true;
    }
    if (waiting && waiting == threads) {
        for (unsigned i = 0; i < threads; i++) fibers[i]->waits = RUNS;
        freed = true;
    } else if (!freed && done != threads) {
        fail(waiting + done < threads ? "some threads of a warp are not at its shuffle"
                                      : "some threads have ended, others wait at __syncthreads");
    }
    return freed;
}
static void run_block(unsigned threads, std::vector<unsigned>& order) {
    if (__start_gpushared) memset(__start_gpushared, 0xFF, (size_t)(__stop_gpushared - __start_gpushared));  // NaN
    prepare(threads);
    do {
        shuffle(order);
        for (unsigned i : order)
            if (!fibers[i]->done && fibers[i]->waits == RUNS) {
                resume(fibers[i]);
                if (message[0]) return;
            }
    } while (release(threads) && !message[0]);
}
static std::vector<unsigned> numbers(unsigned count) {
    std::vector<unsigned> all(count);
    for (unsigned i = 0; i < count; i++) all[i] = i;
    return all;
}
static const char* begin(unsigned gx, unsigned gy, unsigned threads, unsigned long long seed) {
    gridDim = {gx, gy, 1};
    blockDim = {threads, 1, 1};
    state = seed;
    message[0] = 0;
    if (!threads || threads > 1024 || threads % 32 || gy > 65535) fail("a launch of a size that no GPU takes");
    return message[0] ? message : nullptr;
}
// The threads of a kernel that waits for others.
static const char* run(unsigned gx, unsigned gy, unsigned threads, unsigned long long seed,
                       const std::function<void()>& kernel) {
    if (begin(gx, gy, threads, seed)) return message;
    body = &kernel;
    std::vector<unsigned> blocks = numbers(gx * gy), order = numbers(threads);
    shuffle(blocks);
    for (unsigned b : blocks) {
        blockIdx = {b % gx, b / gx, 0};
        run_block(threads, order);
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
