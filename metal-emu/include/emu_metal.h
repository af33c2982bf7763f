// The part of the Metal standard library that llama.cpp's kernels use, as C++ for clang >= 16 on a CPU.
// Force-included before each rewritten kernel file; the address-space keywords are erased at the end of this file.
//
// Source of the semantics: Metal Shading Language Specification. Vectors are classes, not ext_vector_type: MSL lets a
// scalar become a vector implicitly, but converts between element types only explicitly, and so do these.
#pragma once

#include <float.h>
#include <stddef.h>
#include <stdint.h>

#include "emu_runtime.h"

typedef _Float16       half;
typedef unsigned char  uchar;
typedef unsigned short ushort;
typedef unsigned int   uint;
typedef unsigned long  ulong;

constexpr half operator""h(long double x) { return (half) x; }

#define __METAL_VERSION__ 320

#define MAXHALF    ((half) 65504.0f)
#define HALF_MAX   ((half) 65504.0f)
#define MAXFLOAT   FLT_MAX
#define INFINITY   __builtin_inff()
#define NAN        __builtin_nanf("")
#define M_PI_F     3.14159265358979323846f

namespace metal {

template <typename A, typename B> struct is_same       { static constexpr bool value = false; };
template <typename A>             struct is_same<A, A> { static constexpr bool value = true;  };
template <typename A, typename B> constexpr bool is_same_v = is_same<A, B>::value;

template <bool C, typename A, typename B> struct conditional             { typedef A type; };
template <typename A, typename B>         struct conditional<false, A, B> { typedef B type; };
template <bool C, typename A, typename B> using conditional_t = typename conditional<C, A, B>::type;

template <bool C, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool C, typename T = void> using enable_if_t = typename enable_if<C, T>::type;

}

// bfloat16: stored as the upper half of a float, computed in float, rounded to nearest even
struct bfloat {
    uint16_t bits;

    bfloat() = default;
    template <typename S> bfloat(S s) {
        const float f = (float) s;
        uint32_t u; __builtin_memcpy(&u, &f, 4);
        if ((u & 0x7fffffff) > 0x7f800000) { bits = (u >> 16) | 64; return; }
        bits = (u + (0x7fff + ((u >> 16) & 1))) >> 16;
    }
    float to_float() const { const uint32_t u = (uint32_t) bits << 16; float f; __builtin_memcpy(&f, &u, 4); return f; }
    // implicitly to float only, or `c ? bfloat : 0` would be ambiguous
    template <typename U, metal::enable_if_t< metal::is_same_v<U, float>, int> = 0> operator U() const { return to_float(); }
    template <typename U, metal::enable_if_t<!metal::is_same_v<U, float>, int> = 0> explicit operator U() const { return (U) to_float(); }
    bfloat operator-() const { return bfloat(-to_float()); }
#define EMU_BF_OP(op)                                                                                                  \
    friend bfloat operator op(const bfloat & a, const bfloat & b) { return bfloat(a.to_float() op b.to_float()); }     \
    friend float  operator op(const bfloat & a, const float  & b) { return a.to_float() op b; }                        \
    friend float  operator op(const float  & a, const bfloat & b) { return a op b.to_float(); }
    EMU_BF_OP(+) EMU_BF_OP(-) EMU_BF_OP(*) EMU_BF_OP(/)
#undef EMU_BF_OP
    template <typename S> bfloat & operator+=(S s) { return *this = bfloat((float) *this + (float) s); }
    template <typename S> bfloat & operator*=(S s) { return *this = bfloat((float) *this * (float) s); }
};

