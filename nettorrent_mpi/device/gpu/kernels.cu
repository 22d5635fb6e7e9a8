// The GPU's kernels: every pass over arrays that device.ops names and no library has.
//
// Plain CUDA C++17. NVRTC compiles it for the GPU, once for each REAL (float, double, bf16); g++ compiles it for tests
// (tests/gpu/host). Launchers parse the signatures of the extern "C" functions: scalars are i64, int, u32, u64, bool or
// double, pointers are to these, u8, u16, float, REAL, WORK or void.
//
// - Arithmetic is in WORK: float, or double where REAL is double. A double argument is rounded to it first, as NumPy
//   rounds a Python float. What works element by element does the same operations in the same order as device/cpu, so
//   that both give the same bits; --fmad=false keeps the compiler from fusing them.
// - Sums are in double and in an order that depends on the sizes alone: the same bits in every run and on every GPU.
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

// Whether this block is the last of the grid (gridDim.x blocks) to come here; it sees what all others have written
// before, if it reads that by __ldcg. `done` is 0 before the launch, and again after it.
__device__ inline bool last_block(u32* done) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(done, 1u) == gridDim.x - 1;
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

// The same for two numbers; `partial` has room for two of each block.
__device__ inline bool grid_sums(double& v, double& w, double* partial, u32* done) {
    if (threadIdx.x == 0) { partial[2 * blockIdx.x] = v; partial[2 * blockIdx.x + 1] = w; }
    if (!last_block(done)) return false;
    v = w = 0;
    for (u32 k = threadIdx.x; k < gridDim.x; k += blockDim.x) {
        v += __ldcg(partial + 2 * k);
        w += __ldcg(partial + 2 * k + 1);
    }
    v = block_sum(v);
    w = block_sum(w);
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
extern "C" __global__ void clear_counter(u32* done) {
    if (threadIdx.x == 0) *done = 0;
}
extern "C" __global__ void increase(REAL* x, double by) {
    if (threadIdx.x == 0) put(x, 0, get(x, 0) + (WORK)by);
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

extern "C" __global__ void cross_entropy(const REAL* y, const void* labels, int label_type, REAL* dy, double* metrics,
                                         double* partial, u32* done, double smooth, double share, double total,
                                         i64 rows, i64 outputs) {
    int lane = threadIdx.x % 32;
    double loss = 0, right = 0;
    WORK shared_part = (WORK)share, smooth_part = (WORK)smooth, count = (WORK)total;
    WORK smooth_move = (WORK)(smooth / total), label_move = (WORK)(share / total);
    WARP_ROWS(row, rows) {
        const REAL* x = y + row * outputs;
        i64 label = number_at(labels, label_type, row).i;
        WORK most, exps = 0, moves = 0;
        i64 where = warp_argmax(x, outputs, most);
        for (i64 o = lane; o < outputs; o += 32) {
            WORK moved = get(x, o) - most;
            moves += moved;
            exps += exp(moved);
        }
        exps = warp_sum(exps);
        moves = warp_sum(moves);
        i64 place = label < 0 ? 0 : label < outputs ? label : outputs - 1;
        if (lane == 0) {
            loss += log(exps) - (shared_part * (get(x, place) - most) + smooth_part * moves);
            right += where == label;
        }
        if (dy)
            for (i64 o = lane; o < outputs; o += 32) {
                WORK move = exp(get(x, o) - most) / (exps * count) - smooth_move;
                put(dy + row * outputs, o, o == place ? move - label_move : move);
            }
    }
    loss = block_sum(loss);
    right = block_sum(right);
    if (grid_sums(loss, right, partial, done) && threadIdx.x == 0) { metrics[0] += loss; metrics[1] += right; }
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
                                                double* partial, u32* done, double share, i64 n, i64 outputs) {
    double loss = 0;
    each_element(n, [&, factor = (WORK)share](WORK v, WORK t, WORK& d) {
        WORK e = exp(v < 0 ? v : -v);  // exp(-|v|)
        WORK below = v >= 0 ? WORK(0) : v;  // min(v, 0), NaN for NaN: sigmoid(v) = exp(min(v, 0)) / (1 + exp(-|v|))
        if (dy) d = (exp(below) / (e + 1) - t) * factor;
        loss += log1p(e) + (v <= 0 ? WORK(0) : v) - t * v;
    }, In{y}, In{wanted}, Out{dy});
    loss = block_sum(loss);
    if (grid_sum(loss, partial, done) && threadIdx.x == 0) metrics[0] += loss / outputs;
}
extern "C" __global__ void squared_error(const REAL* y, const REAL* wanted, REAL* dy, double* metrics, double* partial,
                                         u32* done, double share, i64 n, i64 outputs) {
    double loss = 0;
    each_element(n, [&, factor = (WORK)share](WORK v, WORK t, WORK& d) {
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

// ---- Norms, pools, masks, codecs, rows follow here ------------------------------------------------------------------
