/* SPDX-License-Identifier: MIT
 *
 * Reference kernels of grouped weights: plain C, the specification of every faster version; gpu_poor.h has the
 * layout and the order of every rounding.
 */
#include <math.h>

#include "common.h"

/* q of row n, column k. */
static int32_t grouped_at(const gp_grouped_weight *w, int64_t n, int64_t k)
{
    const uint8_t *block = w->w + (n / GP_PANEL_ROWS * gp_ceil_div(w->K, GP_BLOCK) +
                                   k / GP_BLOCK) * GP_BLOCK_BYTES(w->bits);
    int64_t i = k % GP_BLOCK, j = i / 4 % w->bits;
    uint8_t byte = block[j * 64 + n % GP_PANEL_ROWS * 4 + i % 4];
    if (w->bits == 8) return byte;
    return i < 16 ? byte & 15 : byte >> 4;
}

/* The q that stands for 0. */
static int32_t zero_of(const gp_grouped_weight *w) { return w->asym ? 0 : 1 << (w->bits - 1); }

/* The scale (i = 0) or the minimum (i = 1) of row n, group g. */
static float grouped_scale(const gp_grouped_weight *w, int64_t n, int64_t g, int i)
{
    int64_t at = (n / GP_PANEL_ROWS * gp_ceil_div(w->K, w->group) + g) * (1 + w->asym) + i;
    return gp_f16_to_float(w->scale[at * GP_PANEL_ROWS + n % GP_PANEL_ROWS]);
}

static void grouped_sum_groups_ref(const int8_t *x, int64_t K, int64_t K_pad, int planes,
                                int64_t group, int32_t *sum)
{
    for (int64_t k0 = 0, g = 0; k0 < K; k0 += group, g++) {
        sum[g] = 0;
        for (int64_t k = k0; k < gp_min(k0 + group, K); k++)
            sum[g] += planes == 2 ? 254 * x[k] + x[k + K_pad] : x[k];
    }
}

static void grouped_linear_ref(const gp_grouped_linear *a, int64_t p0, int64_t p1)
{
    const gp_grouped_weight *w = &a->w;
    for (int64_t m = 0; m < a->M; m++) {
        const int8_t *x = a->x + m * a->planes * a->K_pad;
        const int32_t *sums = a->x_sum + m * gp_ceil_div(w->K, w->group);
        for (int64_t n = p0 * GP_PANEL_ROWS; n < gp_min(p1 * GP_PANEL_ROWS, a->N); n++) {
            float t = 0;
            for (int64_t k0 = 0, g = 0; k0 < w->K; k0 += w->group, g++) {
                int64_t k1 = gp_min(k0 + w->group, w->K);
                int32_t d = 0;
                for (int64_t k = k0; k < k1; k++)
                    d += grouped_at(w, n, k) * (a->planes == 2 ? 254 * x[k] + x[k + a->K_pad] : x[k]);
                d -= zero_of(w) * sums[g];
                t = fmaf((float)d, grouped_scale(w, n, g, 0), t);
                if (w->asym) t = fmaf((float)sums[g], grouped_scale(w, n, g, 1), t);
            }
            float y = t * a->x_scale[m];
            if (a->bias) y += a->bias[n];
            gp_store(a->y, a->y_type, m * a->N + n, y);
        }
    }
}

static void grouped_float_linear_ref(const gp_grouped_float_linear *a, int64_t p0, int64_t p1)
{
    const gp_grouped_weight *w = &a->w;
    for (int64_t m = 0; m < a->M; m++) {
        const float *x = a->x + m * a->K_pad;
        for (int64_t n = p0 * GP_PANEL_ROWS; n < gp_min(p1 * GP_PANEL_ROWS, a->N); n++) {
            float t = 0;
            for (int64_t k0 = 0, g = 0; k0 < w->K; k0 += w->group, g++) {
                float d = 0, s = 0;
                for (int64_t k = k0; k < gp_min(k0 + w->group, w->K); k++) {
                    d = fmaf(x[k], (float)(grouped_at(w, n, k) - zero_of(w)), d);
                    s += x[k];
                }
                t = fmaf(d, grouped_scale(w, n, g, 0), t);
                if (w->asym) t = fmaf(s, grouped_scale(w, n, g, 1), t);
            }
            if (a->bias) t += a->bias[n];
            gp_store(a->y, a->y_type, m * a->N + n, t);
        }
    }
}

static void grouped_dequantize_row_ref(const gp_grouped_weight *w, int64_t n, void *y, gp_dtype type)
{
    for (int64_t k = 0; k < w->K; k++) {
        int64_t g = k / w->group;
        float q = (float)(grouped_at(w, n, k) - zero_of(w));
        float min = w->asym ? grouped_scale(w, n, g, 1) : 0;
        gp_store(y, type, k, fmaf(q, grouped_scale(w, n, g, 0), min));
    }
}

const gp_impl gp_impl_grouped_ref = {
    .name = "ref",
    .grouped_sum_groups = grouped_sum_groups_ref,
    .grouped_linear = grouped_linear_ref,
    .grouped_float_linear = grouped_float_linear_ref,
    .grouped_dequantize_row = grouped_dequantize_row_ref,
};