namespace metal {

template <typename T> struct is_scalar { static constexpr bool value = false; };
#define EMU_SCALAR(T) template <> struct is_scalar<T> { static constexpr bool value = true; };
EMU_SCALAR(bool) EMU_SCALAR(char) EMU_SCALAR(signed char) EMU_SCALAR(uchar) EMU_SCALAR(short) EMU_SCALAR(ushort) EMU_SCALAR(int) EMU_SCALAR(uint)
EMU_SCALAR(long) EMU_SCALAR(ulong) EMU_SCALAR(long long) EMU_SCALAR(unsigned long long) EMU_SCALAR(float) EMU_SCALAR(double) EMU_SCALAR(half) EMU_SCALAR(bfloat)
#undef EMU_SCALAR
template <typename T> constexpr bool is_scalar_v = is_scalar<T>::value;

template <typename T, size_t N> struct array {
    T d[N];
    T       & operator[](size_t i)       { return d[i]; }
    const T & operator[](size_t i) const { return d[i]; }
};

//
// vectors
//

template <typename T, int N> struct vec;
template <typename T, int N> struct packed_vec { T d[N]; operator vec<T, N>() const; };

#define EMU_VEC_BODY(N)                                                                                                \
    typedef T elem;                                                                                                    \
    vec() = default;                                                                                                   \
    template <typename S, typename = enable_if_t<is_scalar_v<S>>> vec(S s) { for (int i = 0; i < N; ++i) d[i] = (T) s; } \
    template <typename U> explicit vec(const vec<U, N> & o) { for (int i = 0; i < N; ++i) d[i] = (T) o.d[i]; }          \
    vec(const packed_vec<T, N> & o) { for (int i = 0; i < N; ++i) d[i] = o.d[i]; }                                     \
    template <typename U> explicit vec(const packed_vec<U, N> & o) { for (int i = 0; i < N; ++i) d[i] = (T) o.d[i]; }   \
    template <typename I> T       & operator[](I i)       { return d[i]; }                                             \
    template <typename I> const T & operator[](I i) const { return d[i]; }                                             \
    EMU_VEC_OP(N, +) EMU_VEC_OP(N, -) EMU_VEC_OP(N, *) EMU_VEC_OP(N, /) EMU_VEC_OP(N, %)                               \
    EMU_VEC_OP(N, &) EMU_VEC_OP(N, |) EMU_VEC_OP(N, ^) EMU_VEC_OP(N, <<) EMU_VEC_OP(N, >>)                             \
    EMU_VEC_CMP(N, <) EMU_VEC_CMP(N, <=) EMU_VEC_CMP(N, >) EMU_VEC_CMP(N, >=) EMU_VEC_CMP(N, ==) EMU_VEC_CMP(N, !=)    \
    EMU_VEC_CMP(N, &&) EMU_VEC_CMP(N, ||)                                                                              \
    friend vec operator-(const vec & a) { vec r; for (int i = 0; i < N; ++i) r.d[i] = (T) -a.d[i]; return r; }         \
    friend vec operator+(const vec & a) { return a; }                                                                  \
    friend vec operator~(const vec & a) { vec r; for (int i = 0; i < N; ++i) r.d[i] = (T) ~a.d[i]; return r; }         \
    friend vec<bool, N> operator!(const vec & a) { vec<bool, N> r; for (int i = 0; i < N; ++i) r.d[i] = !a.d[i]; return r; }
#define EMU_VEC_OP(N, op)                                                                                              \
    friend vec operator op(const vec & a, const vec & b) { vec r; for (int i = 0; i < N; ++i) r.d[i] = (T) (a.d[i] op b.d[i]); return r; } \
    friend vec & operator op##=(vec & a, const vec & b) { for (int i = 0; i < N; ++i) a.d[i] = (T) (a.d[i] op b.d[i]); return a; }
#define EMU_VEC_CMP(N, op)                                                                                             \
    friend vec<bool, N> operator op(const vec & a, const vec & b) { vec<bool, N> r; for (int i = 0; i < N; ++i) r.d[i] = a.d[i] op b.d[i]; return r; }

template <typename T> struct alignas(2*sizeof(T)) vec<T, 2> {
    union { T d[2]; struct { T x, y; }; struct { T r, g; }; };
    EMU_VEC_BODY(2)
    template <typename A, typename B, typename = enable_if_t<is_scalar_v<A> && is_scalar_v<B>>> vec(A a, B b) : d{(T) a, (T) b} {}
};
template <typename T> struct alignas(4*sizeof(T)) vec<T, 3> {
    union { T d[3]; struct { T x, y, z; }; struct { T r, g, b; }; };
    EMU_VEC_BODY(3)
    template <typename A, typename B, typename C> vec(A a, B b, C c) : d{(T) a, (T) b, (T) c} {}
};
template <typename T> struct alignas(4*sizeof(T)) vec<T, 4> {
    union { T d[4]; struct { T x, y, z, w; }; struct { T r, g, b, a; }; };
    EMU_VEC_BODY(4)
    template <typename A, typename B, typename C, typename D> vec(A a, B b, C c, D e) : d{(T) a, (T) b, (T) c, (T) e} {}
    vec(const vec<T, 2> & a, const vec<T, 2> & b) : d{a.d[0], a.d[1], b.d[0], b.d[1]} {}
};
template <typename T, int N> packed_vec<T, N>::operator vec<T, N>() const { return vec<T, N>(*this); }

// R columns of C elements, as in MSL: m[c] is column c
template <typename T, int R, int C> struct matrix {
    vec<T, C> c[R];

    matrix() = default;
    template <typename S, typename = enable_if_t<is_scalar_v<S>>> explicit matrix(S s) {
        for (int i = 0; i < R; ++i) for (int j = 0; j < C; ++j) c[i].d[j] = i == j ? (T) s : (T) 0;
    }
    template <typename U> explicit matrix(const matrix<U, R, C> & o) { for (int i = 0; i < R; ++i) c[i] = vec<T, C>(o.c[i]); }
    matrix(const vec<T, C> & a, const vec<T, C> & b) : c{a, b} {}
    matrix(const vec<T, C> & a, const vec<T, C> & b, const vec<T, C> & e, const vec<T, C> & f) : c{a, b, e, f} {}
    template <typename I> vec<T, C>       & operator[](I i)       { return c[i]; }
    template <typename I> const vec<T, C> & operator[](I i) const { return c[i]; }
    friend matrix operator*(const matrix & a, T s) { matrix r; for (int i = 0; i < R; ++i) r.c[i] = a.c[i]*s; return r; }
};

#define EMU_TYPES(T)                                                                                                   \
    typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;                                            \
    typedef packed_vec<T, 2> packed_##T##2; typedef packed_vec<T, 3> packed_##T##3; typedef packed_vec<T, 4> packed_##T##4;
EMU_TYPES(bool) EMU_TYPES(char) EMU_TYPES(uchar) EMU_TYPES(short) EMU_TYPES(ushort) EMU_TYPES(int) EMU_TYPES(uint) EMU_TYPES(long) EMU_TYPES(ulong)
EMU_TYPES(half) EMU_TYPES(bfloat) EMU_TYPES(float)
#undef EMU_TYPES
typedef matrix<float, 4, 4> float4x4; typedef matrix<float, 2, 4> float2x4;
typedef matrix<half,  4, 4> half4x4;  typedef matrix<half,  2, 4> half2x4;

//
// common, integer and math functions
//

#define EMU_MINMAX(T)                                                                                                  \
    static inline T min(T a, T b) { return b < a ? b : a; }                                                            \
    static inline T max(T a, T b) { return a < b ? b : a; }                                                            \
    static inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
EMU_MINMAX(char) EMU_MINMAX(uchar) EMU_MINMAX(short) EMU_MINMAX(ushort) EMU_MINMAX(int) EMU_MINMAX(uint) EMU_MINMAX(long) EMU_MINMAX(ulong)
EMU_MINMAX(signed char)
#undef EMU_MINMAX
// the result of fmin/fmax with one NaN is the other operand; MSL leaves min/max free to do the same
#define EMU_FMINMAX(T)                                                                                                 \
    static inline T fmin(T a, T b) { return a != a ? b : b != b ? a : b < a ? b : a; }                                 \
    static inline T fmax(T a, T b) { return a != a ? b : b != b ? a : a < b ? b : a; }                                 \
    static inline T min(T a, T b) { return fmin(a, b); }                                                               \
    static inline T max(T a, T b) { return fmax(a, b); }                                                               \
    static inline T clamp(T x, T lo, T hi) { return fmin(fmax(x, lo), hi); }
EMU_FMINMAX(float) EMU_FMINMAX(half)
#undef EMU_FMINMAX
template <typename A, typename B> struct emu_common { typedef conditional_t<is_same_v<A, float> || is_same_v<B, float>, float, half> type; };
template <typename A, typename B, typename = enable_if_t<is_scalar_v<A> && is_scalar_v<B> && !is_same_v<A, B>>>
typename emu_common<A, B>::type fmin(A a, B b) { typedef typename emu_common<A, B>::type T; return fmin((T) a, (T) b); }
template <typename A, typename B, typename = enable_if_t<is_scalar_v<A> && is_scalar_v<B> && !is_same_v<A, B>>>
typename emu_common<A, B>::type fmax(A a, B b) { typedef typename emu_common<A, B>::type T; return fmax((T) a, (T) b); }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T, int N> vec<T, N> min(const vec<T, N> & a, const vec<T, N> & b) { vec<T, N> r; for (int i = 0; i < N; ++i) r.d[i] = min(a.d[i], b.d[i]); return r; }
template <typename T, int N> vec<T, N> max(const vec<T, N> & a, const vec<T, N> & b) { vec<T, N> r; for (int i = 0; i < N; ++i) r.d[i] = max(a.d[i], b.d[i]); return r; }
template <typename T, int N> vec<T, N> fmin(const vec<T, N> & a, const vec<T, N> & b) { return min(a, b); }
template <typename T, int N> vec<T, N> fmax(const vec<T, N> & a, const vec<T, N> & b) { return max(a, b); }
template <typename T, int N> vec<T, N> clamp(const vec<T, N> & x, const vec<T, N> & lo, const vec<T, N> & hi) { return min(max(x, lo), hi); }
template <typename T, int N, typename S, typename = enable_if_t<is_scalar_v<S>>> vec<T, N> clamp(const vec<T, N> & x, S lo, S hi) { return min(max(x, vec<T, N>(lo)), vec<T, N>(hi)); }
template <typename T, int N, typename S, typename = enable_if_t<is_scalar_v<S>>> vec<T, N> fmin(const vec<T, N> & x, S s) { return min(x, vec<T, N>(s)); }
template <typename T, int N, typename S, typename = enable_if_t<is_scalar_v<S>>> vec<T, N> fmax(const vec<T, N> & x, S s) { return max(x, vec<T, N>(s)); }
template <typename T, int N, typename S, typename = enable_if_t<is_scalar_v<S>>> vec<T, N> fmin(S s, const vec<T, N> & x) { return min(vec<T, N>(s), x); }
template <typename T, int N, typename S, typename = enable_if_t<is_scalar_v<S>>> vec<T, N> fmax(S s, const vec<T, N> & x) { return max(vec<T, N>(s), x); }
template <typename T, int N, typename S, typename = enable_if_t<is_scalar_v<S>>> vec<T, N> min(const vec<T, N> & x, S s) { return min(x, vec<T, N>(s)); }
template <typename T, int N, typename S, typename = enable_if_t<is_scalar_v<S>>> vec<T, N> max(const vec<T, N> & x, S s) { return max(x, vec<T, N>(s)); }

#define EMU_F1(name, fn)                                                                                               \
    static inline float name(float x) { return fn(x); }                                                                \
    static inline half  name(half  x) { return (half) fn((float) x); }                                                 \
    template <typename T, int N> vec<T, N> name(const vec<T, N> & x) { vec<T, N> r; for (int i = 0; i < N; ++i) r.d[i] = name(x.d[i]); return r; }
#define EMU_F1_ALL                                                                                                     \
    EMU_F1(exp, __builtin_expf) EMU_F1(exp2, __builtin_exp2f) EMU_F1(log, __builtin_logf) EMU_F1(log2, __builtin_log2f) \
    EMU_F1(log10, __builtin_log10f)                                                                                    \
    EMU_F1(sqrt, __builtin_sqrtf) EMU_F1(sin, __builtin_sinf) EMU_F1(cos, __builtin_cosf) EMU_F1(tan, __builtin_tanf)  \
    EMU_F1(tanh, __builtin_tanhf) EMU_F1(floor, __builtin_floorf) EMU_F1(ceil, __builtin_ceilf) EMU_F1(trunc, __builtin_truncf) \
    EMU_F1(rint, __builtin_rintf) EMU_F1(round, __builtin_roundf) EMU_F1(fabs, __builtin_fabsf)
EMU_F1_ALL
namespace precise { EMU_F1_ALL }
namespace fast    { EMU_F1_ALL }
static inline float rsqrt_f(float x) { return 1.0f/__builtin_sqrtf(x); }
EMU_F1(rsqrt, rsqrt_f)
static inline float sign_f(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x != x ? 0.0f : x; }
EMU_F1(sign, sign_f)
#undef EMU_F1
#undef EMU_F1_ALL

template <typename T, typename = enable_if_t<is_scalar_v<T> && !is_same_v<T, float> && !is_same_v<T, half>>> float floor(T x) { return __builtin_floorf((float) x); }
static inline float pow(float a, float b) { return __builtin_powf(a, b); }
static inline half  pow(half  a, half  b) { return (half) __builtin_powf((float) a, (float) b); }
static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline half  fma(half  a, half  b, half  c) { return (half) __builtin_fmaf((float) a, (float) b, (float) c); }
template <typename T, int N> vec<T, N> fma(const vec<T, N> & a, const vec<T, N> & b, const vec<T, N> & c) { vec<T, N> r; for (int i = 0; i < N; ++i) r.d[i] = fma(a.d[i], b.d[i], c.d[i]); return r; }
static inline float fmod(float a, float b) { return __builtin_fmodf(a, b); }
static inline float ldexp(float a, int e) { return __builtin_ldexpf(a, e); }
static inline float abs(float x) { return __builtin_fabsf(x); }
static inline half  abs(half  x) { return (half) __builtin_fabsf((float) x); }
static inline int   abs(int   x) { return x < 0 ? -x : x; }
template <typename T, int N> vec<T, N> abs(const vec<T, N> & x) { vec<T, N> r; for (int i = 0; i < N; ++i) r.d[i] = abs(x.d[i]); return r; }

static inline bool isnan   (float x) { return __builtin_isnan(x); }
static inline bool isinf   (float x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }

template <typename T, int N> T dot(const vec<T, N> & a, const vec<T, N> & b) { T s = a.d[0]*b.d[0]; for (int i = 1; i < N; ++i) s += a.d[i]*b.d[i]; return s; }
template <typename T, int N> T length(const vec<T, N> & a) { return sqrt(dot(a, a)); }
template <int N> bool all(const vec<bool, N> & a) { bool r = true;  for (int i = 0; i < N; ++i) r = r && a.d[i]; return r; }
template <int N> bool any(const vec<bool, N> & a) { bool r = false; for (int i = 0; i < N; ++i) r = r || a.d[i]; return r; }

template <typename T> T select(T a, T b, bool c) { return c ? b : a; }
template <typename T, int N> vec<T, N> select(const vec<T, N> & a, const vec<T, N> & b, const vec<bool, N> & c) { vec<T, N> r; for (int i = 0; i < N; ++i) r.d[i] = c.d[i] ? b.d[i] : a.d[i]; return r; }

static inline int  popcount(uint x) { return __builtin_popcount(x); }
static inline int  clz(uint x) { return x ? __builtin_clz(x) : 32; }
static inline int  ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
static inline uint extract_bits(uint x, uint offset, uint bits) { return bits == 0 ? 0 : bits >= 32 ? x >> offset : (x >> offset) & ((1u << bits) - 1); }

template <typename T, typename U> T as_type(const U & u) {
    static_assert(sizeof(T) == sizeof(U), "as_type needs equal sizes");
    T t; __builtin_memcpy((void *) &t, &u, sizeof(T)); return t;
}

//
// atomics: one threadgroup runs at a time and fibers switch only at rendezvous points
//

enum memory_order { memory_order_relaxed };
template <typename T> struct emu_atomic { T v; };
typedef emu_atomic<int> atomic_int; typedef emu_atomic<uint> atomic_uint;
template <typename T> T    atomic_load_explicit (const emu_atomic<T> * a, memory_order) { return a->v; }
template <typename T> void atomic_store_explicit(emu_atomic<T> * a, T x, memory_order) { a->v = x; }
template <typename T> T    atomic_fetch_add_explicit(emu_atomic<T> * a, T x, memory_order) { const T r = a->v; a->v = r + x; return r; }

//
// synchronization
//

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
static inline mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags) ((int) a | (int) b); }

