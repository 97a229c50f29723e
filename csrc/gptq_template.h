/* SPDX-License-Identifier: MIT
 *
 * Rounding 16 rows of a weight so that (w - d) H (w - d)^T is small, H the Gram matrix of the inputs:
 * GPTQ (Frantar et al. 2022, algorithm 1), then cyclic coordinate descent on the same objective
 * (QuantEase, Behdin et al. 2023), which may revise what GPTQ rounded early. Our additions: the scales
 * of a group are searched when GPTQ reaches it, each column weighed by what its error will cost (1 / U_kk^2), and
 * each sweep refits them under H before it rounds again. Included by grouped_quantize_template.h, once
 * per instruction set: the rows are the lanes of a vector, so nothing is ever summed across lanes and
 * every instruction set gives the same bits.
 */
#ifndef GPU_POOR_GPTQ_H
#define GPU_POOR_GPTQ_H

#define GPTQ_BLOCK GP_GROUP_MAX /* columns whose effect on those beyond is applied at once */

/* The dequantized levels of a group's columns: scale * q + min. */
typedef struct {
    gp_f16x scale, min;
} gptq_grid;

#endif

#define INLINE GP_INLINE TARGET

/* y[j] -= sum over k of e[k] * m[k][j]: k in [k0, k1), j in [j0, j1). */
INLINE void NAME(gptq_spread)(gp_f16x *y, int64_t j0, int64_t j1, const gp_f16x *e, const float *m,
                              int64_t K, int64_t k0, int64_t k1)
{
    int64_t j = j0;
    for (; j + 8 <= j1; j += 8) {
        gp_f16x t[8];
        for (int i = 0; i < 8; i++) t[i] = y[j + i];
        for (int64_t k = k0; k < k1; k++)
            for (int i = 0; i < 8; i++) t[i] -= e[k - k0] * m[k * K + j + i];
        for (int i = 0; i < 8; i++) y[j + i] = t[i];
    }
    for (; j < j1; j++)
        for (int64_t k = k0; k < k1; k++) y[j] -= e[k - k0] * m[k * K + j];
}

/* A scale as it will be stored. */
INLINE gp_f16x NAME(gptq_stored)(const gp_gptq *a, gp_f16x v)
{
    if (a->half_scales)
        for (int i = 0; i < 16; i++) v[i] = gp_f16_to_float(gp_float_to_f16(v[i]));
    return v;
}

/* Lanes of `yes` where the condition (all bits set) holds, else of `no`. */
INLINE gp_f16x NAME(select)(gp_i16x condition, gp_f16x yes, gp_f16x no)
{
    return (gp_f16x)(((gp_i16x)yes & condition) | ((gp_i16x)no & ~condition));
}

/* The level of value v, and what it stands for. */
INLINE gp_f16x NAME(gptq_round)(const gp_gptq *a, gptq_grid g, gp_f16x inverse, gp_f16x v, gp_f16x *q)
{
    *q = NAME(grid)((v - g.min) * inverse, (float)a->low, (float)a->high);
    return *q * g.scale + g.min;
}

INLINE gp_f16x NAME(gptq_inverse)(gp_f16x scale)
{
    const gp_f16x zero = {0};
    return NAME(select)(scale != zero, 1.0f / NAME(select)(scale != zero, scale, zero + 1), zero);
}

