/* SPDX-License-Identifier: MIT
 *
 * What a decoder block does to a row of floats between its linears. Included once per instruction set
 * with NAME and TARGET defined; undefines them. Vectors of 16 lanes in the compiler's own notation:
 * the same operations in the same order, so the same bits, whatever they are compiled to.
 */
#ifndef GPU_POOR_DECODER_H
#define GPU_POOR_DECODER_H

#include <math.h>

#include "common.h"

typedef float gp_row16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t gp_bits16 __attribute__((vector_size(64), aligned(4), may_alias));
#endif

#define INLINE GP_INLINE TARGET

/* Lanes [0, n) of x, 0 beyond. */
INLINE gp_row16 NAME(load)(const float *x, int64_t n)
{
    gp_row16 v = {0};
    if (n >= 16) return *(const gp_row16 *)x;
    memcpy(&v, x, (size_t)n * 4);
    return v;
}

INLINE void NAME(store)(float *y, int64_t n, gp_row16 v)
{
    if (n >= 16)
        *(gp_row16 *)y = v;
    else
        memcpy(y, &v, (size_t)n * 4);
}

INLINE float NAME(sum_lanes)(gp_row16 v)
{
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

INLINE gp_row16 NAME(choose)(gp_bits16 mask, gp_row16 yes, gp_row16 no)
{
    return (gp_row16)(((gp_bits16)yes & mask) | ((gp_bits16)no & ~mask));
}

/* e^x = 2^n e^r, n = rint(x / ln 2), |r| <= ln(2) / 2: Taylor to r^7 leaves |r|^8 / 8! < 5.3e-9, a tenth
 * of the last bit; ln 2 in two parts keeps r exact to 2^-24. Relative error below 2^-21. Outside
 * [-87.3, 88.3] the value at the border: what comes of it is below 1e-37, or divided by. NaN stays. */
INLINE gp_row16 NAME(exp)(gp_row16 x)
{
    const gp_row16 zero = {0}, low = zero - 87.3f, high = zero + 88.3f, magic = zero + 12582912.0f;
    x = NAME(choose)(x < low, low, x);
    x = NAME(choose)(x > high, high, x);
    const gp_row16 shifted = x * 1.44269504f + magic, n = shifted - magic;
    const gp_row16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    gp_row16 p = zero + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const gp_bits16 power = ((gp_bits16)shifted - (gp_bits16)magic + 127) << 23;
    return p * (gp_row16)power;
}

INLINE gp_row16 NAME(activate)(gp_activation kind, gp_row16 x)
{
    const gp_row16 zero = {0};
    if (kind == GP_RELU) return NAME(choose)(x < zero, zero, x);
    if (kind == GP_SILU) return x / (1.0f + NAME(exp)(-x));
    if (kind == GP_GELU_TANH) /* 0.5 (1 + tanh u) = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + ...) */
        return x / (1.0f + NAME(exp)(x * (x * x * 0.044715f + 1.0f) * -1.59576912f));
    /* x times the normal distribution: Abramowitz and Stegun 7.1.26 for its tail, |error| < 7.5e-8. */
    const gp_row16 z = NAME(choose)(x < zero, -x, x) * 0.707106781f, t = 1.0f / (z * 0.3275911f + 1.0f);
    gp_row16 p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const gp_row16 tail = 0.5f * (p * t * NAME(exp)(-z * z));
    return x * NAME(choose)(x < zero, tail, 1.0f - tail);
}

INLINE void NAME(activate_rows)(gp_activation kind, const float *x, const float *up, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i += 16) {
        gp_row16 v = NAME(activate)(kind, NAME(load)(x + i, n - i));
        if (up) v *= NAME(load)(up + i, n - i);
        NAME(store)(y + i, n - i, v);
    }
}

TARGET static void NAME(activate_row)(gp_activation kind, const float *x, const float *up, int64_t n,
                                      float *y)
{
    switch (kind) { /* constants, for loops without branches */
    case GP_SILU: NAME(activate_rows)(GP_SILU, x, up, n, y); break;
    case GP_GELU: NAME(activate_rows)(GP_GELU, x, up, n, y); break;
    case GP_GELU_TANH: NAME(activate_rows)(GP_GELU_TANH, x, up, n, y); break;
    case GP_RELU: NAME(activate_rows)(GP_RELU, x, up, n, y); break;
    }
}

TARGET static void NAME(rms_norm_row)(const float *x, const float *weight, float eps, int64_t K,
                                      float *y)
{
    gp_row16 square = {0};
    for (int64_t k = 0; k < K; k += 16) {
        const gp_row16 v = NAME(load)(x + k, K - k);
        square += v * v;
    }
    const float r = 1.0f / sqrtf(NAME(sum_lanes)(square) / (float)K + eps);
    for (int64_t k = 0; k < K; k += 16)
        NAME(store)(y + k, K - k, NAME(load)(x + k, K - k) * r * NAME(load)(weight + k, K - k));
}

TARGET static void NAME(layer_norm_row)(const float *x, const float *weight, const float *bias, float eps,
                                        int64_t K, float *y)
{
    gp_row16 sum = {0}, square = {0};
    for (int64_t k = 0; k < K; k += 16) sum += NAME(load)(x + k, K - k);
    const float mean = NAME(sum_lanes)(sum) / (float)K;
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        const gp_row16 v = NAME(load)(x + k, 16) - mean;
        square += v * v;
    }
    float total = NAME(sum_lanes)(square);
    for (; k < K; k++) total += (x[k] - mean) * (x[k] - mean); /* beyond K 0 - mean would count */
    const float r = 1.0f / sqrtf(total / (float)K + eps);
    for (k = 0; k < K; k += 16) {
        gp_row16 v = (NAME(load)(x + k, K - k) - mean) * r * NAME(load)(weight + k, K - k);
        if (bias) v += NAME(load)(bias + k, K - k);
        NAME(store)(y + k, K - k, v);
    }
}

TARGET static void NAME(rotary_row)(float *x, const float *cosine, const float *sine, int64_t n)
{
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const int64_t left = half - i;
        const gp_row16 a = NAME(load)(x + i, left), b = NAME(load)(x + half + i, left);
        NAME(store)(x + i, left, a * NAME(load)(cosine + i, left) - b * NAME(load)(sine + i, left));
        NAME(store)(x + half + i, left,
                    b * NAME(load)(cosine + half + i, left) + a * NAME(load)(sine + half + i, left));
    }
}

#undef INLINE
#undef NAME
#undef TARGET