static inline void threadgroup_barrier(mem_flags) { emu::threadgroup_barrier(); }
// mem_none orders no memory: here it is nothing at all, so code that needs more from it is found out
static inline void simdgroup_barrier(mem_flags f) { if (f != mem_flags::mem_none) { emu::rendezvous("simdgroup_barrier", nullptr); } }

//
// simdgroup functions; reductions go by lane number, so the result does not depend on the order of the lanes
//

template <typename T> int emu_deposit(T x, const char * kind, void (*complete)(emu::simdgroup &, int)) {
    static_assert(sizeof(T) <= 32);
    emu::simdgroup & g = *emu::cur->sg;
    __builtin_memcpy(g.slot[g.gen & 1][emu::cur->lane], &x, sizeof(T));
    return emu::rendezvous(kind, complete);
}
template <typename T> T emu_slot(emu::simdgroup & g, int parity, int lane) { T x; __builtin_memcpy((void *) &x, g.slot[parity][lane], sizeof(T)); return x; }
template <typename T> T emu_result(int parity) { T x; __builtin_memcpy((void *) &x, emu::cur->sg->result[parity], sizeof(T)); return x; }

template <typename T, typename OP> void emu_reduce(emu::simdgroup & g, int parity) {
    bool first = true; T acc;
    for (int i = 0; i < emu::SIMD_WIDTH; ++i) {
        if (!(g.live_mask >> i & 1)) continue;
        const T x = emu_slot<T>(g, parity, i);
        acc = first ? x : OP::op(acc, x);
        first = false;
    }
    __builtin_memcpy(g.result[parity], &acc, sizeof(T));
}
struct emu_add { template <typename T> static T op(T a, T b) { return a + b; } };
struct emu_max { template <typename T> static T op(T a, T b) { return max(a, b); } };
struct emu_min { template <typename T> static T op(T a, T b) { return min(a, b); } };
struct emu_and { template <typename T> static T op(T a, T b) { return a & b; } };
struct emu_or  { template <typename T> static T op(T a, T b) { return a | b; } };

