/* SPDX-License-Identifier: MIT
 *
 * The search for the scales of groups. Included once per instruction set with NAME and TARGET
 * defined; undefines them. Vectors of 16 lanes in the compiler's own notation, which means the same
 * operations in the same order, and so the same bits, whatever they are compiled to.
 *
 * Symmetric: for integers q the best scale is <x, q> / <q, q> and leaves |x|^2 - <x, q>^2 / <q, q>, all
 * sums weighed by the importance. Of 66 grids, whose largest value is put at -5 to -9 or 5 to 9 (of 8
 * bits: 120 to 129), the best, refined by fitting the scale and rounding again. The grid has one value
 * more on one side; either sign of the scale says which. With 8 bits that leaves 25 % less squared error
 * than absmax / 127 does (normal values, groups of 32), in groups of 128 11 %.
 * Asymmetric: for q the best scale and minimum are a regression of x on q; of 51 ranges within
 * [min x, max x], each fitted twice, the best, refined in the same way. That leaves 0.7 % more squared
 * error than 1300 ranges fitted three times (normal values, groups of 32); 106 ranges fitted once, which
 * take as long, 1.0 %. The ranges differ by 0.64 steps of the grid.
 */
#ifndef GPU_POOR_GROUPED_QUANTIZE_H
#define GPU_POOR_GROUPED_QUANTIZE_H

#include <math.h>
#include <stdbool.h>

#include "common.h"

typedef float gp_f16x __attribute__((vector_size(64), aligned(4)));
typedef int32_t gp_i16x __attribute__((vector_size(64), aligned(4)));
typedef float gp_f8x __attribute__((vector_size(32), aligned(4)));
typedef float gp_f4x __attribute__((vector_size(16), aligned(4)));

#define GROUPED_VECTORS (GP_GROUP_MAX / 16)
#define GROUPED_REFITS 4

/* A group: values, importance (0 beyond the group's end), the vectors used, the largest q; and, of
 * a search for a minimum, the sums of h, h x, h x^2. */
typedef struct {
    gp_f16x x[GROUPED_VECTORS], h[GROUPED_VECTORS];
    int n;
    float top, sum_h, sum_hx, sum_hxx;
} grouped_group;

/* What is stored of a group: halves. */
typedef struct {
    uint16_t scale, min;
} grouped_choice;

/* What a group becomes: q of x is rint((x - min) * inverse). */
typedef struct {
    float scale, min, error;
} grouped_fit;
#endif

#define INLINE GP_INLINE TARGET

