// bfloat16 and what else ggml-cuda takes of HIP 6 that the headers of Debian 12 (HIP 5.2) lack, declared only.
// tests/kernels/test_hip_compile.py
#pragma once

#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

struct __hip_bfloat16 {
    unsigned short data;

    __hip_bfloat16() = default;
    __host__ __device__ __hip_bfloat16(float);
    __host__ __device__ operator float() const;
};

struct __hip_bfloat162 {
    __hip_bfloat16 x, y;
};

__host__ __device__ float           __bfloat162float(__hip_bfloat16);
__host__ __device__ __hip_bfloat16  __float2bfloat16(float);
__host__ __device__ __hip_bfloat162 __float22bfloat162_rn(float2);
__host__ __device__ float2          __bfloat1622float2(__hip_bfloat162);

__device__ half  __hmax(half, half);
__device__ half2 __shfl_xor(half2, int, int = warpSize);
__device__ half2 __shfl_up(half2, unsigned int, int = warpSize);

hipError_t hipStreamWaitEvent(hipStream_t, hipEvent_t);

#define hipHostRegisterReadOnly 0x08