template <typename T> T simd_sum(T x) { return emu_result<T>(emu_deposit(x, "simd_sum", emu_reduce<T, emu_add>)); }
template <typename T> T simd_max(T x) { return emu_result<T>(emu_deposit(x, "simd_max", emu_reduce<T, emu_max>)); }
template <typename T> T simd_min(T x) { return emu_result<T>(emu_deposit(x, "simd_min", emu_reduce<T, emu_min>)); }
template <typename T> T simd_and(T x) { return emu_result<T>(emu_deposit(x, "simd_and", emu_reduce<T, emu_and>)); }
template <typename T> T simd_or (T x) { return emu_result<T>(emu_deposit(x, "simd_or",  emu_reduce<T, emu_or>)); }
static inline bool simd_any(bool x) { return simd_or<uint>(x ? 1u : 0u) != 0; }
static inline bool simd_all(bool x) { return simd_and<uint>(x ? 1u : 0u) != 0; }

template <typename T> T simd_shuffle(T x, ushort lane) {
    const int p = emu_deposit(x, "simd_shuffle", nullptr);
    if (lane >= emu::SIMD_WIDTH) emu::die("simd_shuffle from lane %d", lane);
    return emu_slot<T>(*emu::cur->sg, p, lane);
}
// lanes that would read beyond the simdgroup keep their value (MSL: undefined; kernels must not use it)
template <typename T> T simd_shuffle_down(T x, ushort d) {
    const int p = emu_deposit(x, "simd_shuffle_down", nullptr), l = emu::cur->lane + d;
    return l < emu::SIMD_WIDTH ? emu_slot<T>(*emu::cur->sg, p, l) : x;
}
template <typename T> T simd_shuffle_up(T x, ushort d) {
    const int p = emu_deposit(x, "simd_shuffle_up", nullptr), l = emu::cur->lane - d;
    return l >= 0 ? emu_slot<T>(*emu::cur->sg, p, l) : x;
}
template <typename T> T simd_shuffle_xor(T x, ushort m) {
    const int p = emu_deposit(x, "simd_shuffle_xor", nullptr);
    return emu_slot<T>(*emu::cur->sg, p, (emu::cur->lane ^ m) % emu::SIMD_WIDTH);
}
template <typename T> T simd_broadcast(T x, ushort lane) { return simd_shuffle(x, lane); }
template <typename T> T emu_prefix(T x, const char * kind, bool inclusive) {
    const int p = emu_deposit(x, kind, nullptr);
    T acc = (T) 0;
    for (int i = 0; i < emu::cur->lane + (inclusive ? 1 : 0); ++i) acc = acc + emu_slot<T>(*emu::cur->sg, p, i);
    return acc;
}
template <typename T> T simd_prefix_inclusive_sum(T x) { return emu_prefix(x, "simd_prefix_inclusive_sum", true); }
template <typename T> T simd_prefix_exclusive_sum(T x) { return emu_prefix(x, "simd_prefix_exclusive_sum", false); }