/* Lane i and i + 8, then 4, 2, 1. */
INLINE float NAME(sum)(gp_f16x v)
{
    gp_f8x half[2];
    gp_f4x quarter[2];
    memcpy(half, &v, sizeof(half));
    half[0] += half[1];
    memcpy(quarter, &half[0], sizeof(quarter));
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
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
INLINE float NAME(fit_symmetric)(const grouped_group *g, float inverse, float *scale)
{
    gp_f16x xq = {0}, qq = {0};
    const float zero = (g->top + 1) / 2;
    for (int i = 0; i < g->n; i++) {
        gp_f16x q = NAME(grid)(g->x[i] * inverse, -zero, zero - 1), hq = g->h[i] * q;
        xq += hq * g->x[i];
        qq += hq * q;
    }
    float a = NAME(sum)(xq), b = NAME(sum)(qq);
    *scale = b > 0 ? a / b : 0;
    return b > 0 ? a * (a / b) : 0;
}

/* The best scale and minimum for the q that (x - min) * inverse makes, and the error they leave. */
INLINE grouped_fit NAME(fit_asymmetric)(const grouped_group *g, float min, float inverse)
{
    gp_f16x hq = {0}, xq = {0}, qq = {0};
    for (int i = 0; i < g->n; i++) {
        gp_f16x q = NAME(grid)((g->x[i] - min) * inverse, 0, g->top);
        gp_f16x wq = g->h[i] * q;
        hq += wq, xq += wq * g->x[i], qq += wq * q;
    }
    float n = g->sum_h, sx = g->sum_hx, sxx = g->sum_hxx, sq = NAME(sum)(hq), sxq = NAME(sum)(xq);
    float sqq = NAME(sum)(qq), det = n * sqq - sq * sq;
    if (!(det > 0)) return (grouped_fit){0, n > 0 ? sx / n : min, sxx - (n > 0 ? sx * sx / n : 0)};
    float scale = (n * sxq - sx * sq) / det, m = (sx - scale * sq) / n;
    return (grouped_fit){scale, m, sxx - scale * sxq - m * sx};
}

INLINE grouped_fit NAME(search_symmetric)(const grouped_group *g, float extreme)
{
    enum { STEPS = 32 };
    const float zero = (g->top + 1) / 2, from = g->top == 15 ? 5 : 120;
    const float step = (zero + 1 - from) / STEPS;
    /* Values that overflow the sums leave this scale, too large for a half: no zeros instead. */
    float best = -1, scale = extreme / -zero, fitted;
    for (int side = -1; side <= 1; side += 2) {
        for (int i = 0; i <= STEPS; i++) {
            float at = (float)side * (from + step * (float)i);
            float gain = NAME(fit_symmetric)(g, at / extreme, &fitted);
            if (gain > best) best = gain, scale = fitted;
        }
    }
    for (int i = 0; i < GROUPED_REFITS && scale != 0; i++) {
        float gain = NAME(fit_symmetric)(g, 1.0f / scale, &fitted);
        if (!(gain > best)) break;
        best = gain, scale = fitted;
    }
    return (grouped_fit){scale, 0, 0};
}

/* The values are centred first: where they lie far from 0, the sums would lose the differences. */
INLINE grouped_fit NAME(search_asymmetric)(grouped_group *g, float low, float high)
{
    enum { WIDTHS = 11, SHIFTS = 5 };
    const float range = high - low, less = 0.64f / (g->top + 1), centre = low + range / 2;
    gp_f16x h = {0}, hx = {0}, hxx = {0};
    for (int i = 0; i < g->n; i++) {
        g->x[i] -= centre;
        const gp_f16x wx = g->h[i] * g->x[i];
        h += g->h[i], hx += wx, hxx += wx * g->x[i];
    }
    g->sum_h = NAME(sum)(h), g->sum_hx = NAME(sum)(hx), g->sum_hxx = NAME(sum)(hxx);
    low -= centre;
    grouped_fit best = {range / g->top, low, INFINITY};
    for (int i = 0; i < WIDTHS; i++) {
        for (int j = 0; j < SHIFTS && (i || !j); j++) {
            /* from the whole range down to 6 steps less, placed at either end and between */
            float width = range * (1.0f - less * i);
            float min = low + (range - width) * ((float)j / (SHIFTS - 1));
            grouped_fit first = NAME(fit_asymmetric)(g, min, g->top / width), second = first;
            if (first.scale != 0)
                second = NAME(fit_asymmetric)(g, first.min, 1.0f / first.scale);
            if (first.error < best.error) best = first;
            if (second.error < best.error) best = second;
        }
    }
    for (int i = 0; i < GROUPED_REFITS && best.scale != 0; i++) {
        grouped_fit fit = NAME(fit_asymmetric)(g, best.min, 1.0f / best.scale);
        if (!(fit.error < best.error)) break;
        best = fit;
    }
    best.min += centre;
    return best;
}

/* The scale and minimum of a group of `count` values, as halves; of values that are not finite, or that
 * no half reaches, NaN. h: their importance, or NULL. */
INLINE grouped_choice NAME(choose)(const float *x, const float *h, int64_t count, int bits, int asym,
                                   gp_search search)
{
    const grouped_choice none = {0, 0}, unreachable = {0x7e00, 0x7e00};
    float low = x[0], high = x[0], worst = 0;
    for (int64_t k = 0; k < count; k++) {
        low = x[k] < low ? x[k] : low;
        high = x[k] > high ? x[k] : high;
        worst += x[k] * 0.0f; /* NaN if any is not finite */
    }
    if (worst != worst) return unreachable;
    if (low == 0 && high == 0) return none;
    grouped_group g;
    g.n = (int)gp_ceil_div(count, 16);
    g.top = (float)((1 << bits) - 1);
    memset(g.x, 0, sizeof(g.x));
    memset(g.h, 0, sizeof(g.h));
    memcpy(g.x, x, (size_t)count * 4);
    for (int64_t k = 0; k < count; k++) ((float *)g.h)[k] = h ? h[k] : 1.0f;

    gp_f16x total = {0};
    for (int i = 0; i < g.n; i++) total += g.h[i];
    if (!(NAME(sum)(total) > 0)) /* nothing is known of them: then all count alike */
        for (int64_t k = 0; k < count; k++) ((float *)g.h)[k] = 1.0f;

    grouped_fit fit;
    const float extreme = high > -low ? high : low;
    if (asym) {
        fit = (grouped_fit){(high - low) / g.top, low, 0};
        if (search == GP_MSE && high > low) fit = NAME(search_asymmetric)(&g, low, high);
    } else {
        fit = (grouped_fit){fabsf(extreme) / ((g.top - 1) / 2), 0, 0};
        if (search == GP_MSE) fit = NAME(search_symmetric)(&g, extreme);
    }
    const grouped_choice found = {gp_float_to_f16(fit.scale), gp_float_to_f16(fit.min)};
    const bool reached = fabsf(gp_f16_to_float(found.scale)) < INFINITY &&
                         fabsf(gp_f16_to_float(found.min)) < INFINITY;
    return reached ? found : unreachable;
}

/* Columns [k0, k1) of row r: its q, and its scale (and minimum) as halves. */
INLINE void NAME(quantize_group)(const gp_grouped_quantize *a, int64_t r, int64_t k0, int64_t k1,
                                 uint8_t *q, uint16_t *halves)
{
    const float *x = a->x + r * a->stride + k0;
    const float *h = a->importance ? a->importance + k0 : NULL;
    const grouped_choice found = NAME(choose)(x, h, k1 - k0, a->bits, a->asym, a->search);
    const float top = (float)((1 << a->bits) - 1);
    const uint8_t zero = a->asym ? 0 : (uint8_t)(1 << (a->bits - 1));
    memset(q, zero, (size_t)(k1 - k0));
    halves[0] = found.scale, halves[1] = found.min;
    const float scale = gp_f16_to_float(found.scale), min = gp_f16_to_float(found.min);
    if (scale == 0 || scale != scale) return;
    const float inverse = 1.0f / scale;
    for (int64_t k = 0; k < k1 - k0; k += 16) {
        const int64_t n = gp_min(16, k1 - k0 - k);
        gp_f16x v = {0};
        memcpy(&v, x + k, (size_t)n * 4);
        v = NAME(grid)((v - min) * inverse, -(float)zero, top - (float)zero);
        for (int64_t i = 0; i < n; i++) q[k + i] = (uint8_t)(v[i] + zero);
    }
}

TARGET static void NAME(grouped_quantize_panel)(const gp_grouped_quantize *a)
{
    const int64_t blocks = gp_ceil_div(a->K, GP_BLOCK);
    const int per_group = (1 + a->asym) * GP_PANEL_ROWS;
    const int64_t block_bytes = GP_BLOCK_BYTES(a->bits);
    memset(a->w, a->asym ? 0 : a->bits == 4 ? 0x88 : 0x80, (size_t)(blocks * block_bytes));
    memset(a->scale, 0, (size_t)(gp_ceil_div(a->K, a->group) * per_group) * 2);
    for (int64_t r = 0; r < a->rows; r++) {
        for (int64_t k0 = 0, g = 0; k0 < a->K; k0 += a->group, g++) {
            const int64_t k1 = gp_min(k0 + a->group, a->K);
            uint8_t q[GP_GROUP_MAX];
            uint16_t halves[2];
            NAME(quantize_group)(a, r, k0, k1, q, halves);
            for (int i = 0; i <= a->asym; i++)
                a->scale[g * per_group + i * GP_PANEL_ROWS + r] = halves[i];
            for (int64_t k = k0; k < k1; k++) {
                const int64_t line = k / 4 % 8 % a->bits;
                uint8_t *byte = a->w + k / 32 * block_bytes + line * 64 + r * 4 + k % 4;
                if (a->bits == 8)
                    *byte = q[k - k0];
                else
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
