// The GPU's kernels: every pass over arrays that device.ops names and no library has.
//
// Plain CUDA C++17. NVRTC compiles it for the GPU, once for each REAL (float, double, bf16); g++ compiles it for tests
// (tests/gpu/host). Launchers parse the signatures of the extern "C" functions: scalars are i64, int, u32, u64, bool or
// double, pointers are to these, u8, u16, float, REAL, WORK or void.
//
// - Arithmetic is in WORK: float, or double where REAL is double. A double argument is rounded to it first, as NumPy
//   rounds a Python float. What works element by element does the same operations in the same order as device/cpu, so
//   that both give the same bits; --fmad=false keeps the compiler from fusing them.
// - Sums over many elements are in double, and in an order that depends on the sizes alone, and on whether arrays begin at
//   multiples of 16 bytes: the same bits in every run and on every GPU.
// - Blocks have a multiple of 32 threads. __syncthreads and shuffles are reached by all threads of a block or warp.
// - Nothing that changes from step to step is an argument: a captured graph would freeze it. It lies in memory.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
struct bf16 { u16 bits; };

template <typename T> struct Work { typedef float type; };
template <> struct Work<double> { typedef double type; };
typedef Work<REAL>::type WORK;

// ---- Framework: elements, loops, sums, random numbers ---------------------------------------------------------------

