/* SPDX-License-Identifier: MIT
 * Included by stats.c once per ISA, with NAME, TARGET, LANES, ROWS, VECS and the vec_* operations
 * defined; undefines them. */
/* The reference's loops: they vectorize across the channels as they are, given the target. */
TARGET static void NAME(channel_stats)(const float *x, int64_t M, int64_t K, int64_t k0,
                                       int64_t k1, float *absmax, float *restrict min,
                                       float *restrict max, double *restrict sum_square)
{
    for (int64_t k = k0; k < k1; k++) {
        min[k] = max[k] = x[k];
        sum_square[k] = 0;
    }
    for (int64_t m = 0; m < M; m++) {
        const float *row = x + m * K;
        for (int64_t k = k0; k < k1; k++) {
            float v = row[k], low = min[k], high = max[k];
            int nan = v != v;
            min[k] = (v < low) | nan ? v : low;
            max[k] = (v > high) | nan ? v : high;
            sum_square[k] += (double)v * v;
        }
    }
    for (int64_t k = k0; k < k1; k++) {
        float low = fabsf(min[k]), high = fabsf(max[k]);
        absmax[k] = high > low || high != high ? high : low;
    }
}

#define ELEMENT float
#define STEPS(M) (M)
#define element_load(p) vec_load(p)
#define element_set1(x) vec_set1(x)
#define element_fma(a, b, c) vec_fma(a, b, c)
#include "gram_template.h"

#undef NAME
#undef TARGET
#undef LANES
#undef vec
#undef vec_load
#undef vec_store
#undef vec_set1
#undef vec_fma
