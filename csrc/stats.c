/* SPDX-License-Identifier: MIT
 *
 * Reference calibration statistics: per channel (column) of activations x[M][K], and the Gram
 * matrix x^T x that error-feedback methods need (Frantar et al., GPTQ, arXiv:2210.17323, eq. 3).
 */
#include <math.h>

#include "common.h"

static void channel_stats_ref(const float *x, int64_t M, int64_t K, int64_t k0, int64_t k1,
                              float *absmax, float *min, float *max, double *sum_square)
{
    for (int64_t k = k0; k < k1; k++) {
        min[k] = max[k] = x[k];
        sum_square[k] = 0;
    }
    /* Row by row, because the rows are what lies together. A NaN stays: no comparison is true. */
    for (int64_t m = 0; m < M; m++) {
        for (int64_t k = k0; k < k1; k++) {
            float v = x[m * K + k];
            min[k] = v < min[k] || v != v ? v : min[k];
            max[k] = v > max[k] || v != v ? v : max[k];
            sum_square[k] += (double)v * v;
        }
    }
    for (int64_t k = k0; k < k1; k++) {
        float low = fabsf(min[k]), high = fabsf(max[k]);
        absmax[k] = high > low || high != high ? high : low;
    }
}

static void gram_ref(const float *x, int64_t M, int64_t K, int64_t i0, int64_t i1, float *acc)
{
    for (int64_t i = i0; i < i1; i++) {
        for (int64_t j = i; j < K; j++) {
            double t = 0;
            for (int64_t m = 0; m < M; m++) t += (double)x[m * K + i] * x[m * K + j];
            acc[i * K + j] += (float)t;
            if (j != i) acc[j * K + i] += (float)t;
        }
    }
}

const gp_impl gp_impl_stats_ref = {
    .name = "ref",
    .channel_stats = channel_stats_ref,
    .gram = gram_ref,
};