__device__ inline float bf16_value(u16 bits) { return __uint_as_float((u32)bits << 16); }
__device__ inline u16 bf16_bits(float v) {  // the nearest, ties to even; NaN stays NaN
    u32 u = __float_as_uint(v);
    return (u & 0x7fffffffu) > 0x7f800000u ? u16(u >> 16 | 64) : u16((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

__device__ inline float get(const float* p, i64 i) { return p[i]; }
__device__ inline double get(const double* p, i64 i) { return p[i]; }
__device__ inline float get(const bf16* p, i64 i) { return bf16_value(p[i].bits); }
__device__ inline float get(const bool* p, i64 i) { return p[i]; }
__device__ inline void put(float* p, i64 i, float v) { p[i] = v; }
__device__ inline void put(double* p, i64 i, double v) { p[i] = v; }
__device__ inline void put(bf16* p, i64 i, float v) { p[i].bits = bf16_bits(v); }

// A loop over n elements by all threads of the grid.
#define GRID_STRIDE(i, n) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (i64)gridDim.x * blockDim.x)

// Kernels that work element by element take PACK neighbours at a time where the arrays' addresses allow: loads and stores
// of 16 bytes, as many in flight as a GPU's memory needs for its full rate. In: read; Out: written; InOut: both. An array
// may be null: its numbers are read as 0, and not written.
const int PACK = 16 / sizeof(REAL);
template <typename T> struct alignas(sizeof(T) * PACK < 16 ? sizeof(T) * PACK : 16) Pack { T element[PACK]; };
template <typename T> struct In { const T* p; typename Work<T>::type v[PACK]; };
template <typename T> struct Out { T* p; typename Work<T>::type v[PACK]; };
template <typename T> struct InOut { T* p; typename Work<T>::type v[PACK]; };
template <typename T> In(const T*) -> In<T>;
template <typename T> Out(T*) -> Out<T>;
template <typename T> InOut(T*) -> InOut<T>;

template <typename A> __device__ inline bool aligned(const A& a) { return ((u64)a.p & 15) == 0; }

template <typename T, typename V> __device__ inline void read_pack(const T* p, V* v, i64 k) {
    Pack<T> pack = {};
    if (p) pack = ((const Pack<T>*)p)[k];
#pragma unroll
    for (int j = 0; j < PACK; j++) v[j] = get(pack.element, j);
}
template <typename T, typename V> __device__ inline void write_pack(T* p, const V* v, i64 k) {
    if (!p) return;
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < PACK; j++) put(pack.element, j, v[j]);
    ((Pack<T>*)p)[k] = pack;
}
template <typename T> __device__ inline void load(In<T>& a, i64 k) { read_pack(a.p, a.v, k); }
template <typename T> __device__ inline void load(Out<T>&, i64) {}
template <typename T> __device__ inline void load(InOut<T>& a, i64 k) { read_pack(a.p, a.v, k); }
template <typename T> __device__ inline void store(In<T>&, i64) {}
template <typename T> __device__ inline void store(Out<T>& a, i64 k) { write_pack(a.p, a.v, k); }
template <typename T> __device__ inline void store(InOut<T>& a, i64 k) { write_pack(a.p, a.v, k); }
template <typename T> __device__ inline void load_one(In<T>& a, i64 i) { a.v[0] = a.p ? get(a.p, i) : 0; }
template <typename T> __device__ inline void load_one(Out<T>&, i64) {}
template <typename T> __device__ inline void load_one(InOut<T>& a, i64 i) { a.v[0] = a.p ? get(a.p, i) : 0; }
template <typename T> __device__ inline void store_one(In<T>&, i64) {}
template <typename T> __device__ inline void store_one(Out<T>& a, i64 i) { if (a.p) put(a.p, i, a.v[0]); }
template <typename T> __device__ inline void store_one(InOut<T>& a, i64 i) { if (a.p) put(a.p, i, a.v[0]); }

// Calls f for each of n elements: with the number of an In, with a reference to the number of an Out or InOut.
template <typename F, typename... A> __device__ inline void each_element(i64 n, F f, A... a) {
    i64 packs = (aligned(a) && ...) ? n / PACK : 0, packed = packs * PACK;
    GRID_STRIDE(k, packs) {
        (load(a, k), ...);
#pragma unroll
        for (int j = 0; j < PACK; j++) f(a.v[j]...);
        (store(a, k), ...);
    }
    GRID_STRIDE(i, n - packed) {
        (load_one(a, packed + i), ...);
        f(a.v[0]...);
        (store_one(a, packed + i), ...);
    }
}

template <typename T> __device__ inline bool is_finite(T v) { return v - v == T(0); }

// The sum over the warp, which every thread gets.
template <typename T> __device__ inline T warp_sum(T v) {
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

// The sum over the block, which every thread gets.
template <typename T> __device__ inline T block_sum(T v) {
    __shared__ T part[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : T(0);
    v = warp_sum(v);
    __syncthreads();  // part may be written again
    return v;
}

// Whether this block is the last of so many to come here; it sees what all others have written before, if it reads that
// by __ldcg. `done` is 0 before the launch, and again after it.
__device__ inline bool last_block(u32* done, u32 blocks = gridDim.x) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(done, 1u) == blocks - 1;
        if (last) *done = 0;
    }
    __syncthreads();
    return last;
}

// The sum over the grid of each block's v (which all its threads have): in the last block's threads, where the result
// is true. `partial` has a number for each block.
__device__ inline bool grid_sum(double& v, double* partial, u32* done) {
    if (threadIdx.x == 0) partial[blockIdx.x] = v;
    if (!last_block(done)) return false;
    v = 0;
    for (u32 k = threadIdx.x; k < gridDim.x; k += blockDim.x) v += __ldcg(partial + k);
    v = block_sum(v);
    return true;
}

// The same for N numbers; `partial` has room for N of each block.
template <int N> __device__ inline bool grid_sums(double (&v)[N], double* partial, u32* done) {
    if (threadIdx.x == 0)
#pragma unroll
        for (int j = 0; j < N; j++) partial[N * blockIdx.x + j] = v[j];
    if (!last_block(done)) return false;
#pragma unroll
    for (int j = 0; j < N; j++) {
        v[j] = 0;
        for (u32 k = threadIdx.x; k < gridDim.x; k += blockDim.x) v[j] += __ldcg(partial + N * k + j);
        v[j] = block_sum(v[j]);
    }
    return true;
}

// SplitMix64's output function (Steele, Lea, Flood 2014).
__device__ inline u64 splitmix(u64 z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

// Elements of any type, by a code of its own (gpu/flat.py: TYPES).
enum { F32, F64, BF16, BOOL, U8, I8, I16, U16, I32, U32, I64 };
struct Number { bool whole; i64 i; double d; };

__device__ inline Number whole_number(i64 i) { return Number{true, i, 0.0}; }
__device__ inline Number number_at(const void* p, int type, i64 i) {
    switch (type) {
        case F32: return Number{false, 0, ((const float*)p)[i]};
        case F64: return Number{false, 0, ((const double*)p)[i]};
        case BF16: return Number{false, 0, bf16_value(((const u16*)p)[i])};
        case BOOL: case U8: return whole_number(((const u8*)p)[i]);
        case I8: return whole_number(((const signed char*)p)[i]);
        case I16: return whole_number(((const short*)p)[i]);
        case U16: return whole_number(((const u16*)p)[i]);
        case I32: return whole_number(((const int*)p)[i]);
        case U32: return whole_number(((const u32*)p)[i]);
        default: return whole_number(((const i64*)p)[i]);
    }
}
__device__ inline void put_number(void* p, int type, i64 i, Number v) {
    i64 whole = v.whole ? v.i : type >= BOOL ? (i64)v.d : 0;
    switch (type) {
        case F32: ((float*)p)[i] = v.whole ? (float)v.i : (float)v.d; break;
        case F64: ((double*)p)[i] = v.whole ? (double)v.i : v.d; break;
        case BF16: ((u16*)p)[i] = bf16_bits(v.whole ? (float)v.i : (float)v.d); break;
        case BOOL: ((u8*)p)[i] = v.whole ? v.i != 0 : v.d != 0; break;
        case U8: case I8: ((u8*)p)[i] = (u8)whole; break;
        case I16: case U16: ((u16*)p)[i] = (u16)whole; break;
        case I32: case U32: ((u32*)p)[i] = (u32)whole; break;
        default: ((i64*)p)[i] = whole;
    }
}

// Calls f(p0, p1, p2, p3) for the places of n elements in an array of four axes, sizes (any, s1, s2, s3), in C order.
template <typename I, typename F> __device__ inline void each_place_of(i64 n, I s1, I s2, I s3, F f) {
    GRID_STRIDE(i, n) {
        I rest = (I)i, p3 = rest % s3;
        rest /= s3;
        I p2 = rest % s2;
        rest /= s2;
        f((i64)(rest / s1), (i64)(rest % s1), (i64)p2, (i64)p3);
    }
}
template <typename F> __device__ inline void each_place(i64 n, i64 s1, i64 s2, i64 s3, F f) {
    if (n <= 0x7fffffff) each_place_of<u32>(n, (u32)s1, (u32)s2, (u32)s3, f);  // divides several times as fast
    else each_place_of<i64>(n, s1, s2, s3, f);
}

// Counters, as those of last_block, are 0 between launches.
extern "C" __global__ void clear_counters(u32* counters, i64 n) { GRID_STRIDE(i, n) counters[i] = 0; }

// ---- Flat arrays (device/gpu/flat.py) -------------------------------------------------------------------------------

// Views have four axes; strides are in elements, 0 along axes that are broadcast.
extern "C" __global__ void copy_view(void* out, const void* x, int bytes, i64 n, i64 s1, i64 s2, i64 s3, i64 o0, i64 o1,
                                     i64 o2, i64 o3, i64 x0, i64 x1, i64 x2, i64 x3) {
    each_place(n, s1, s2, s3, [=](i64 a, i64 b, i64 c, i64 d) {
        i64 to = a * o0 + b * o1 + c * o2 + d * o3, from = a * x0 + b * x1 + c * x2 + d * x3;
        switch (bytes) {
            case 1: ((u8*)out)[to] = ((const u8*)x)[from]; break;
            case 2: ((u16*)out)[to] = ((const u16*)x)[from]; break;
            case 4: ((u32*)out)[to] = ((const u32*)x)[from]; break;
            default: ((u64*)out)[to] = ((const u64*)x)[from];
        }
    });
}
extern "C" __global__ void convert_view(void* out, int out_type, const void* x, int x_type, i64 n, i64 s1, i64 s2,
                                        i64 s3, i64 o0, i64 o1, i64 o2, i64 o3, i64 x0, i64 x1, i64 x2, i64 x3) {
    each_place(n, s1, s2, s3, [=](i64 a, i64 b, i64 c, i64 d) {
        i64 to = a * o0 + b * o1 + c * o2 + d * o3, from = a * x0 + b * x1 + c * x2 + d * x3;
        put_number(out, out_type, to, number_at(x, x_type, from));
    });
}
extern "C" __global__ void fill_view(void* out, int type, double value, i64 n, i64 s1, i64 s2, i64 s3, i64 o0, i64 o1,
                                     i64 o2, i64 o3) {
    each_place(n, s1, s2, s3, [=](i64 a, i64 b, i64 c, i64 d) {
        put_number(out, type, a * o0 + b * o1 + c * o2 + d * o3, Number{false, 0, value});
    });
}

enum { ADD, SUBTRACT, MULTIPLY };
__device__ inline WORK combined(WORK a, WORK b, int kind) { return kind == ADD ? a + b : kind == SUBTRACT ? a - b : a * b; }

extern "C" __global__ void combine(REAL* out, const REAL* a, const REAL* b, int kind, i64 n) {
    each_element(n, [=](WORK v, WORK w, WORK& sum) { sum = combined(v, w, kind); }, In{a}, In{b}, Out{out});
}
extern "C" __global__ void combine_view(REAL* out, const REAL* a, const REAL* b, int kind, i64 n, i64 s1, i64 s2,
                                        i64 s3, i64 o0, i64 o1, i64 o2, i64 o3, i64 a0, i64 a1, i64 a2, i64 a3, i64 b0,
                                        i64 b1, i64 b2, i64 b3) {
    each_place(n, s1, s2, s3, [=](i64 p, i64 q, i64 r, i64 s) {
        WORK v = combined(get(a, p * a0 + q * a1 + r * a2 + s * a3), get(b, p * b0 + q * b1 + r * b2 + s * b3), kind);
        put(out, p * o0 + q * o1 + r * o2 + s * o3, v);
    });
}
extern "C" __global__ void scale(REAL* x, double factor, i64 n) {
    each_element(n, [f = (WORK)factor](WORK& v) { v = v * f; }, InOut{x});
}
extern "C" __global__ void divide(REAL* x, double divisor, i64 n) {
    each_element(n, [d = (WORK)divisor](WORK& v) { v = v / d; }, InOut{x});
}
extern "C" __global__ void store_double(REAL* out, const double* x, bool accumulate, i64 n) {
    each_element(n, [=](WORK& v, double d) { v = (WORK)(accumulate ? (double)v + d : d); }, InOut{out}, In{x});
}
extern "C" __global__ void from_float(REAL* out, const float* x, i64 n) {
    each_element(n, [](WORK& v, float w) { v = w; }, Out{out}, In{x});
}
extern "C" __global__ void to_float(float* out, const REAL* x, i64 n) {
    each_element(n, [](float& w, WORK v) { w = (float)v; }, Out{out}, In{x});
}
extern "C" __global__ void move(REAL* x, double share, const REAL* towards, const REAL* origin, i64 n) {
    each_element(n, [=, s = (WORK)share](WORK& v, WORK to, WORK from) { v = v + (to - (origin ? from : v)) * s; },
                 InOut{x}, In{towards}, In{origin});
}
extern "C" __global__ void withhold(REAL* x, const REAL* before, REAL* kept, double part, i64 n) {
    each_element(n, [p = (WORK)part](WORK& v, WORK old, WORK& held) {
        WORK change = (v - old) * p;
        v = v - change;
        held = held + change;
    }, InOut{x}, In{before}, InOut{kept});
}
extern "C" __global__ void sum_of_squares(const REAL* x, double* total, double* partial, u32* done, i64 n) {
    double sum = 0;
    each_element(n, [&](WORK v) { sum += (double)v * (double)v; }, In{x});
    sum = block_sum(sum);
    if (grid_sum(sum, partial, done) && threadIdx.x == 0) total[0] += sum;
}
extern "C" __global__ void count_nonfinite(const REAL* y, double* count, const double* step, double* partial, u32* done,
                                           i64 n) {
    double sum = 0;
    each_element(n, [&](WORK v) { sum += v; }, In{y});
    sum = block_sum(sum);
    if (grid_sum(sum, partial, done) && threadIdx.x == 0 && !is_finite((WORK)sum)) {
        if (count[0] == 0) count[1] = step[0];
        count[0] += 1;
    }
}
extern "C" __global__ void find_nonfinite(const REAL* x, double* found, i64 n) {
    each_element(n, [=](WORK v) { if (!is_finite(v)) found[0] = 1; }, In{x});  // all who write write the same
}
extern "C" __global__ void find_number(const REAL* x, double* found, i64 n) {
    each_element(n, [=](WORK v) { if (v == v) found[0] = 1; }, In{x});
}
extern "C" __global__ void increase(void* x, int type, double by) {
    if (threadIdx.x != 0) return;
    double v = number_at(x, type, 0).d;
    put_number(x, type, 0, Number{false, 0, type == F64 ? v + by : (float)v + (float)by});
}
extern "C" __global__ void clip_scale(const double* total, double limit, double* scale) {
    double s = limit / (sqrt(total[0]) + 1e-6);
    if (threadIdx.x == 0) scale[0] = s > 1 ? 1 : s;  // nan stays nan
}

// ---- Activations (device/gpu/elementwise.py) ------------------------------------------------------------------------

// y may be x. Where NumPy multiplies by a mask, so do these: NaN and infinity come through.
extern "C" __global__ void relu(const REAL* x, REAL* y, i64 n) {
    each_element(n, [](WORK v, WORK& w) { w = v < 0 ? WORK(0) : v; }, In{x}, Out{y});
}
extern "C" __global__ void relu_grad(const REAL* y, REAL* dy, i64 n) {
    each_element(n, [](WORK v, WORK& d) { d = d * (v > 0 ? WORK(1) : WORK(0)); }, In{y}, InOut{dy});
}
extern "C" __global__ void leaky_relu(const REAL* x, REAL* y, double slope, i64 n) {
    each_element(n, [s = (WORK)slope](WORK v, WORK& w) { w = v >= v * s || v != v ? v : v * s; }, In{x}, Out{y});
}
extern "C" __global__ void leaky_relu_grad(const REAL* y, REAL* dy, double slope, i64 n) {
    WORK s = (WORK)slope, most = s > 1 ? s : WORK(1);
    each_element(n, [=](WORK v, WORK& d) { d = d * (v > 0 ? most : s); }, In{y}, InOut{dy});
}
extern "C" __global__ void sigmoid(const REAL* x, REAL* y, i64 n) {
    each_element(n, [](WORK v, WORK& w) { w = 1 / (exp(-v) + 1); }, In{x}, Out{y});
}
extern "C" __global__ void sigmoid_grad(const REAL* y, REAL* dy, i64 n) {
    each_element(n, [](WORK v, WORK& d) { d = d * ((1 - v) * v); }, In{y}, InOut{dy});
}
extern "C" __global__ void tanh_forward(const REAL* x, REAL* y, i64 n) {
    each_element(n, [](WORK v, WORK& w) { w = tanh(v); }, In{x}, Out{y});
}
extern "C" __global__ void tanh_grad(const REAL* y, REAL* dy, i64 n) {
    each_element(n, [](WORK v, WORK& d) { d = d * (1 - v * v); }, In{y}, InOut{dy});
}
extern "C" __global__ void gelu(const REAL* x, REAL* y, REAL* slope, i64 n) {
    each_element(n, [=](WORK v, WORK& w, WORK& derivative) {
        WORK cdf = erfc(v * WORK(-0.70710678118654752440)) * WORK(0.5);
        w = v * cdf;
        if (slope) derivative = exp(v * v * WORK(-0.5)) * WORK(0.39894228040143267794) * v + cdf;
    }, In{x}, Out{y}, Out{slope});
}

// ---- Losses (device/gpu/criteria.py) --------------------------------------------------------------------------------

// A warp's first place of the largest of x (NaN is larger than all), as numpy.argmax has it; `most` is its value.
__device__ inline bool beats(WORK v, i64 at, WORK most, i64 where) {
    if (v != v) return most == most || at < where;
    return most == most && (v > most || (v == most && at < where));
}
__device__ inline i64 warp_argmax(const REAL* x, i64 count, WORK& most) {
    i64 where = 0x7fffffffffffffff;
    most = -(WORK)__int_as_float(0x7f800000);
    for (i64 o = threadIdx.x % 32; o < count; o += 32) {
        WORK v = get(x, o);
        if (beats(v, o, most, where)) { most = v; where = o; }
    }
    for (int d = 16; d; d >>= 1) {
        WORK v = __shfl_xor_sync(0xffffffffu, most, d);
        i64 at = __shfl_xor_sync(0xffffffffu, where, d);
        if (beats(v, at, most, where)) { most = v; where = at; }
    }
    return where;
}
// A loop over rows, a warp for each.
#define WARP_ROWS(row, rows) \
    for (i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < (rows); \
         row += (i64)gridDim.x * (blockDim.x / 32))

// The loss of a row is -own * log p[label] - smooth * sum(w * log p), where own = share * w[label] and w are the weights
// of the classes; without them all w are 1, and so is own + smooth * sum(w).
extern "C" __global__ void cross_entropy(const REAL* y, const void* labels, int label_type, REAL* dy, double* metrics,
                                         const WORK* weights, const double* total, double* partial, u32* done,
                                         double smooth, double share, i64 rows, i64 outputs) {
    int lane = threadIdx.x % 32;
    double sums[3] = {0, 0, 0};  // losses, correct rows, weights of the labels less 1
    WORK smooth_part = (WORK)smooth, count = (WORK)total[0], smooth_move = (WORK)(smooth / total[0]);
    double weight = 0;
    if (weights) {
        for (i64 o = lane; o < outputs; o += 32) weight += (double)weights[o];
        weight = warp_sum(weight);
    }
    WARP_ROWS(row, rows) {
        const REAL* x = y + row * outputs;
        i64 label = number_at(labels, label_type, row).i;
        WORK most, exps = 0, moves = 0;
        i64 where = warp_argmax(x, outputs, most);
        for (i64 o = lane; o < outputs; o += 32) {
            WORK moved = get(x, o) - most;
            moves += weights ? weights[o] * moved : moved;
            exps += exp(moved);
        }
        exps = warp_sum(exps);
        moves = warp_sum(moves);
        i64 place = label < 0 ? 0 : label < outputs ? label : outputs - 1;
        WORK own = weights ? weights[place] * (WORK)share : (WORK)share;
        WORK whole = weights ? own + (WORK)(smooth * weight) : WORK(1);
        if (lane == 0) {
            sums[0] += whole * log(exps) - (own * (get(x, place) - most) + smooth_part * moves);
            sums[1] += where == label;
            sums[2] += weights ? (double)weights[place] - 1 : 0;
        }
        if (dy)
            for (i64 o = lane; o < outputs; o += 32) {
                WORK move = exp(get(x, o) - most) / (exps * count) * whole;
                move = move - (weights ? weights[o] * smooth_move : smooth_move);
                put(dy + row * outputs, o, o == place ? move - own / count : move);
            }
    }
#pragma unroll
    for (int j = 0; j < 3; j++) sums[j] = block_sum(sums[j]);
    if (grid_sums(sums, partial, done) && threadIdx.x == 0) {
        metrics[0] += sums[0];
        metrics[1] += sums[1];
        if (weights) metrics[4] += sums[2];
    }
}
extern "C" __global__ void count_right(const REAL* y, const void* labels, int label_type, double* metrics,
                                       double* partial, u32* done, i64 rows, i64 outputs) {
    double right = 0;
    WARP_ROWS(row, rows) {
        WORK most;
        i64 where = warp_argmax(y + row * outputs, outputs, most);
        if (threadIdx.x % 32 == 0) right += where == number_at(labels, label_type, row).i;
    }
    right = block_sum(right);
    if (grid_sum(right, partial, done) && threadIdx.x == 0) metrics[1] += right;
}
extern "C" __global__ void binary_cross_entropy(const REAL* y, const REAL* wanted, REAL* dy, double* metrics,
                                                const double* total, double* partial, u32* done, double share, i64 n,
                                                i64 outputs) {
    double loss = 0;
    each_element(n, [&, factor = (WORK)(share / (outputs * total[0]))](WORK v, WORK t, WORK& d) {
        WORK e = exp(v < 0 ? v : -v);  // exp(-|v|)
        WORK below = v >= 0 ? WORK(0) : v;  // min(v, 0), NaN for NaN: sigmoid(v) = exp(min(v, 0)) / (1 + exp(-|v|))
        if (dy) d = (exp(below) / (e + 1) - t) * factor;
        loss += log1p(e) + (v <= 0 ? WORK(0) : v) - t * v;
    }, In{y}, In{wanted}, Out{dy});
    loss = block_sum(loss);
    if (grid_sum(loss, partial, done) && threadIdx.x == 0) metrics[0] += loss / outputs;
}
extern "C" __global__ void squared_error(const REAL* y, const REAL* wanted, REAL* dy, double* metrics,
                                         const double* total, double* partial, u32* done, double share, i64 n,
                                         i64 outputs) {
    double loss = 0;
    each_element(n, [&, factor = (WORK)(share / (outputs * total[0]))](WORK v, WORK t, WORK& d) {
        WORK error = v - t;
        loss += (double)error * (double)error;
        d = error * factor;
    }, In{y}, In{wanted}, Out{dy});
    loss = block_sum(loss);
    if (grid_sum(loss, partial, done) && threadIdx.x == 0) metrics[0] += loss / outputs;
}
extern "C" __global__ void one_hot(const void* labels, int label_type, REAL* out, i64 n, i64 outputs) {
    GRID_STRIDE(i, n) {
        i64 row = i / outputs;
        put(out, i, number_at(labels, label_type, row).i == i - row * outputs ? WORK(1) : WORK(0));
    }
}
extern "C" __global__ void count_same_side(const REAL* y, const REAL* wanted, double* metrics, double* partial,
                                           u32* done, i64 n) {
    double same = 0;
    each_element(n, [&](WORK v, WORK t) { same += (v > 0) == (t > WORK(0.5)); }, In{y}, In{wanted});
    same = block_sum(same);
    if (grid_sum(same, partial, done) && threadIdx.x == 0) metrics[1] += same;
}

// ---- Optimizers (device/gpu/updates.py) -----------------------------------------------------------------------------

// The gradients that an update works with are scale * g + decay * p.
struct Gradient {
    WORK scale, decay;
};
__device__ inline Gradient gradient_of(const double* scale, double decay) {
    return Gradient{scale ? (WORK)scale[0] : WORK(1), (WORK)decay};
}
__device__ inline WORK gradient(Gradient with, WORK p, WORK g) {
    WORK d = g * with.scale;
    return with.decay != 0 ? d + p * with.decay : d;
}

extern "C" __global__ void sgd(WORK* p, const REAL* g, const double* numbers, const double* scale, double decay, i64 n) {
    Gradient with = gradient_of(scale, decay);
    WORK rate = (WORK)numbers[0];
    each_element(n, [=](WORK& w, WORK d) { w = w - gradient(with, w, d) * rate; }, InOut{p}, In{g});
}
extern "C" __global__ void momentum(WORK* p, const REAL* g, WORK* b, const double* numbers, bool nesterov,
                                    const double* scale, double decay, i64 n) {
    Gradient with = gradient_of(scale, decay);
    WORK rate = (WORK)numbers[0], beta = (WORK)numbers[1], share = (WORK)numbers[2], ahead = (WORK)numbers[3];
    each_element(n, [=](WORK& w, WORK d, WORK& moved) {
        d = gradient(with, w, d);
        moved = moved * beta + d * share;
        w = w - (nesterov ? d + moved * ahead : moved) * rate;
    }, InOut{p}, In{g}, InOut{b});
}
extern "C" __global__ void adagrad(WORK* p, const REAL* g, WORK* s, const double* numbers, double eps,
                                   const double* scale, double decay, i64 n) {
    Gradient with = gradient_of(scale, decay);
    WORK rate = (WORK)numbers[0], least = (WORK)eps;
    each_element(n, [=](WORK& w, WORK d, WORK& squares) {
        d = gradient(with, w, d);
        squares = squares + d * d;
        w = w - d / (sqrt(squares) + least) * rate;
    }, InOut{p}, In{g}, InOut{s});
}
// a and b may be null.
extern "C" __global__ void rmsprop(WORK* p, const REAL* g, WORK* s, WORK* a, WORK* b, const double* numbers,
                                   double alpha, double eps, double beta, const double* scale, double decay, i64 n) {
    Gradient with = gradient_of(scale, decay);
    WORK rate = (WORK)numbers[0], keep = (WORK)alpha, rest = (WORK)(1 - alpha), least = (WORK)eps, again = (WORK)beta;
    each_element(n, [=](WORK& w, WORK d, WORK& squares, WORK& mean, WORK& moved) {
        d = gradient(with, w, d);
        squares = squares * keep + d * d * rest;
        WORK variance = squares;
        if (a) {
            mean = mean + (d - mean) * rest;
            variance = squares - mean * mean;
        }
        d = d / (sqrt(variance) + least);
        if (b) d = moved = moved * again + d;
        w = w - d * rate;
    }, InOut{p}, In{g}, InOut{s}, InOut{a}, InOut{b});
}
extern "C" __global__ void adam(WORK* p, const REAL* g, WORK* m, WORK* v, const double* numbers, double rest1, double b2,
                                double rest2, const double* scale, double decay, i64 n) {
    Gradient with = gradient_of(scale, decay);
    WORK rate = (WORK)numbers[0], eps = (WORK)numbers[1], shrink = (WORK)numbers[2];
    WORK first = (WORK)rest1, keep = (WORK)b2, second = (WORK)rest2;
    each_element(n, [=](WORK& w, WORK d, WORK& mean, WORK& squares) {
        d = gradient(with, w, d);
        mean = mean + (d - mean) * first;
        squares = squares * keep + d * d * second;
        w = w * shrink - mean / (sqrt(squares) + eps) * rate;
    }, InOut{p}, In{g}, InOut{m}, InOut{v});
}

// ---- Norms (device/gpu/norms.py) ------------------------------------------------------------------------------------

// An array is a matrix of rows (and positions) x c channels. Where threads need numbers of their channel, a block works
// on a tile: `wide` neighbouring channels, of as many rows at a time (lanes) as it has threads for. So neighbouring
// threads read neighbouring memory whatever c is, and a thread keeps its channel. grid.x counts the tiles from left to
// right; grid.y cuts the rows into chunks. Both follow from the sizes alone.
struct Tile { i64 first, stop, column; int wide, lanes, lane; bool on; };

__device__ inline Tile tile_of(i64 rows, i64 c, int wide, int chunk, int chunks) {
    Tile t;
    i64 each = (rows + chunks - 1) / chunks;
    t.first = min(each * chunk, rows);
    t.stop = min(t.first + each, rows);
    t.wide = wide;
    t.lanes = (int)blockDim.x / wide;
    t.lane = (int)threadIdx.x / wide;
    t.column = (i64)blockIdx.x * wide + (int)threadIdx.x % wide;
    t.on = t.lane < t.lanes && t.column < c;
    return t;
}
#define TILE_ROWS(row, t) for (i64 row = (t).first + (t).lane; row < (t).stop; row += (t).lanes)

// v[k] <- what `term(row, element, part)` adds to part[k], over this thread's rows. Eight of them are added up in WORK.
template <int K, typename Term>
__device__ inline void add_rows(const Tile& t, i64 c, double* v, const Term& term) {
    for (int k = 0; k < K; k++) v[k] = 0;
    if (!t.on) return;
    i64 row = t.first + t.lane;
    for (; row + 7ll * t.lanes < t.stop; row += 8ll * t.lanes) {
        WORK part[K] = {};
#pragma unroll
        for (int u = 0; u < 8; u++) {
            i64 r = row + u * t.lanes;
            term(r, r * c + t.column, part);
        }
        for (int k = 0; k < K; k++) v[k] += part[k];
    }
    for (; row < t.stop; row += t.lanes) {
        WORK part[K] = {};
        term(row, row * c + t.column, part);
        for (int k = 0; k < K; k++) v[k] += part[k];
    }
}
// v[k] <- the sum over the lanes of each column: in lane 0. `shared` has K * blockDim.x elements.
template <int K> __device__ inline void add_lanes(const Tile& t, double* v, double* shared) {
    for (int k = 0; k < K; k++) shared[k * blockDim.x + threadIdx.x] = v[k];
    __syncthreads();
    int half = 1;
    while (half < t.lanes) half *= 2;
    for (half /= 2; half; half /= 2) {
        if (t.lane < half && t.lane + half < t.lanes)
            for (int k = 0; k < K; k++) {
                double* mine = shared + k * blockDim.x + threadIdx.x;
                *mine += mine[half * t.wide];
            }
        __syncthreads();
    }
    for (int k = 0; k < K; k++) v[k] = shared[k * blockDim.x + threadIdx.x];
    __syncthreads();  // shared may be written again
}
// Adds up the chunks: whether this thread now has the sums v of its column over all rows. One thread of the block that
// comes last has. `partial` has K * c numbers for each chunk, `done` one for each tile.
template <int K>
__device__ inline bool add_chunks(const Tile& t, i64 c, double* v, double* partial, u32* done, double* shared) {
    add_lanes<K>(t, v, shared);
    if (gridDim.y > 1) {
        if (t.on && t.lane == 0)
            for (int k = 0; k < K; k++) partial[((i64)blockIdx.y * K + k) * c + t.column] = v[k];
        if (!last_block(done + blockIdx.x, gridDim.y)) return false;
        for (int k = 0; k < K; k++) v[k] = 0;
        if (t.on) {
#pragma unroll 8
            for (int chunk = t.lane; chunk < (int)gridDim.y; chunk += t.lanes)
                for (int k = 0; k < K; k++) v[k] += __ldcg(partial + ((i64)chunk * K + k) * c + t.column);
        }
        add_lanes<K>(t, v, shared);
    }
    return t.on && t.lane == 0;
}
// Statistics have a type of their own, told by the bytes of an element: 8 (double), 4 (float) or 2 (bf16).
__device__ inline double stat_at(const void* p, int bytes, i64 i) {
    return bytes == 8 ? ((const double*)p)[i] : bytes == 4 ? ((const float*)p)[i] : get((const bf16*)p, i);
}
__device__ inline void put_stat(void* p, int bytes, i64 i, double v) {
    if (bytes == 8) ((double*)p)[i] = v;
    else if (bytes == 4) ((float*)p)[i] = (float)v;
    else put((bf16*)p, i, (float)v);
}

extern "C" __global__ void sum_rows(const REAL* x, void* out, int bytes, bool accumulate, double* partial, u32* done,
                                    i64 rows, i64 c, int wide) {
    __shared__ double shared[512];
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    double v[1];
    add_rows<1>(t, c, v, [=](i64, i64 i, WORK* part) { part[0] += get(x, i); });
    if (add_chunks<1>(t, c, v, partial, done, shared))
        put_stat(out, bytes, t.column, accumulate ? stat_at(out, bytes, t.column) + v[0] : v[0]);
}
// dy <- dy where y > 0, elsewhere 0, as relu_grad has it; out <- the sums of that, as sum_rows has them. Eight rows are
// read before the first one is written, so that all reads are in flight together.
extern "C" __global__ void relu_grad_sum(const REAL* y, REAL* dy, void* out, int bytes, bool accumulate,
                                         double* partial, u32* done, i64 rows, i64 c, int wide) {
    __shared__ double shared[512];
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    double v[1] = {0};
    i64 row = t.on ? t.first + t.lane : t.stop;
    for (; row + 7ll * t.lanes < t.stop; row += 8ll * t.lanes) {
        WORK d[8], part = 0;
#pragma unroll
        for (int u = 0; u < 8; u++) {
            i64 i = (row + u * t.lanes) * c + t.column;
            d[u] = get(dy, i) * (get(y, i) > 0 ? WORK(1) : WORK(0));
        }
#pragma unroll
        for (int u = 0; u < 8; u++) {
            put(dy, (row + u * t.lanes) * c + t.column, d[u]);
            part += d[u];
        }
        v[0] += part;
    }
    for (; row < t.stop; row += t.lanes) {
        i64 i = row * c + t.column;
        WORK d = get(dy, i) * (get(y, i) > 0 ? WORK(1) : WORK(0));
        put(dy, i, d);
        v[0] += d;
    }
    if (add_chunks<1>(t, c, v, partial, done, shared))
        put_stat(out, bytes, t.column, accumulate ? stat_at(out, bytes, t.column) + v[0] : v[0]);
}
// moments has the number of rows, the sums over them (sum_rows wrote these), and gets the sums of squared deviations.
extern "C" __global__ void squared_deviations(const REAL* x, double* moments, double* partial, u32* done, i64 rows,
                                              i64 c, int wide) {
    __shared__ double shared[512];
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    WORK m = t.on && rows ? (WORK)(moments[1 + t.column] / rows) : WORK(0);
    double v[1];
    add_rows<1>(t, c, v, [=](i64, i64 i, WORK* part) {
        WORK d = get(x, i) - m;
        part[0] += d * d;
    });
    if (add_chunks<1>(t, c, v, partial, done, shared)) {
        moments[1 + c + t.column] = v[0];
        if (t.column == 0) moments[0] = (double)rows;
    }
}
// The moments of `members` parts of the rows become the statistics of all (merge_moments of device/cpu/norms.py).
extern "C" __global__ void merge_moments(const double* parts, double* mean, double* scale, REAL* running_mean,
                                         REAL* running_var, double momentum, double eps, i64 members, i64 c) {
    i64 each = 1 + 2 * c;
    GRID_STRIDE(i, c) {
        double count = 0, total = 0, squares = 0;
        for (i64 k = 0; k < members; k++) {
            const double* part = parts + k * each;
            count += part[0];
            total += part[1 + i];
            squares += part[1 + c + i];
        }
        double m = total / count;
        for (i64 k = 0; k < members; k++) {
            const double* part = parts + k * each;
            if (part[0] > 0) {
                double move = part[1 + i] / part[0] - m;
                squares += move * move * part[0];
            }
        }
        double variance = squares / count;
        mean[i] = m;
        scale[i] = 1 / sqrt(variance + eps);
        if (momentum != 0) {
            double r = get(running_mean, i), v = get(running_var, i);
            put(running_mean, i, (WORK)(r + (m - r) * momentum));
            put(running_var, i, (WORK)(v + (variance * (count / (count - 1)) - v) * momentum));
        }
    }
}
extern "C" __global__ void norm_sums(const REAL* x, const REAL* dy, const double* mean, const double* scale,
                                     double* sums, double* partial, u32* done, i64 rows, i64 c, int wide) {
    __shared__ double shared[1024];
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    WORK m = t.on ? (WORK)mean[t.column] : WORK(0);
    double v[2];
    add_rows<2>(t, c, v, [=](i64, i64 i, WORK* part) {
        WORK d = get(dy, i);
        part[0] += (get(x, i) - m) * d;
        part[1] += d;
    });
    if (add_chunks<2>(t, c, v, partial, done, shared)) {
        sums[t.column] = v[0] * scale[t.column];
        sums[c + t.column] = v[1];
    }
}
extern "C" __global__ void normalize(const REAL* x, const double* mean, const double* scale, const REAL* weight,
                                     const REAL* bias, REAL* y, i64 rows, i64 c, int wide) {
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    if (!t.on) return;
    WORK m = (WORK)mean[t.column], shift = get(bias, t.column);
    WORK factor = (WORK)(get(weight, t.column) * scale[t.column]);
#pragma unroll 4
    TILE_ROWS(row, t) {
        i64 i = row * c + t.column;
        put(y, i, (get(x, i) - m) * factor + shift);
    }
}
// share is -1 / count, or 0: then the mean and the scale are constants.
extern "C" __global__ void norm_grad(const REAL* x, REAL* dy, const double* mean, const double* scale,
                                     const REAL* weight, const double* sums, double share, i64 rows, i64 c, int wide) {
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    if (!t.on) return;
    WORK m = (WORK)mean[t.column], factor = (WORK)(get(weight, t.column) * scale[t.column]), slope = 0, shift = 0;
    if (share != 0) {
        slope = (WORK)(sums[t.column] * share * scale[t.column]);
        shift = (WORK)(sums[c + t.column] * share);
    }
#pragma unroll 4
    TILE_ROWS(row, t) {
        i64 i = row * c + t.column;
        put(dy, i, (get(dy, i) + ((get(x, i) - m) * slope + shift)) * factor);
    }
}
extern "C" __global__ void inverse_root(REAL* x, double eps, i64 n) {
    WORK e = (WORK)eps;
    GRID_STRIDE(i, n) put(x, i, 1 / sqrt(get(x, i) + e));
}

// Layer norm: a row is summed up by a team of threads, a warp, or a block where rows are long.
#define TEAM_ROWS(row, rows, team) \
    for (i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / (team); row < (rows); \
         row += (i64)gridDim.x * blockDim.x / (team))
__device__ inline WORK team_sum(WORK v, int team) { return team == 32 ? warp_sum(v) : block_sum(v); }

extern "C" __global__ void sum_features(const REAL* x, void* total, int bytes, i64 rows, i64 c, int team) {
    TEAM_ROWS(row, rows, team) {
        WORK sum = 0;
        for (i64 k = threadIdx.x % team; k < c; k += team) sum += get(x, row * c + k);
        sum = team_sum(sum, team);
        if (threadIdx.x % team == 0) put_stat(total, bytes, row, sum);
    }
}
extern "C" __global__ void center(const REAL* x, const void* mean, REAL* y, void* squares, int bytes, i64 rows, i64 c,
                                  int team) {
    TEAM_ROWS(row, rows, team) {
        WORK sum = 0, m = (WORK)stat_at(mean, bytes, row);
        for (i64 k = threadIdx.x % team; k < c; k += team) {
            WORK d = get(x, row * c + k) - m;
            put(y, row * c + k, d);
            sum += d * d;
        }
        sum = team_sum(sum, team);
        if (threadIdx.x % team == 0) put_stat(squares, bytes, row, sum);
    }
}
extern "C" __global__ void scale_features(REAL* y, const void* scale, int bytes, const REAL* weight, const REAL* bias,
                                          i64 rows, i64 c, int wide) {
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    if (!t.on) return;
    WORK factor = get(weight, t.column), shift = get(bias, t.column);
#pragma unroll 4
    TILE_ROWS(row, t) {
        i64 i = row * c + t.column;
        put(y, i, get(y, i) * (WORK)stat_at(scale, bytes, row) * factor + shift);
    }
}
// gradients (2, c) <- the sums over the rows of dy * xhat and of dy.
extern "C" __global__ void layer_norm_columns(const REAL* x, const REAL* dy, const void* mean, const void* scale,
                                              int bytes, void* gradients, int gradient_bytes, double* partial,
                                              u32* done, i64 rows, i64 c, int wide) {
    __shared__ double shared[1024];
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    double v[2];
    add_rows<2>(t, c, v, [=](i64 row, i64 i, WORK* part) {
        WORK d = get(dy, i), hat = (get(x, i) - (WORK)stat_at(mean, bytes, row)) * (WORK)stat_at(scale, bytes, row);
        part[0] += d * hat;
        part[1] += d;
    });
    if (add_chunks<2>(t, c, v, partial, done, shared)) {
        put_stat(gradients, gradient_bytes, t.column, v[0]);
        put_stat(gradients, gradient_bytes, c + t.column, v[1]);
    }
}
// dy <- weight * dy; sums (2, rows) <- the sums over the features of dy * xhat and of dy as it is then.
extern "C" __global__ void layer_norm_rows(const REAL* x, REAL* dy, const void* mean, const void* scale,
                                           const REAL* weight, void* sums, int bytes, i64 rows, i64 c, int team) {
    TEAM_ROWS(row, rows, team) {
        WORK products = 0, sum = 0, m = (WORK)stat_at(mean, bytes, row), s = (WORK)stat_at(scale, bytes, row);
        for (i64 k = threadIdx.x % team; k < c; k += team) {
            i64 i = row * c + k;
            WORK d = get(dy, i), w = get(weight, k), hat = (get(x, i) - m) * s;
            products += d * hat * w;
            d *= w;
            put(dy, i, d);
            sum += d;
        }
        products = team_sum(products, team);
        sum = team_sum(sum, team);
        if (threadIdx.x % team == 0) {
            put_stat(sums, bytes, row, products);
            put_stat(sums, bytes, rows + row, sum);
        }
    }
}
extern "C" __global__ void layer_norm_grad(const REAL* x, REAL* dy, const void* mean, const void* scale,
                                           const void* sums, int bytes, i64 rows, i64 c, int wide) {
    Tile t = tile_of(rows, c, wide, blockIdx.y, gridDim.y);
    if (!t.on) return;
#pragma unroll 4
    TILE_ROWS(row, t) {
        i64 i = row * c + t.column;
        WORK s = (WORK)stat_at(scale, bytes, row), hat = (get(x, i) - (WORK)stat_at(mean, bytes, row)) * s;
        hat = hat * (WORK)stat_at(sums, bytes, row) + (WORK)stat_at(sums, bytes, rows + row);
        put(dy, i, (get(dy, i) + hat) * s);
    }
}

// ---- Pools (device/gpu/pools.py) ------------------------------------------------------------------------------------

// grid.x covers the elements of an image, whose numbers fit into 32 bits, and grid.y the images.
#define EACH_OF_IMAGES(b, images, e, size) \
    for (i64 b = blockIdx.y; b < (images); b += gridDim.y) \
        for (u32 e = blockIdx.x * blockDim.x + threadIdx.x; e < (size); e += gridDim.x * blockDim.x)

// The winner is the number of a tap: in winner8 or winner32, or, if both are null, not wanted. With `relu` it is all
// ones if no number is above 0.
extern "C" __global__ void max_pool(const REAL* x, REAL* y, u8* winner8, u32* winner32, i64 images, int high, int wide,
                                    int c, int yh, int yw, int kh, int kw, int down, int across, bool relu) {
    EACH_OF_IMAGES(b, images, e, (u32)yh * yw * c) {
        u32 place = e / c, h = place / yw, w = place - h * yw;
        i64 from = ((b * high + (i64)h * down) * wide + (i64)w * across) * c + (e - place * c);
        i64 to = b * yh * yw * c + e;
        WORK best = get(x, from);
        u32 winner = relu && !(best > WORK(0)) ? ~0u : 0;
        if (relu && best < WORK(0)) best = 0;
        for (int p = 0; p < kh; p++)
            for (int q = p ? 0 : 1; q < kw; q++) {
                WORK v = get(x, from + ((i64)p * wide + q) * c);
                if (v > best) winner = p * kw + q;
                if (v > best || v != v) best = v;  // nothing is larger than NaN
            }
        put(y, to, best);
        if (winner8) winner8[to] = (u8)winner;
        if (winner32) winner32[to] = winner;
    }
}
// The sum of what each window that sees pixel (h, w) gives to it, in the order of the taps that do: share(window, tap).
template <typename Share>
__device__ inline WORK of_windows(int h, int w, int yh, int yw, int kh, int kw, int down, int across,
                                  const Share& share) {
    WORK sum = 0;
    for (int p = h % down; p < kh && p <= h; p += down)
        for (int q = w % across; q < kw && q <= w; q += across) {
            int up = (h - p) / down, left = (w - q) / across;
            if (up < yh && left < yw) sum += share(up * yw + left, p * kw + q);
        }
    return sum;
}
extern "C" __global__ void max_pool_grad(const REAL* dy, const u8* winner8, const u32* winner32, REAL* dx, i64 images,
                                         int high, int wide, int c, int yh, int yw, int kh, int kw, int down,
                                         int across) {
    EACH_OF_IMAGES(b, images, e, (u32)high * wide * c) {
        u32 place = e / c, h = place / wide, w = place - h * wide;
        i64 image = b * yh * yw * c + (e - place * c);
        auto share = [=](int window, int tap) {
            i64 i = image + (i64)window * c;
            return get(dy, i) * ((winner8 ? winner8[i] : winner32[i]) == (u32)tap ? WORK(1) : WORK(0));
        };
        put(dx, b * high * wide * c + e, of_windows(h, w, yh, yw, kh, kw, down, across, share));
    }
}
extern "C" __global__ void avg_pool(const REAL* x, REAL* y, double part, i64 images, int high, int wide, int c, int yh,
                                    int yw, int kh, int kw, int down, int across) {
    EACH_OF_IMAGES(b, images, e, (u32)yh * yw * c) {
        u32 place = e / c, h = place / yw, w = place - h * yw;
        i64 from = ((b * high + (i64)h * down) * wide + (i64)w * across) * c + (e - place * c);
        WORK sum = get(x, from);
        for (int p = 0; p < kh; p++)
            for (int q = p ? 0 : 1; q < kw; q++) sum += get(x, from + ((i64)p * wide + q) * c);
        put(y, b * yh * yw * c + e, sum * (WORK)part);
    }
}
extern "C" __global__ void avg_pool_grad(const REAL* dy, REAL* dx, double part, i64 images, int high, int wide, int c,
                                         int yh, int yw, int kh, int kw, int down, int across) {
    EACH_OF_IMAGES(b, images, e, (u32)high * wide * c) {
        u32 place = e / c, h = place / wide, w = place - h * wide;
        i64 image = b * yh * yw * c + (e - place * c);
        auto share = [=](int window, int) { return get(dy, image + (i64)window * c) * (WORK)part; };
        put(dx, b * high * wide * c + e, of_windows(h, w, yh, yw, kh, kw, down, across, share));
    }
}
extern "C" __global__ void global_avg_pool(const REAL* x, REAL* y, double part, i64 images, i64 area, i64 c, int wide) {
    __shared__ double shared[256];
    Tile t = tile_of(area, c, wide, 0, 1);
    for (i64 b = blockIdx.y; b < images; b += gridDim.y) {
        const REAL* image = x + b * area * c;
        double v[1];
        add_rows<1>(t, c, v, [=](i64, i64 i, WORK* sum) { sum[0] += get(image, i); });
        add_lanes<1>(t, v, shared);
        if (t.on && t.lane == 0) put(y, b * c + t.column, (WORK)v[0] * (WORK)part);
    }
}
extern "C" __global__ void global_avg_pool_grad(const REAL* dy, REAL* dx, double part, i64 images, int area, int c) {
    EACH_OF_IMAGES(b, images, e, (u32)area * c) put(dx, b * area * c + e, get(dy, b * c + e % (u32)c) * (WORK)part);
}

// ---- Dropout (device/gpu/masks.py) ----------------------------------------------------------------------------------

#define GOLDEN 0x9E3779B97F4A7C15ull

// keep (rows, features) <- whether the hash of (the step's key, the global row, the place's code) is at least the
// threshold: device/cpu/masks.py.
extern "C" __global__ void keep_mask(bool* keep, const u32* codes, const double* step, u64 key, i64 first_row, i64 rows,
                                     i64 features, int wide, u32 threshold) {
    __shared__ u64 keys[256];
    Tile t = tile_of(rows, features, wide, blockIdx.y, gridDim.y);
    u32 code = t.on ? codes[t.column] : 0;
    key = splitmix(key + GOLDEN * ((u64)step[0] + 1));
    for (i64 from = t.first; from < t.stop; from += 256) {
        i64 stop = min(from + 256, t.stop);
        for (i64 row = from + threadIdx.x; row < stop; row += blockDim.x)
            keys[row - from] = splitmix(key + GOLDEN * (u64)(first_row + row + 1));
        __syncthreads();
        for (i64 row = from + t.lane; t.on && row < stop; row += t.lanes) {
            u64 z = keys[row - from];
            u32 h = code ^ (u32)z;
            h = (h ^ h >> 16) * 0x7FEB352Du + (u32)(z >> 32);
            h = (h ^ h >> 15) * 0x846CA68Bu;
            keep[row * features + t.column] = (h ^ h >> 16) >= threshold;
        }
        __syncthreads();  // keys is written again
    }
}
extern "C" __global__ void drop(REAL* y, const bool* keep, double scale, i64 n) {
    each_element(n, [s = (WORK)scale](WORK& v, float kept) { v = v * (WORK)kept * s; }, InOut{y}, In{keep});
}

// ---- Messages (device/gpu/codecs.py), for REAL = float or double ----------------------------------------------------

enum { INT8_BLOCK = 1024, SIGN_BLOCK = 128, TOP_CHUNK = 2048 };  // TOP_CHUNK: values that a block searches

// What is not finite is 0, what is too large is clipped.
template <typename T> __device__ inline T tame(T v) {
    const T cut = T(3.32306998946228968226e35);  // 2^118
    return !is_finite(v) ? T(0) : v > cut ? cut : v < -cut ? -cut : v;
}
template <typename T> __device__ inline T magnitude(T v) { return v > T(0) ? v : v < T(0) ? -v : T(0); }  // -0 is 0

// As device/cpu/half.py: |x| plus 2^13 times the power of two below it, or 2^-14, is rounded to float16's steps.
extern "C" __global__ void encode_float16(const REAL* values, u16* halves, i64 n) {
    GRID_STRIDE(i, n) {
        WORK v = tame(get(values, i));
        u32 bits = __float_as_uint((float)(v > 65504 ? WORK(65504) : v < -65504 ? WORK(-65504) : v));
        u32 power = max(bits & 0x7f800000u, 113u << 23) + (13u << 23);
        u32 steps = __float_as_uint(__uint_as_float(bits & 0x7fffffffu) + __uint_as_float(power)) - power;
        halves[i] = (u16)((steps + (power >> 13) - (126u << 10)) | (bits >> 16 & 0x8000u));
    }
}
extern "C" __global__ void decode_float16(const u16* halves, REAL* estimate, i64 n) {
    GRID_STRIDE(i, n) {
        u32 half = halves[i], power = max(half & 0x7c00u, 1u << 10) - (1u << 10);
        u32 steps = (half & 0x7fffu) - power;
        power = (power << 13) + (126u << 23);
        float v = __uint_as_float(steps + power) - __uint_as_float(power);
        put(estimate, i, get(estimate, i) + (half & 0x8000u ? -v : v));
    }
}
// A block of threads for each block of values.
extern "C" __global__ void encode_int8(const REAL* values, float* scales, u8* levels, i64 n, i64 blocks) {
    __shared__ float most[256];
    for (i64 b = blockIdx.x; b < blocks; b += gridDim.x) {
        i64 first = b * INT8_BLOCK, stop = min(first + INT8_BLOCK, n);
        float scale = 0;
        for (i64 i = first + threadIdx.x; i < stop; i += blockDim.x)
            scale = max(scale, (float)magnitude(tame(get(values, i))));
        most[threadIdx.x] = scale;
        __syncthreads();
        for (u32 half = blockDim.x / 2; half; half /= 2) {
            if (threadIdx.x < half) most[threadIdx.x] = max(most[threadIdx.x], most[threadIdx.x + half]);
            __syncthreads();
        }
        scale = max(most[0], 1e-36f);
        float factor = 127.0f / scale;
        for (i64 i = first + threadIdx.x; i < stop; i += blockDim.x)
            levels[i] = (u8)(int)rint(tame(get(values, i)) * factor);
        if (threadIdx.x == 0) scales[b] = scale / 127.0f;
        __syncthreads();  // most is written again
    }
}
extern "C" __global__ void decode_int8(const float* scales, const u8* levels, REAL* estimate, i64 n) {
    GRID_STRIDE(i, n)
        put(estimate, i, get(estimate, i) + WORK((signed char)levels[i]) * WORK(scales[i / INT8_BLOCK]));
}
// 128 threads for each block of values. The magnitudes are added up in the order in which NumPy adds 128 numbers: eight
// sums of every eighth.
extern "C" __global__ void encode_sign(const REAL* values, float* scales, float* largest, u8* places, u8* bits, i64 n,
                                       i64 blocks) {
    __shared__ WORK size[SIGN_BLOCK], best[SIGN_BLOCK];
    __shared__ int where[SIGN_BLOCK];
    __shared__ bool positive[SIGN_BLOCK];
    int k = threadIdx.x;
    for (i64 b = blockIdx.x; b < blocks; b += gridDim.x) {
        i64 first = b * SIGN_BLOCK;
        int count = (int)min(n - first, (i64)SIGN_BLOCK), whole = count - count % 8;
        WORK v = k < count ? tame(get(values, first + k)) : WORK(0);
        size[k] = best[k] = k < count ? magnitude(v) : WORK(-1);
        where[k] = k;
        positive[k] = k < count && v >= 0;
        __syncthreads();
        for (int half = SIGN_BLOCK / 2; half; half /= 2) {
            int other = k + half;
            if (k < half && (best[other] > best[k] || (best[other] == best[k] && where[other] < where[k]))) {
                best[k] = best[other];
                where[k] = where[other];
            }
            __syncthreads();
        }
        if (k == where[0]) {
            places[b] = (u8)k;
            largest[b] = (float)v;
            size[k] = 0;
        }
        __syncthreads();
        if (k < 8) {
            WORK sum = whole ? size[k] : WORK(0);
            for (int e = 8 + k; e < whole; e += 8) sum += size[e];
            best[k] = sum;
        }
        if (8 * k < count) {
            int byte = 0;
            for (int e = 8 * k; e < 8 * k + 8; e++) byte = byte << 1 | (positive[e] ? 1 : 0);
            bits[b * (SIGN_BLOCK / 8) + k] = (u8)byte;
        }
        __syncthreads();
        if (k == 0) {
            WORK sum = ((best[0] + best[1]) + (best[2] + best[3])) + ((best[4] + best[5]) + (best[6] + best[7]));
            for (int e = whole; e < count; e++) sum += size[e];
            scales[b] = (float)sum / (float)max(count - 1, 1);
        }
        __syncthreads();  // the arrays are written again
    }
}
extern "C" __global__ void decode_sign(const float* scales, const float* largest, const u8* places, const u8* bits,
                                       REAL* estimate, i64 n) {
    GRID_STRIDE(i, n) {
        i64 b = i / SIGN_BLOCK;
        float v = bits[i / 8] >> (7 - i % 8) & 1 ? scales[b] : -scales[b];
        put(estimate, i, get(estimate, i) + WORK(i % SIGN_BLOCK == places[b] ? largest[b] : v));
    }
}
// topk finds the count-th largest magnitude by its bits, eight at a time from the first on (radix select); then it
// writes the values above in their order, and the first of those that are equal. state: [0] the bits found, [1] how
// many are to be taken of the values that begin with them. All sums are whole numbers: atomics may come in any order.
__device__ inline u64 bits_of(float v) { return __float_as_uint(v); }
__device__ inline u64 bits_of(double v) { return (u64)__double_as_longlong(v); }
__device__ inline u64 magnitude_bits(const REAL* values, i64 i) { return bits_of(magnitude(tame(get(values, i)))); }

// 256 threads. `counts` has 256 numbers, 0 before the launch and after it.
extern "C" __global__ void find_byte(const REAL* values, u32* counts, u64* state, u32* done, i64 n, i64 count,
                                     int shift, bool begin) {
    __shared__ u32 mine[256];
    u32 k = threadIdx.x;
    u64 known = begin ? 0 : state[0];
    mine[k] = 0;
    __syncthreads();
    GRID_STRIDE(i, n) {
        u64 bits = magnitude_bits(values, i);
        if (begin || bits >> shift >> 8 == known) atomicAdd(mine + (bits >> shift & 255), 1u);
    }
    __syncthreads();
    if (mine[k]) atomicAdd(counts + k, mine[k]);
    if (!last_block(done)) return;
    mine[k] = __ldcg(counts + k);
    counts[k] = 0;
    __syncthreads();
    if (k == 0) {
        u64 wanted = begin ? (u64)count : state[1];
        int byte = 255;
        for (; byte && mine[byte] < wanted; byte--) wanted -= mine[byte];
        state[0] = known << 8 | (u64)byte;
        state[1] = wanted;
    }
}
// Returns the sum of v over the threads before this one; `all`: over all threads (256).
__device__ inline u32 sum_before(u32 v, u32& all) {
    __shared__ u32 sums[256];
    int k = threadIdx.x;
    sums[k] = v;
    __syncthreads();
    for (int d = 1; d < 256; d *= 2) {
        u32 more = k >= d ? sums[k - d] : 0;
        __syncthreads();
        sums[k] += more;
        __syncthreads();
    }
    all = sums[255];
    u32 before = sums[k] - v;
    __syncthreads();  // sums may be written again
    return before;
}
// How many of `own` values from `first` on are above the limit, plus 65536 times how many are equal.
__device__ inline u32 count_values(const REAL* values, i64 first, int own, int step, u64 limit) {
    u32 found = 0;
    for (int e = 0; e < own; e++) {
        u64 bits = magnitude_bits(values, first + e * step);
        found += bits > limit ? 1 : bits == limit ? 65536 : 0;
    }
    return found;
}
// chunks[b] <- how many values above the limit are in chunks before b, chunks[gridDim.x + b]: how many equal ones;
// behind these: how many of both there are. A block of 256 threads for each chunk.
extern "C" __global__ void count_top(const REAL* values, const u64* state, u32* chunks, u32* done, i64 n) {
    i64 first = (i64)blockIdx.x * TOP_CHUNK + threadIdx.x;
    int own = first < n ? (int)min((n - first + 255) / 256, (i64)TOP_CHUNK / 256) : 0;
    u32 found = block_sum(count_values(values, first, own, 256, state[0])), blocks = gridDim.x;
    if (threadIdx.x == 0) {
        chunks[blockIdx.x] = found & 65535;
        chunks[(i64)blocks + blockIdx.x] = found >> 16;
    }
    if (!last_block(done)) return;
    u32 each = (blocks + 255) / 256, from = min(each * threadIdx.x, blocks), to = min(from + each, blocks);
    for (int kind = 0; kind < 2; kind++) {
        u32 *some = chunks + (i64)kind * blocks, sum = 0, all;
        for (u32 b = from; b < to; b++) sum += __ldcg(some + b);
        sum = sum_before(sum, all);
        for (u32 b = from; b < to; b++) {
            u32 more = __ldcg(some + b);
            some[b] = sum;
            sum += more;
        }
        if (threadIdx.x == 0) chunks[2 * (i64)blocks + kind] = all;
    }
}
// A block of 256 threads for each chunk.
extern "C" __global__ void encode_top(const REAL* values, const u64* state, const u32* chunks, u32* indices,
                                      float* sent, i64 n, i64 count) {
    const int most = TOP_CHUNK / 256;
    u64 limit = state[0];
    i64 first = (i64)blockIdx.x * TOP_CHUNK + (i64)threadIdx.x * most;
    int own = first < n ? (int)min(n - first, (i64)most) : 0;
    u32 all, before = sum_before(count_values(values, first, own, 1, limit), all);
    i64 above = (i64)chunks[blockIdx.x] + (before & 65535);
    i64 equal = (i64)chunks[2 * (i64)gridDim.x] + chunks[(i64)gridDim.x + blockIdx.x] + (before >> 16);
    for (i64 i = first; i < first + own; i++) {
        WORK v = tame(get(values, i));
        u64 bits = bits_of(magnitude(v));
        i64 place = bits > limit ? above++ : bits == limit ? equal++ : count;
        if (place < count) {
            indices[place] = (u32)i;
            sent[place] = (float)v;
        }
    }
}
extern "C" __global__ void decode_top(const u32* indices, const float* sent, REAL* estimate, i64 n, i64 count) {
    GRID_STRIDE(i, count) {
        i64 at = indices[i];
        if (at < n) put(estimate, at, get(estimate, at) + WORK(sent[i]));
    }
}

// ---- Rows of a data set (device/gpu/gather.py) ----------------------------------------------------------------------

// numbers[i] <- the number of row i of the mini-batch of step[0], of any row where it has no more; key[0] <- its epoch's
// key. There are the orders and keys of as many epochs: of epoch e at e % epochs.
extern "C" __global__ void rows_of_step(const double* step, const i64* orders, const u64* keys, i64 epochs, i64* numbers,
                                        u64* key, i64 rows, i64 steps_per_epoch, i64 batch_size, i64 count) {
    i64 now = (i64)step[0], epoch = now / steps_per_epoch, batch = now - epoch * steps_per_epoch;
    const i64* order = orders + epoch % epochs * rows;
    GRID_STRIDE(i, count) numbers[i] = order[min(batch * batch_size + i, rows - 1)];
    if (key && blockIdx.x == 0 && threadIdx.x == 0) key[0] = keys[epoch % epochs];
}
template <typename T>
__device__ inline void take_units(const void* source, const i64* numbers, void* out, i64 count, i64 units) {
    const T* from = (const T*)source;
    GRID_STRIDE(i, count * units) {
        i64 row = count * units <= 0x7fffffff ? (u32)i / (u32)units : i / units;
        ((T*)out)[i] = from[(numbers[row] - row) * units + i];
    }
}
// out[i] <- row numbers[i]: as many units of 1, 4 or 8 bytes.
extern "C" __global__ void take_rows(const void* source, const i64* numbers, void* out, i64 count, i64 units,
                                     int unit) {
    if (unit == 8) take_units<u64>(source, numbers, out, count, units);
    else if (unit == 4) take_units<u32>(source, numbers, out, count, units);
    else take_units<u8>(source, numbers, out, count, units);
}
__device__ inline WORK stored_at(const void* p, int bytes, i64 i) {
    return bytes == 1 ? WORK(((const u8*)p)[i]) : bytes == 4 ? WORK(((const float*)p)[i]) : WORK(((const double*)p)[i]);
}
// out[i] <- row numbers[i], augmented (data/augment.py), times the factor plus the shift of its channel, or of all if
// `channels` is 1 (both are arrays of WORK). The row lies at numbers[i] if `resident`, otherwise at i; its values are
// uint8, float or double: of so many bytes. grid.x covers the elements of a row, grid.y the rows.
extern "C" __global__ void gather(const void* images, int bytes, const i64* numbers, const u64* key, REAL* out,
                                  const void* factor, const void* shift, int channels, i64 rows, int high, int wide,
                                  int c, bool flip, bool crop, bool resident) {
    u32 size = (u32)high * wide * c;
    for (i64 b = blockIdx.y; b < rows; b += gridDim.y) {
        i64 row = numbers[b], image = (resident ? row : b) * size;
        u64 bits = flip || crop ? splitmix((u64)row * GOLDEN + key[0]) : 0;
        int dy = crop ? (int)((bits >> 8 & 0xFFFF) * 9 >> 16) - 4 : 0;
        int dx = crop ? (int)((bits >> 24 & 0xFFFF) * 9 >> 16) - 4 : 0;
        bool turn = flip && bits & 1;
        for (u32 e = blockIdx.x * blockDim.x + threadIdx.x; e < size; e += gridDim.x * blockDim.x) {
            u32 place = e / c, channel = e - place * c, at = channels == 1 ? 0 : channel;
            WORK v = 0;
            if (turn || crop) {
                int h = place / wide, w = (int)place - h * wide + dx;
                h += dy;
                if (h >= 0 && h < high && w >= 0 && w < wide)
                    v = stored_at(images, bytes, image + ((i64)h * wide + (turn ? wide - 1 - w : w)) * c + channel);
            } else {
                v = stored_at(images, bytes, image + e);
            }
            put(out, b * size + e, v * ((const WORK*)factor)[at] + ((const WORK*)shift)[at]);
        }
    }
}