//
// simdgroup matrices: on a GPU the 64 elements are spread over the lanes; here lane 0's object holds them all.
// Loads and stores touch memory, so they are rendezvous points; arithmetic is lane 0's own business.
//

template <typename T, int R, int C> struct simdgroup_matrix {
    static_assert(R == 8 && C == 8, "8x8 only");
    T m[64];
    simdgroup_matrix() = default;
    explicit simdgroup_matrix(T x) { if (emu::is_leader()) for (int i = 0; i < 64; ++i) m[i] = i % 9 == 0 ? x : (T) 0; }
};
typedef simdgroup_matrix<half,   8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef simdgroup_matrix<float,  8, 8> simdgroup_float8x8;

template <typename T, int N> simdgroup_matrix<T, N, N> make_filled_simdgroup_matrix(T x) {
    simdgroup_matrix<T, N, N> r;
    if (emu::is_leader()) for (int i = 0; i < 64; ++i) r.m[i] = x;
    return r;
}
template <typename T, int N, int M> simdgroup_matrix<T, N, M> make_filled_simdgroup_matrix(T x) { return make_filled_simdgroup_matrix<T, N>(x); }

// all lanes must pass the same address and stride
static inline void emu_uniform(const char * kind, const void * p, int64_t stride) {
    emu::simdgroup & g = *emu::cur->sg;
    if (g.arrived == 0) {
        g.arg0 = p; g.arg1 = stride;
    } else if (g.arg0 != p || g.arg1 != stride) {
        emu::die("%s with different arguments on the lanes of a simdgroup", kind);
    }
}

