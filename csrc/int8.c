/* SPDX-License-Identifier: MIT
 *
 * Reference int8 kernels: plain C, the specification of every faster version.
 * Per-row symmetric absmax quantization of activations (per token) as in Dettmers et al.,
 * LLM.int8() (arXiv:2208.07339), eq. 1; the two-plane activations and the weights' search are ours,
 * derived in docs/kernels.md.
 */
#include <math.h>

#include "common.h"

static uint32_t absmax_bits(const void *x, gp_dtype type, int64_t K)
{
    uint32_t bits = 0;
    for (int64_t k = 0; k < K; k++) {
        uint32_t b = gp_bits(gp_load(x, type, k)) & 0x7fffffffu;
        bits = b > bits ? b : bits;
    }
    return bits;
}

static float int8_quantize_row_ref(const void *x, gp_dtype type, int64_t K, int planes, int8_t *q,
                                   int64_t stride, int32_t *sum)
{
    const gp_grid grid = gp_grid_of(absmax_bits(x, type, K), GP_Q_MAX(planes));
    for (int p = 0; p < planes; p++) sum[p] = 0;
    for (int64_t k = 0; k < K; k++) {
        /* |x * inverse| <= q_max (1 + 2^-23)^2 rounds to at most q_max: no clamp */
        int32_t v = grid.inverse ? (int32_t)rintf(gp_load(x, type, k) * grid.inverse) : 0;
        if (planes == 2) {
            /* A tie (v = 254 h + 127) may round either way, both leave |low| = 127. */
            int32_t high = (int32_t)rintf((float)v * (1.0f / 254.0f));
            q[k] = (int8_t)high;
            q[k + stride] = (int8_t)(v - 254 * high);
            sum[1] += q[k + stride];
        } else {
            q[k] = (int8_t)v;
        }
        sum[0] += q[k];
    }
    return grid.scale;
}

/* Weights: the same grid q * scale, but the scale of least squared error. For a grid point vector q
 * the best scale is <x, q> / <q, q>, and leaves the error |x|^2 - <x, q>^2 / <q, q>. So of GP_CLIPS
 * ranges, from absmax down, the one with the largest <x, q>^2 / <q, q> is taken, the first if equal.
 * Integers throughout (x in 16-bit fixed point), so no ISA sums differently; the largest sums,
 * 32512 * 127 * K, are exact in double up to K = 2^31. Measured as mean KL on stories260k, windows of
 * 512: absmax 7.3e-4, this 6.8e-4; a refit scale without a search 7.2e-4. */
static float int8_quantize_weight_row_ref(const void *x, gp_dtype type, int64_t K, int8_t *q,
                                          int16_t *fixed)
{
    const uint32_t absmax = absmax_bits(x, type, K);
    const gp_grid grid = gp_grid_of(absmax, GP_FIXED_MAX);
    if (!grid.inverse) {
        memset(q, 0, (size_t)K);
        return grid.scale;
    }
    for (int64_t k = 0; k < K; k++) fixed[k] = (int16_t)rintf(gp_load(x, type, k) * grid.inverse);
    double best = -1, best_ratio = 0;
    int best_clip = 0;
    for (int clip = 0; clip < GP_CLIPS; clip++) {
        int64_t xq = 0, qq = 0;
        for (int64_t k = 0; k < K; k++) {
            int32_t v = gp_clipped(fixed[k], clip);
            xq += fixed[k] * v;
            qq += v * v;
        }
        gp_choose_clip(xq, qq, clip, &best, &best_ratio, &best_clip);
    }
    for (int64_t k = 0; k < K; k++) q[k] = (int8_t)gp_clipped(fixed[k], best_clip);
    return (float)(best_ratio * (double)gp_from_bits(absmax) / (double)GP_FIXED_MAX);
}

static int64_t dot(const int8_t *a, const int8_t *b, int64_t K)
{
    int64_t total = 0;
    for (int64_t k = 0; k < K; k++) total += a[k] * b[k];
    return total;
}

void gp_int8_linear_ref(const gp_int8_linear *a, int64_t n0, int64_t n1);
void gp_int8_linear_ref(const gp_int8_linear *a, int64_t n0, int64_t n1)
{
    for (int64_t m = 0; m < a->M; m++) {
        for (int64_t n = n0; n < n1; n++) {
            const int8_t *x = a->x + m * a->planes * a->K_pad, *w = a->w + n * a->K;
            float t = (float)dot(x, w, a->K);
            if (a->planes == 2) t = 254.0f * t + (float)dot(x + a->K_pad, w, a->K);
            float y = t * a->x_scale[m] * a->w_scale[n];
            if (a->bias) y += a->bias[n];
            gp_store(a->y, a->y_type, m * a->N + n, y);
        }
    }
}

static void int8_pack_ref(const gp_int8_linear *a, int64_t b, int8_t *packed)
{
    for (int p = 0; p < a->planes; p++)
        for (int64_t k = 0; k < a->K_pad; k++)
            for (int64_t r = 0; r < 16; r++) {
                int64_t m = 16 * b + r;
                packed[p * 16 * a->K_pad + k / 4 * 64 + r * 4 + k % 4] =
                    m < a->M ? a->x[(m * a->planes + p) * a->K_pad + k] : 0;
            }
}

/* Sums in double: what the float kernels are measured against. */
static void float_linear_ref(const gp_float_linear *a, int64_t n0, int64_t n1)
{
    for (int64_t m = 0; m < a->M; m++) {
        for (int64_t n = n0; n < n1; n++) {
            double t = 0;
            for (int64_t k = 0; k < a->K; k++)
                t += (double)a->x[m * a->K_pad + k] * gp_load(a->w, a->w_type, n * a->K + k);
            float y = a->w_scale ? (float)t * a->w_scale[n] : (float)t;
            if (a->bias) y += a->bias[n];
            gp_store(a->y, a->y_type, m * a->N + n, y);
        }
    }
}

static void int8_dequantize_row_ref(const int8_t *q, float scale, float offset, int64_t K, void *y,
                                    gp_dtype type)
{
    for (int64_t k = 0; k < K; k++) gp_store(y, type, k, fmaf((float)q[k], scale, offset));
}

static void add_offsets_ref(const float *t, float u, const float *offset, int64_t N, void *y,
                            gp_dtype type)
{
    for (int64_t n = 0; n < N; n++) gp_store(y, type, n, t[n] + u * offset[n]);
}

static void to_float_row_ref(const void *x, gp_dtype type, int64_t K, float *y)
{
    for (int64_t k = 0; k < K; k++) y[k] = gp_load(x, type, k);
}

const gp_impl gp_impl_int8_ref = {
    .name = "ref",
    .int8_quantize_row = int8_quantize_row_ref,
    .int8_quantize_weight_row = int8_quantize_weight_row_ref,
    .int8_linear = gp_int8_linear_ref,
    .int8_pack = int8_pack_ref,
    .float_linear = float_linear_ref,
    .int8_dequantize_row = int8_dequantize_row_ref,
    .add_offsets = add_offsets_ref,
    .to_float_row = to_float_row_ref,
};
