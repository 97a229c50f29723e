/* SPDX-License-Identifier: MIT
 * What the attention kernels of every instruction set share. */
#ifndef GPU_POOR_ATTENTION_H
#define GPU_POOR_ATTENTION_H

#include <assert.h>
#include <math.h>

#include "common.h"

/* Where in `pages` the first element of a slot's key (part 0) or value (1) lies, and its index in `scales`. */
typedef struct {
    int64_t row, scale;
} gp_place;

/* From the beginning of a head's int8 keys or values to the first element of a slot, and from there to element d. */
GP_INLINE int64_t gp_byte_row(int part, int64_t D, int64_t slot)
{
    return part ? slot / 4 * 4 * D + slot % 4 : slot / GP_SLOTS * GP_SLOTS * D + slot % GP_SLOTS * 4;
}

GP_INLINE int64_t gp_byte_step(int part, int64_t d) { return part ? 4 * d : d / 4 * 4 * GP_SLOTS + d % 4; }

GP_INLINE gp_place gp_slot(const gp_pages *c, const int32_t *table, int part, int64_t head,
                           int64_t slot)
{
    const int64_t page = table[slot / c->page_size], at = slot % c->page_size;
    const int64_t first = (part * c->kv_heads + head) * c->page_size;
    const int64_t row = c->type == GP_I8 ? first * c->D + gp_byte_row(part, c->D, at) : (first + at) * c->D;
    return (gp_place){page * c->page_stride + row, page * c->scale_stride + first + at};
}

/* Element d of an int8 row, which begins at `at.row`. */
GP_INLINE int gp_get_byte(const gp_pages *c, int part, gp_place at, int64_t d)
{
    return ((const uint8_t *)c->pages)[at.row + gp_byte_step(part, d)] - 128;
}

GP_INLINE void gp_set_byte(const gp_pages *c, int part, gp_place at, int64_t d, int q)
{
    ((uint8_t *)c->pages)[at.row + gp_byte_step(part, d)] = (uint8_t)(q + 128);
}

/* 2^x for x <= 0, within 2 ulp; 0 below -126, a NaN stays one. 2^n by its bits, times a polynomial for the
 * rest in [-0.5, 0.5]: minimax of degree 6 with 2^0 = 1, relative error 2e-9 before rounding.
 * Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. */
#define GP_EXP2_ROUND 12582912.0f
#define GP_EXP2_POLYNOMIAL                                                                        \
    {0x1.41fbbcp-13f, 0x1.5f3e52p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f,            \
     0x1.62e430p-1f,  1.0f}

GP_INLINE float gp_exp2(float x)
{
    static const float c[] = GP_EXP2_POLYNOMIAL;
    if (x < -126) return 0;
    const float shifted = x + GP_EXP2_ROUND, f = x - (shifted - GP_EXP2_ROUND);
    float p = c[0];
    for (int i = 1; i < 7; i++) p = __builtin_fmaf(p, f, c[i]);
    return p * gp_from_bits((gp_bits(shifted) << 23) + 0x3f800000u);
}

/* How int8 pages are summed: a query row, or the weights of a chunk, as integers x * inverse of 16 bits, which
 * are 256 high + low of two signed bytes: 32639 = 256 * 127 + 127 is the largest. inverse is 0, and all the integers then, of zeros (the scale is 1) and of what holds no finite number (NaN). */
#define GP_WORD_MAX 32639
#define GP_WORDS (16 + GP_HEAD_DIM_MAX + 16) /* of a row, and zeros on both sides */
typedef struct {
    float scale, inverse;
} gp_word_grid;

/* The largest magnitude as bits, which order like magnitudes, a NaN or an infinity on top. */
GP_INLINE uint32_t gp_absmax(const float *x, int64_t n)
{
    uint32_t absmax = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = gp_bits(x[i]) & 0x7fffffffu;
        absmax = bits > absmax ? bits : absmax;
    }
    return absmax;
}

