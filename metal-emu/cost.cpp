// What one lane does in the kernels that read and write a KV cache, for `make cost` to count: nothing of it is run.
// cost.py compiles it for a GPU with a scalar instruction stream per lane and counts what comes out.
//
// Names are KERNEL__TYPE__VALUES: values of the cache that the function handles; a suffix after a further __ tells
// variants apart.

#include "common.h"
#include "dequantize.h"

// a simdgroup function is one instruction
#define COST_SIMD(name) template <typename T> static inline T cost_##name(T x) { asm volatile("v_" #name " %0" : "+v"(x)); return x; }
COST_SIMD(simd_min) COST_SIMD(simd_or)
template <typename T> static inline T cost_simd_shuffle(T x, ushort lane) { asm volatile("v_simd_shuffle %0, %1" : "+v"(x) : "v"((int) lane)); return x; }
#define simd_min     cost_simd_min
#define simd_or      cost_simd_or
#define simd_shuffle cost_simd_shuffle

#include "quantize.h"

#define COST extern "C" __attribute__((visibility("default"))) void

// what a lane keeps in registers
static inline void keep(float x) { asm volatile("" :: "v"(x)); }

// vec kernel: 4 values of a row of K, times q; of a row of V, times a probability
#define VEC(type, TYPE, table, suffix) \
    COST vec_k__##type##__4##suffix(const fa_row * row, short i, const half4 * q, float s) { \
        half4 r; \
        dequantize_row_t4(TYPE, table, row, i, r); \
        keep(s + dot((float4) r, (float4) q[i])); \
    } \
    COST vec_v__##type##__4##suffix(const fa_row * row, short i, float p, float o0, float o1, float o2, float o3) { \
        half4 r; \
        dequantize_row_t4(TYPE, table, row, i, r); \
        const float4 o = float4(o0, o1, o2, o3) + float4(r)*float4(p); \
        for (short l = 0; l < 4; ++l) { keep(o[l]); } \
    }

// matrix kernel: 16 values of a row to half, in threadgroup memory
#define MATRIX(type, TYPE, table, suffix) \
    COST matrix__##type##__16##suffix(const fa_row * row, short i, __attribute__((address_space(3))) half * dst) { \
        half4x4 r; \
        dequantize_row_t4x4(TYPE, table, row, i, r); \
        for (short l = 0; l < 16; ++l) { dst[l] = r[l/4][l%4]; } \
    }

#define READ(type, TYPE, table, suffix) VEC(type, TYPE, table, suffix) MATRIX(type, TYPE, table, suffix)

READ(f16,    FA_TYPE_F16,    false, )
READ(q8_0,   FA_TYPE_Q8_0,   false, )
READ(q5_0,   FA_TYPE_Q5_0,   false, )
READ(q4_0,   FA_TYPE_Q4_0,   false, )
READ(iq4_nl, FA_TYPE_IQ4_NL, false, )
READ(turbo2, FA_TYPE_TURBO2, false, __registers)
READ(turbo2, FA_TYPE_TURBO2, true,  __table)
READ(turbo3, FA_TYPE_TURBO3, false, __registers)
READ(turbo3, FA_TYPE_TURBO3, true,  __table)
READ(turbo4, FA_TYPE_TURBO4, false, __registers)
READ(turbo4, FA_TYPE_TURBO4, true,  __table)

// dequantize to f16, CPY to f16: 16 values to device memory
#define TO_F16(type, block, fn) COST to_f16__##type##__16(const block * x, short il, half4x4 * dst) { half4x4 r; fn(x, il, r); *dst = r; }
TO_F16(q8_0,   block_q8_0,   dequantize_q8_0)
TO_F16(q5_0,   block_q5_0,   dequantize_q5_0)
TO_F16(q4_0,   block_q4_0,   dequantize_q4_0)
TO_F16(iq4_nl, block_iq4_nl, dequantize_iq4_nl)
TO_F16(turbo2, block_turbo2, dequantize_turbo2)
TO_F16(turbo3, block_turbo3, dequantize_turbo3)
TO_F16(turbo4, block_turbo4, dequantize_turbo4)

// SET_ROWS and CPY to the type: a lane encodes a block
#define ENCODE(type, block, n, fn) COST encode__##type##__##n(const float * x, block * dst) { fn(x, *dst); }
ENCODE(q8_0,   block_q8_0,   32, quantize_q8_0)
ENCODE(q5_0,   block_q5_0,   32, quantize_q5_0)
ENCODE(q4_0,   block_q4_0,   32, quantize_q4_0)

// SET_ROWS of the turbo types: 32 lanes encode 32 values
COST encode_simd__turbo2__32(const float * x, block_turbo2 * dst, short g, ushort lane) { quantize_turbo2_simd(x, *dst, g, lane); }
COST encode_simd__turbo3__32(const float * x, block_turbo3 * dst, short g, ushort lane) { quantize_turbo3_simd(x, *dst, g, lane); }
COST encode_simd__turbo4__32(const float * x, block_turbo4 * dst, short g, ushort lane) { quantize_turbo4_simd(x, *dst, g, lane); }