template <typename T> struct emu_mat_io { T * m; T * p; int64_t stride; bool transpose; };

template <typename T> void emu_mat_load(emu::simdgroup & g, int parity) {
    const emu_mat_io<T> & a = *(const emu_mat_io<T> *) g.leader[parity];
    for (int i = 0; i < 8; ++i) for (int j = 0; j < 8; ++j) a.m[8*i + j] = a.transpose ? a.p[j*a.stride + i] : a.p[i*a.stride + j];
}
template <typename T> void emu_mat_store(emu::simdgroup & g, int parity) {
    const emu_mat_io<T> & a = *(const emu_mat_io<T> *) g.leader[parity];
    for (int i = 0; i < 8; ++i) for (int j = 0; j < 8; ++j) (a.transpose ? a.p[j*a.stride + i] : a.p[i*a.stride + j]) = a.m[8*i + j];
}
template <typename T> void emu_mat_do(const char * kind, T * m, T * p, int64_t stride, bool transpose, void (*f)(emu::simdgroup &, int)) {
    emu_uniform(kind, p, stride);
    emu_mat_io<T> a = { m, p, stride, transpose };
    emu::simdgroup & g = *emu::cur->sg;
    if (emu::is_leader()) g.leader[g.gen & 1] = &a;
    emu::rendezvous(kind, f);
}

