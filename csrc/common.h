/* SPDX-License-Identifier: MIT
 * Small helpers shared by the kernels: float conversions, rounding. */
#ifndef GPU_POOR_COMMON_H
#define GPU_POOR_COMMON_H

#include <stdint.h>
#include <string.h>

#include "gpu_poor.h"

#define GP_TARGET(isa) __attribute__((target(isa)))
#define GP_INLINE static inline __attribute__((always_inline))

GP_INLINE int64_t gp_min(int64_t a, int64_t b) { return a < b ? a : b; }
GP_INLINE int64_t gp_max(int64_t a, int64_t b) { return a > b ? a : b; }
GP_INLINE int64_t gp_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

GP_INLINE uint32_t gp_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

GP_INLINE float gp_from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

GP_INLINE float gp_bf16_to_float(uint16_t h) { return gp_from_bits((uint32_t)h << 16); }

/* Round to nearest even; a NaN stays one (the top mantissa bit is set, as hardware does). */
GP_INLINE uint16_t gp_float_to_bf16(float x)
{
    uint32_t u = gp_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

GP_INLINE float gp_f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00) /* infinity or NaN, made quiet as vcvtph2ps does */
        return gp_from_bits(sign | 0x7f800000u | (rest & 0x3ff) << 13 |
                            (rest > 0x7c00 ? 0x400000u : 0));
    if (rest >= 0x400) return gp_from_bits(sign | ((rest << 13) + 0x38000000u));
    return gp_from_bits(sign | gp_bits((float)rest * 0x1p-24f)); /* subnormal */
}

GP_INLINE uint16_t gp_float_to_f16(float x)
{
    uint32_t u = gp_bits(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (rest < 0x38800000u) { /* subnormal: adding 0.5 rounds at 2^-24, to even */
        float half = gp_from_bits(rest) + 0.5f;
        return (uint16_t)(sign | (gp_bits(half) - gp_bits(0.5f)));
    }
    return (uint16_t)(sign | ((rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u) >> 13));
}

/* The int8 of a 16-bit fixed point weight under a clip: fixed * (128 + clip) / 2^15, half up (what
 * vpmulhrsw does), saturated. */
GP_INLINE int32_t gp_clipped(int16_t fixed, int clip)
{
    int32_t v = (fixed * (128 + clip) + 0x4000) >> 15;
    return v > 127 ? 127 : v < -127 ? -127 : v;
}

/* Keep the clip with the largest <x, q>^2 / <q, q>. Each operation is rounded once, everywhere. */
GP_INLINE void gp_choose_clip(int64_t xq, int64_t qq, int clip, double *best, double *best_ratio,
                              int *best_clip)
{
    double ratio = (double)xq / (double)qq, score = ratio * (double)xq;
    if (score > *best) {
        *best = score;
        *best_ratio = ratio;
        *best_clip = clip;
    }
}

GP_INLINE float gp_load(const void *x, gp_dtype type, int64_t i)
{
    if (type == GP_F32) return ((const float *)x)[i];
    if (type == GP_I8) return ((const int8_t *)x)[i];
    uint16_t h;
    memcpy(&h, (const char *)x + 2 * i, 2); /* weights have any alignment */
    return type == GP_BF16 ? gp_bf16_to_float(h) : gp_f16_to_float(h);
}

GP_INLINE void gp_store(void *y, gp_dtype type, int64_t i, float v)
{
    if (type == GP_F32)
        ((float *)y)[i] = v;
    else
        ((uint16_t *)y)[i] = type == GP_BF16 ? gp_float_to_bf16(v) : gp_float_to_f16(v);
}

#endif
