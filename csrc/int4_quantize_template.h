/* SPDX-License-Identifier: MIT
 *
 * The search for the scales of int4 groups. Included once per instruction set with NAME and TARGET
 * defined; undefines them. Vectors of 16 lanes in the compiler's own notation, which means the same
 * operations in the same order, and so the same bits, whatever they are compiled to.
 *
 * Symmetric: for integers q the best scale is <x, q> / <q, q> and leaves |x|^2 - <x, q>^2 / <q, q>, all
 * sums weighed by the importance. Of 66 grids, whose largest value is put at -5 to -9 or 5 to 9,
 * the best, refined by fitting the scale and rounding again. The grid has one value more on one side;
 * either sign of the scale says which.
 * Asymmetric: for q the best scale and minimum are a regression of x on q; of 51 ranges within
 * [min x, max x], each fitted twice, the best, refined in the same way. That leaves 0.7 % more squared
 * error than 1300 ranges fitted three times (normal values, groups of 32); 106 ranges fitted once, which
 * take as long, 1.0 %.
 */
#ifndef GPU_POOR_INT4_QUANTIZE_H
#define GPU_POOR_INT4_QUANTIZE_H

#include <math.h>
#include <stdbool.h>

#include "common.h"

typedef float gp_f16x __attribute__((vector_size(64), aligned(4)));
typedef int32_t gp_i16x __attribute__((vector_size(64), aligned(4)));

#define INT4_VECTORS (GP_INT4_GROUP_MAX / 16)
#define INT4_REFITS 4

/* A group: values, importance (0 beyond the group's end) and the vectors used. */
typedef struct {
    gp_f16x x[INT4_VECTORS], h[INT4_VECTORS];
    int n;
} int4_group;

/* What is stored of a group: halves. */
typedef struct {
    uint16_t scale, min;
} int4_choice;

/* What a group becomes: q of x is rint((x - min) * inverse) within [low, low + 15]. */
typedef struct {
    float scale, min, error;
} int4_fit;
#endif

#define INLINE GP_INLINE TARGET