template <typename T> void simdgroup_load(simdgroup_matrix<T, 8, 8> & d, const T * p, ulong stride = 8, ulong2 origin = ulong2(0), bool transpose = false) {
    emu_mat_do<T>("simdgroup_load", d.m, (T *) p + origin.x + origin.y*stride, stride, transpose, emu_mat_load<T>);
}
template <typename T> void simdgroup_store(const simdgroup_matrix<T, 8, 8> & s, T * p, ulong stride = 8, ulong2 origin = ulong2(0), bool transpose = false) {
    emu_mat_do<T>("simdgroup_store", (T *) s.m, p + origin.x + origin.y*stride, stride, transpose, emu_mat_store<T>);
}

// D = A*B + C, accumulated in float
template <typename TD, typename TA, typename TB, typename TC>
void simdgroup_multiply_accumulate(simdgroup_matrix<TD, 8, 8> & d, const simdgroup_matrix<TA, 8, 8> & a, const simdgroup_matrix<TB, 8, 8> & b, const simdgroup_matrix<TC, 8, 8> & c) {
    if (!emu::is_leader()) return;
    float fb[64], r[64];
    for (int i = 0; i < 64; ++i) { fb[i] = (float) b.m[i]; r[i] = (float) c.m[i]; }
    for (int i = 0; i < 8; ++i) for (int k = 0; k < 8; ++k) {
        const float x = (float) a.m[8*i + k];
        for (int j = 0; j < 8; ++j) r[8*i + j] += x*fb[8*k + j];
    }
    for (int i = 0; i < 64; ++i) d.m[i] = (TD) r[i];
}
template <typename TD, typename TA, typename TB>
void simdgroup_multiply(simdgroup_matrix<TD, 8, 8> & d, const simdgroup_matrix<TA, 8, 8> & a, const simdgroup_matrix<TB, 8, 8> & b) {
    if (!emu::is_leader()) return;
    simdgroup_matrix<TD, 8, 8> z; for (int i = 0; i < 64; ++i) z.m[i] = (TD) 0;
    simdgroup_multiply_accumulate(d, a, b, z);
}

} // namespace metal

namespace emu {
template <typename T> struct to_value<metal::vec<T, 3>> { static metal::vec<T, 3> get(const u3 & v) { return metal::vec<T, 3>(v.x, v.y, v.z); } };
template <typename T> struct to_value<metal::vec<T, 2>> { static metal::vec<T, 2> get(const u3 & v) { return metal::vec<T, 2>(v.x, v.y); } };
}

static emu::tu emu_tu;

// keywords last: nothing below this line may use them in their C++ meaning
#define kernel
#define device
#define thread
#define threadgroup
#define constant const