/* The grid of columns [k0, k1) of w: searched for in groups, the whole range of a row. */
INLINE gptq_grid NAME(gptq_choose)(const gp_gptq *a, const gp_f16x *w, int64_t k0, int64_t k1)
{
    gptq_grid g;
    if (a->half_scales) {
        const int bits = a->high - a->low == 15 ? 4 : 8;
        float x[GP_GROUP_MAX], h[GP_GROUP_MAX];
        for (int64_t k = k0; k < k1; k++) {
            float u = a->factor[k * a->K + k];
            h[k - k0] = 1.0f / (u * u);
        }
        for (int r = 0; r < 16; r++) {
            for (int64_t k = k0; k < k1; k++) x[k - k0] = w[k][r];
            const grouped_choice found = NAME(choose)(x, h, k1 - k0, bits, a->asym, GP_MSE);
            g.scale[r] = gp_f16_to_float(found.scale), g.min[r] = gp_f16_to_float(found.min);
        }
        return g;
    }
    gp_f16x low = w[k0], high = w[k0], worst = {0};
    const gp_f16x zero = {0};
    for (int64_t k = k0; k < k1; k++) {
        low = NAME(select)(w[k] < low, w[k], low);
        high = NAME(select)(w[k] > high, w[k], high);
        worst += w[k] * 0.0f; /* NaN if any is not finite */
    }
    if (a->asym) {
        g.scale = (high - low) / (float)(a->high - a->low) + worst;
        g.min = NAME(gptq_stored)(a, low - g.scale * (float)a->low);
    } else {
        g.scale = NAME(select)(high > -low, high, -low) / (float)a->high + worst;
        g.min = zero;
    }
    g.scale = NAME(gptq_stored)(a, g.scale);
    return g;
}

/* GPTQ: round each column, and let the ones after it make up for the error. */
INLINE void NAME(gptq_first)(const gp_gptq *a, gp_f16x *w, gp_f16x *d, gp_f16x *q, gptq_grid *grids)
{
    const int64_t K = a->K, width = gp_min(a->group, GPTQ_BLOCK);
    const int64_t block = GPTQ_BLOCK / width * width;
    gp_f16x e[GPTQ_BLOCK], inverse = {0};
    gptq_grid g = {{0}, {0}};
    for (int64_t b0 = 0; b0 < K; b0 += block) {
        const int64_t b1 = gp_min(b0 + block, K);
        for (int64_t k = b0; k < b1; k++) {
            if (k % a->group == 0) {
                g = NAME(gptq_choose)(a, w, k, gp_min(k + a->group, K));
                grids[k / a->group] = g;
                inverse = NAME(gptq_inverse)(g.scale);
            }
            d[k] = NAME(gptq_round)(a, g, inverse, w[k], &q[k]);
            e[k - b0] = (w[k] - d[k]) * (1.0f / a->factor[k * K + k]);
            NAME(gptq_spread)(w, k + 1, b1, &e[k - b0], a->factor, K, k, k + 1);
        }
        NAME(gptq_spread)(w, b1, K, e, a->factor, K, b0, b1);
    }
}

/* The scale (and minimum) of columns [k0, k1) that fit best under H, all other columns as they are; the
 * old ones where these, rounded to halves, are worse. G = (w - d) H. */
INLINE gptq_grid NAME(gptq_refit)(const gp_gptq *a, gptq_grid g, const gp_f16x *q, const gp_f16x *G,
                                  int64_t k0, int64_t k1)
{
    const gp_f16x zero = {0};
    gp_f16x qq = {0}, qo = {0}, bq = {0}, bo = {0}, gq = {0}, go = {0};
    float oo = 0;
    for (int64_t k = k0; k < k1; k++) {
        gp_f16x v = {0};
        float o = 0;
        for (int64_t j = k0; j < k1; j++) {
            v += q[j] * a->gram[k * a->K + j];
            o += a->gram[k * a->K + j];
        }
        const gp_f16x b = G[k] + g.scale * v + g.min * o;
        qq += v * q[k], qo += q[k] * o, bq += b * q[k], bo += b, oo += o;
        gq += G[k] * q[k], go += G[k];
    }
    gptq_grid fit = g;
    if (!a->asym) {
        fit.scale = NAME(select)(qq > zero, bq / NAME(select)(qq > zero, qq, zero + 1), g.scale);
    } else {
        const gp_f16x det = qq * oo - qo * qo;
        const gp_i16x sound = det > qq * oo * 1e-5f; /* else q is the same everywhere, nearly */
        const gp_f16x divisor = NAME(select)(sound, det, zero + 1);
        fit.scale = NAME(select)(sound, (bq * oo - bo * qo) / divisor, g.scale);
        fit.min = NAME(select)(sound, (bo * qq - bq * qo) / divisor, g.min);
        fit.min = NAME(gptq_stored)(a, fit.min);
    }
    fit.scale = NAME(gptq_stored)(a, fit.scale);
    /* What the objective changes by; NaN where a scale would become unusable. */
    const gp_f16x s = fit.scale - g.scale, m = fit.min - g.min;
    const gp_f16x change = s * (s * qq + 2.0f * (m * qo - gq)) + m * (m * oo - 2.0f * go);
    fit.scale = NAME(select)(change <= zero, fit.scale, g.scale);
    fit.min = NAME(select)(change <= zero, fit.min, g.min);
    return fit;
}

