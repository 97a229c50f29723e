/* SPDX-License-Identifier: MIT
 *
 * Reference int4 kernels: plain C, the specification of every faster version; gpu_poor.h has the
 * layout and the order of every rounding.
 */
#include <math.h>

#include "common.h"

/* q of row n, column k. */
static int32_t int4_at(const gp_int4_weight *w, int64_t n, int64_t k)
{
    const uint8_t *block = w->w + (n / GP_INT4_ROWS * gp_ceil_div(w->K, GP_INT4_BLOCK) +
                                   k / GP_INT4_BLOCK) * GP_INT4_PANEL_BLOCK;
    int64_t i = k % GP_INT4_BLOCK, j = i % 16 / 4;
    uint8_t byte = block[j * 64 + n % GP_INT4_ROWS * 4 + i % 4];
    return i < 16 ? byte & 15 : byte >> 4;
}

/* The scale (i = 0) or the minimum (i = 1) of row n, group g. */
static float int4_scale(const gp_int4_weight *w, int64_t n, int64_t g, int i)
{
    int64_t at = (n / GP_INT4_ROWS * gp_ceil_div(w->K, w->group) + g) * (1 + w->asym) + i;
    return gp_f16_to_float(w->scale[at * GP_INT4_ROWS + n % GP_INT4_ROWS]);
}

static void int4_sum_groups_ref(const int8_t *x, int64_t K, int64_t K_pad, int planes,
                                int64_t group, int32_t *sum)
{
    for (int64_t k0 = 0, g = 0; k0 < K; k0 += group, g++) {
        sum[g] = 0;
        for (int64_t k = k0; k < gp_min(k0 + group, K); k++)
            sum[g] += planes == 2 ? 254 * x[k] + x[k + K_pad] : x[k];
    }
}

static void int4_linear_ref(const gp_int4_linear *a, int64_t p0, int64_t p1)
{
    const gp_int4_weight *w = &a->w;
    for (int64_t m = 0; m < a->M; m++) {
        const int8_t *x = a->x + m * a->planes * a->K_pad;
        const int32_t *sums = a->x_sum + m * gp_ceil_div(w->K, w->group);
        for (int64_t n = p0 * GP_INT4_ROWS; n < gp_min(p1 * GP_INT4_ROWS, a->N); n++) {
            float t = 0;
            for (int64_t k0 = 0, g = 0; k0 < w->K; k0 += w->group, g++) {
                int64_t k1 = gp_min(k0 + w->group, w->K);
                int32_t d = 0;
                for (int64_t k = k0; k < k1; k++)
                    d += int4_at(w, n, k) * (a->planes == 2 ? 254 * x[k] + x[k + a->K_pad] : x[k]);
                if (!w->asym) d -= 8 * sums[g];
                t = fmaf((float)d, int4_scale(w, n, g, 0), t);
                if (w->asym) t = fmaf((float)sums[g], int4_scale(w, n, g, 1), t);
            }
            float y = t * a->x_scale[m];
            if (a->bias) y += a->bias[n];
            gp_store(a->y, a->y_type, m * a->N + n, y);
        }
    }
}

static void int4_float_linear_ref(const gp_int4_float_linear *a, int64_t p0, int64_t p1)
{
    const gp_int4_weight *w = &a->w;
    for (int64_t m = 0; m < a->M; m++) {
        const float *x = a->x + m * a->K_pad;
        for (int64_t n = p0 * GP_INT4_ROWS; n < gp_min(p1 * GP_INT4_ROWS, a->N); n++) {
            float t = 0;
            for (int64_t k0 = 0, g = 0; k0 < w->K; k0 += w->group, g++) {
                float d = 0, s = 0;
                for (int64_t k = k0; k < gp_min(k0 + w->group, w->K); k++) {
                    d = fmaf(x[k], (float)(int4_at(w, n, k) - (w->asym ? 0 : 8)), d);
                    s += x[k];
                }
                t = fmaf(d, int4_scale(w, n, g, 0), t);
                if (w->asym) t = fmaf(s, int4_scale(w, n, g, 1), t);
            }
            if (a->bias) t += a->bias[n];
            gp_store(a->y, a->y_type, m * a->N + n, t);
        }
    }
}

static void int4_dequantize_row_ref(const gp_int4_weight *w, int64_t n, void *y, gp_dtype type)
{
    for (int64_t k = 0; k < w->K; k++) {
        int64_t g = k / w->group;
        float q = (float)(int4_at(w, n, k) - (w->asym ? 0 : 8));
        float min = w->asym ? int4_scale(w, n, g, 1) : 0;
        gp_store(y, type, k, fmaf(q, int4_scale(w, n, g, 0), min));
    }
}

const gp_impl gp_impl_int4_ref = {
    .name = "ref",
    .int4_sum_groups = int4_sum_groups_ref,
    .int4_linear = int4_linear_ref,
    .int4_float_linear = int4_float_linear_ref,
    .int4_dequantize_row = int4_dequantize_row_ref,
};
