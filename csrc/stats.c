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

/* The square of panels p and r >= p, its products from at(panel, m, column). */
#define GRAM(at)                                                                                  \
    for (int64_t p = p0; p < p1; p++)                                                             \
        for (int64_t i = 0; i < GP_GRAM_WIDTH && p * GP_GRAM_WIDTH + i < K; i++)                  \
            for (int64_t j = p * GP_GRAM_WIDTH; j < K; j++) {                                     \
                double t = 0;                                                                     \
                for (int64_t m = 0; m < M; m++)                                                   \
                    t += (double)at(p, m, i) * at(j / GP_GRAM_WIDTH, m, j % GP_GRAM_WIDTH);       \
                acc[(p * GP_GRAM_WIDTH + i) * K + j] += (float)t;                                 \
            }

static void gram_ref(const float *packed, int64_t M, int64_t K, int64_t p0, int64_t p1, float *acc)
{
#define FLOAT(p, m, i) packed[((p) * M + (m)) * GP_GRAM_WIDTH + (i)]
    GRAM(FLOAT)
}

static void gram_pairs_ref(const uint16_t *packed, int64_t M, int64_t K, int64_t p0, int64_t p1,
                           float *acc)
{
    const int64_t pairs = (M + 1) / 2;
#define PAIR(p, m, i)                                                                             \
    gp_bf16_to_float(packed[(((p) * pairs + (m) / 2) * GP_GRAM_WIDTH + (i)) * 2 + (m) % 2])
    GRAM(PAIR)
}

const gp_impl gp_impl_stats_ref = {
    .name = "ref",
    .channel_stats = channel_stats_ref,
    .gram = gram_ref,
    .gram_pairs = gram_pairs_ref,
};