/* One pass of coordinate descent; returns whether any level changed. */
INLINE bool NAME(gptq_sweep)(const gp_gptq *a, gp_f16x *d, gp_f16x *q, gp_f16x *G, gptq_grid *grids)
{
    const int64_t K = a->K, width = gp_min(a->group, GPTQ_BLOCK);
    gp_i16x changed = {0};
    gp_f16x e[GPTQ_BLOCK];
    for (int64_t k0 = 0; k0 < K; k0 += width) {
        const int64_t k1 = gp_min(k0 + width, K);
        gptq_grid *g = &grids[k0 / a->group];
        for (int64_t k = k0; k < k1; k++) e[k - k0] = d[k];
        if (a->group <= GPTQ_BLOCK) { /* a longer group would need all of its columns at once */
            *g = NAME(gptq_refit)(a, *g, q, G, k0, k1);
            for (int64_t k = k0; k < k1; k++) {
                const gp_f16x now = q[k] * g->scale + g->min, step = now - d[k];
                d[k] = now;
                NAME(gptq_spread)(G, k0, k1, &step, a->gram, K, k, k + 1);
            }
        }
        const gp_f16x inverse = NAME(gptq_inverse)(g->scale);
        for (int64_t k = k0; k < k1; k++) {
            gp_f16x level;
            const gp_f16x best = d[k] + G[k] * (1.0f / a->gram[k * K + k]);
            const gp_f16x now = NAME(gptq_round)(a, *g, inverse, best, &level), step = now - d[k];
            changed |= level != q[k];
            d[k] = now, q[k] = level;
            NAME(gptq_spread)(G, k0, k1, &step, a->gram, K, k, k + 1);
        }
        for (int64_t k = k0; k < k1; k++) e[k - k0] = d[k] - e[k - k0];
        NAME(gptq_spread)(G, 0, k0, e, a->gram, K, k0, k1);
        NAME(gptq_spread)(G, k1, K, e, a->gram, K, k0, k1);
    }
    int any = 0;
    for (int i = 0; i < 16; i++) any |= changed[i];
    return any != 0;
}

TARGET static void NAME(gptq_panel)(const gp_gptq *a)
{
    const int64_t K = a->K;
    gp_f16x *w = (gp_f16x *)a->w, *q = (gp_f16x *)a->q, *d = (gp_f16x *)a->scratch, *G = d + K;
    gptq_grid *grids = (gptq_grid *)a->grids;
    memcpy(G, w, (size_t)K * sizeof(*w)); /* GPTQ moves w */
    NAME(gptq_first)(a, w, d, q, grids);
    if (!a->sweeps) return;
    for (int64_t k = 0; k < K; k++) w[k] = d[k] - G[k]; /* spread subtracts */
    memset(G, 0, (size_t)K * sizeof(*G));
    for (int64_t k0 = 0; k0 < K; k0 += GPTQ_BLOCK)
        NAME(gptq_spread)(G, 0, K, w + k0, a->gram, K, k0, gp_min(k0 + GPTQ_BLOCK, K));
    for (int i = 0; i < a->sweeps; i++)
        if (!NAME(gptq_sweep)(a, d, q, G, grids)) break;
}

#undef INLINE