INLINE float NAME(sum)(gp_f16x v)
{
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

/* rint by adding 1.5 * 2^23, to even, of |v| < 2^22; clamped first. */
INLINE gp_f16x NAME(grid)(gp_f16x v, float low, float high)
{
    const gp_f16x zero = {0};
    gp_f16x lo = zero + low, hi = zero + high, magic = zero + 12582912.0f;
    gp_i16x below = v < lo, above = v > hi;
    v = (gp_f16x)(((gp_i16x)lo & below) | ((gp_i16x)v & ~below));
    v = (gp_f16x)(((gp_i16x)hi & above) | ((gp_i16x)v & ~above));
    return v + magic - magic;
}

/* The best scale for the q that `inverse` makes, and what it gains: <x, q>^2 / <q, q>. */
INLINE float NAME(fit_symmetric)(const int4_group *g, float inverse, float *scale)
{
    gp_f16x xq = {0}, qq = {0};
    for (int i = 0; i < g->n; i++) {
        gp_f16x q = NAME(grid)(g->x[i] * inverse, -8, 7), hq = g->h[i] * q;
        xq += hq * g->x[i];
        qq += hq * q;
    }
    float a = NAME(sum)(xq), b = NAME(sum)(qq);
    *scale = b > 0 ? a / b : 0;
    return b > 0 ? a * (a / b) : 0;
}

/* The best scale and minimum for the q that (x - min) * inverse makes, and the error they leave. */
INLINE int4_fit NAME(fit_asymmetric)(const int4_group *g, float min, float inverse)
{
    gp_f16x h = {0}, hx = {0}, hq = {0}, xx = {0}, xq = {0}, qq = {0};
    for (int i = 0; i < g->n; i++) {
        gp_f16x q = NAME(grid)((g->x[i] - min) * inverse, 0, 15);
        gp_f16x wq = g->h[i] * q, wx = g->h[i] * g->x[i];
        h += g->h[i], hx += wx, hq += wq, xx += wx * g->x[i], xq += wq * g->x[i], qq += wq * q;
    }
    float n = NAME(sum)(h), sx = NAME(sum)(hx), sq = NAME(sum)(hq), sxx = NAME(sum)(xx);
    float sxq = NAME(sum)(xq), sqq = NAME(sum)(qq), det = n * sqq - sq * sq;
    if (!(det > 0)) return (int4_fit){0, n > 0 ? sx / n : min, sxx - (n > 0 ? sx * sx / n : 0)};
    float scale = (n * sxq - sx * sq) / det, m = (sx - scale * sq) / n;
    return (int4_fit){scale, m, sxx - scale * sxq - m * sx};
}

INLINE int4_fit NAME(search_symmetric)(const int4_group *g, float extreme)
{
    enum { STEPS = 33 };
    /* Values that overflow the sums leave this scale, too large for a half: no zeros instead. */
    float best = -1, scale = extreme / -8, fitted;
    for (int side = -1; side <= 1; side += 2) {
        for (int i = 0; i < STEPS; i++) {
            float at = (float)side * (5.0f + 0.125f * (float)i);
            float gain = NAME(fit_symmetric)(g, at / extreme, &fitted);
            if (gain > best) best = gain, scale = fitted;
        }
    }
    for (int i = 0; i < INT4_REFITS && scale != 0; i++) {
        float gain = NAME(fit_symmetric)(g, 1.0f / scale, &fitted);
        if (!(gain > best)) break;
        best = gain, scale = fitted;
    }
    return (int4_fit){scale, 0, 0};
}

INLINE int4_fit NAME(search_asymmetric)(const int4_group *g, float low, float high)
{
    enum { WIDTHS = 11, SHIFTS = 5 };
    const float range = high - low;
    int4_fit best = {range / 15, low, INFINITY};
    for (int i = 0; i < WIDTHS; i++) {
        for (int j = 0; j < SHIFTS && (i || !j); j++) {
            /* from the whole range down to 60 % of it, placed at either end and between */
            float width = range * (1.0f - 0.04f * i);
            float min = low + (range - width) * ((float)j / (SHIFTS - 1));
            int4_fit first = NAME(fit_asymmetric)(g, min, 15.0f / width), second = first;
            if (first.scale != 0)
                second = NAME(fit_asymmetric)(g, first.min, 1.0f / first.scale);
            if (first.error < best.error) best = first;
            if (second.error < best.error) best = second;
        }
    }
    for (int i = 0; i < INT4_REFITS && best.scale != 0; i++) {
        int4_fit fit = NAME(fit_asymmetric)(g, best.min, 1.0f / best.scale);
        if (!(fit.error < best.error)) break;
        best = fit;
    }
    return best;
}

/* The scale and minimum of a group of `count` values, as halves; of values that are not finite, or that
 * no half reaches, NaN. h: their importance, or NULL. */
INLINE int4_choice NAME(choose)(const float *x, const float *h, int64_t count, int asym,
                                gp_search search)
{
    const int4_choice none = {0, 0}, unreachable = {0x7e00, 0x7e00};
    float low = x[0], high = x[0], worst = 0;
    for (int64_t k = 0; k < count; k++) {
        low = x[k] < low ? x[k] : low;
        high = x[k] > high ? x[k] : high;
        worst += x[k] * 0.0f; /* NaN if any is not finite */
    }
    if (worst != worst) return unreachable;
    if (low == 0 && high == 0) return none;
    int4_group g;
    g.n = (int)gp_ceil_div(count, 16);
    memset(g.x, 0, sizeof(g.x));
    memset(g.h, 0, sizeof(g.h));
    memcpy(g.x, x, (size_t)count * 4);
    for (int64_t k = 0; k < count; k++) ((float *)g.h)[k] = h ? h[k] : 1.0f;

    gp_f16x total = {0};
    for (int i = 0; i < g.n; i++) total += g.h[i];
    if (!(NAME(sum)(total) > 0)) /* nothing is known of them: then all count alike */
        for (int64_t k = 0; k < count; k++) ((float *)g.h)[k] = 1.0f;

    int4_fit fit;
    const float extreme = high > -low ? high : low;
    if (asym) {
        fit = (int4_fit){(high - low) / 15, low, 0};
        if (search == GP_MSE && high > low) fit = NAME(search_asymmetric)(&g, low, high);
    } else {
        fit = (int4_fit){fabsf(extreme) / 7, 0, 0};
        if (search == GP_MSE) fit = NAME(search_symmetric)(&g, extreme);
    }
    const int4_choice found = {gp_float_to_f16(fit.scale), gp_float_to_f16(fit.min)};
    bool reached = fabsf(gp_f16_to_float(found.scale)) < INFINITY &&
                   fabsf(gp_f16_to_float(found.min)) < INFINITY;
    return reached ? found : unreachable;
}

/* Columns [k0, k1) of row r: its nibbles, and its scale (and minimum) as halves. */
INLINE void NAME(quantize_group)(const gp_int4_quantize *a, int64_t r, int64_t k0, int64_t k1,
                                 uint8_t *q, uint16_t *halves)
{
    const float *x = a->x + r * a->stride;
    const float *h = a->importance ? a->importance + k0 : NULL;
    const int4_choice found = NAME(choose)(x + k0, h, k1 - k0, a->asym, a->search);
    const uint8_t zero = a->asym ? 0 : 8;
    memset(q, zero, (size_t)(k1 - k0));
    halves[0] = found.scale, halves[1] = found.min;
    const float scale = gp_f16_to_float(found.scale), min = gp_f16_to_float(found.min);
    if (scale == 0 || scale != scale) return;
    const float inverse = 1.0f / scale;
    for (int64_t k = 0; k < k1 - k0; k += 16) {
        gp_f16x v = {0};
        const int64_t n = gp_min(16, k1 - k0 - k);
        memcpy(&v, x + k0 + k, (size_t)n * 4);
        v = NAME(grid)((v - min) * inverse, -(float)zero, 15 - (float)zero);
        for (int64_t i = 0; i < n; i++) q[k + i] = (uint8_t)(v[i] + zero);
    }
}

TARGET static void NAME(int4_quantize_panel)(const gp_int4_quantize *a)
{
    const int64_t blocks = gp_ceil_div(a->K, GP_INT4_BLOCK);
    const int per_group = (1 + a->asym) * GP_INT4_ROWS;
    memset(a->w, a->asym ? 0 : 0x88, (size_t)(blocks * GP_INT4_PANEL_BLOCK));
    memset(a->scale, 0, (size_t)(gp_ceil_div(a->K, a->group) * per_group) * 2);
    for (int64_t r = 0; r < a->rows; r++) {
        for (int64_t k0 = 0, g = 0; k0 < a->K; k0 += a->group, g++) {
            const int64_t k1 = gp_min(k0 + a->group, a->K);
            uint8_t q[GP_INT4_GROUP_MAX];
            uint16_t halves[2];
            NAME(quantize_group)(a, r, k0, k1, q, halves);
            for (int i = 0; i <= a->asym; i++)
                a->scale[g * per_group + i * GP_INT4_ROWS + r] = halves[i];
            for (int64_t k = k0; k < k1; k++) {
                uint8_t *byte = a->w + k / 32 * GP_INT4_PANEL_BLOCK + k % 16 / 4 * 64 + r * 4 + k % 4;
                *byte = k % 32 < 16 ? (uint8_t)((*byte & 0xf0) | q[k - k0])
                                    : (uint8_t)((*byte & 0x0f) | q[k - k0] << 4);
            }
        }
    }
}

#undef INLINE
#include "gptq_template.h"

#undef NAME
#undef TARGET