GP_INLINE gp_word_grid gp_grid_of_words(uint32_t absmax)
{
    const float top = gp_from_bits(absmax);
    if (absmax >= 0x7f800000u) return (gp_word_grid){NAN, 0};
    return top > GP_TINY ? (gp_word_grid){top / GP_WORD_MAX, GP_WORD_MAX / top} : (gp_word_grid){1, 0};
}

static_assert(GP_CHUNK <= GP_HEAD_DIM_MAX && 128LL * GP_WORD_MAX * GP_HEAD_DIM_MAX <= INT32_MAX,
              "sums of 16 bits times 8 are exact in int32");

/* What is left of a row that has seen nothing. */
GP_INLINE void gp_saw_nothing(float *partial, int64_t D)
{
    for (int64_t d = 0; d < D; d++) partial[d] = 0;
    partial[D] = -INFINITY, partial[D + 1] = 0;
}

/* The `attend_merge` and `attend_finish` of every instruction set: over d in vectors, whose lanes never meet.
 * A sum of p is at least 1, or a NaN, of a row that has seen something. */
GP_INLINE void gp_attend_merge(float *partial, const float *more, int64_t rows, int64_t D)
{
    for (int64_t r = 0; r < rows; r++, partial += GP_PARTIAL(D), more += GP_PARTIAL(D)) {
        const int lower = more[D] <= partial[D];
        const float w = gp_exp2(lower ? more[D] - partial[D] : partial[D] - more[D]);
        if (more[D + 1] == 0) continue;
        if (lower) {
            for (int64_t d = 0; d < D; d++) partial[d] = __builtin_fmaf(w, more[d], partial[d]);
            partial[D + 1] = __builtin_fmaf(w, more[D + 1], partial[D + 1]);
        } else {
            for (int64_t d = 0; d < D; d++) partial[d] = __builtin_fmaf(w, partial[d], more[d]);
            partial[D + 1] = __builtin_fmaf(w, partial[D + 1], more[D + 1]);
            partial[D] = more[D];
        }
    }
}

GP_INLINE void gp_attend_finish(const float *partial, int64_t rows, int64_t D, float *out)
{
    for (int64_t r = 0; r < rows; r++, partial += GP_PARTIAL(D), out += D) {
        const float inverse = partial[D + 1] == 0 ? 0 : 1 / partial[D + 1];
        for (int64_t d = 0; d < D; d++) out[d] = partial[d] * inverse;
    }
}

/* Scales that an int8 row may have: the float16 number nearest to absmax / 127, and those 4, 8, ... 60
 * places above it, up to 3 or 6 % larger. */
#define GP_PAGE_SCALES 16
#define GP_PAGE_SCALE_STEP 4

/* Whether a row can have this scale: it isn't 0, and finite. */
GP_INLINE int gp_page_live(uint16_t scale) { return scale - 1u < 0x7bffu; }

/* The scale, of those, that leaves the least error(x, D, scale): the sum of squares, in each instruction
 * set's vectors. Of a row of zeros, or with what is no finite number, one that is not live: 0 or NaN. */
GP_INLINE uint16_t gp_page_scale(const float *x, int64_t D, float (*error)(const float *, int64_t, float))
{
    const uint32_t absmax = gp_absmax(x, D);
    if (absmax >= 0x7f800000u) return 0x7e00;
    uint16_t scale = gp_float_to_f16(gp_from_bits(absmax) / 127), best = scale;
    float least = INFINITY;
    for (int i = 0; i < GP_PAGE_SCALES && gp_page_live(scale); i++, scale += GP_PAGE_SCALE_STEP) {
        const float e = error(x, D, gp_f16_to_float(scale));
        if (e < least) least = e, best = scale;
    }
    return best;
}

/* Clamped: the first scale may be rounded down. */
GP_INLINE float gp_page_value(float x, float inverse)
{
    const float q = __builtin_rintf(x * inverse);
    return q > 127 ? 127 : q < -127 ? -127 : q;
}

#endif
