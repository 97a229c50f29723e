/* SPDX-License-Identifier: MIT
 *
 * csrc/attention.c's sums with its 16 lanes in registers; included once per instruction set with NAME, TARGET,
 * TILE, STRIP, the v16_* operations and fold4 defined.
 *
 * Up to four query heads go over the keys of a chunk together, then over its values, so a head is never
 * expanded, and what is read of a page for one of them serves all. Scores come in tiles of TILE sums:
 * that many keys and heads whose 16 lanes are folded at once.
 */
#define ROWS 4

INLINE float v16_fold(v16 v)
{
    __m128 x = fold4(v);
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/* What a run of slots within one page looks like to the loops. While one is read, `next` is fetched: the
 * keys' runs, then the values', then the next chunk's keys. Pages lie anywhere, so no hardware knows. One
 * core of Zen 5, 32 heads of 128 on 8, 8192 slots of int8: 5.9 GB/s without, 13 with. */
typedef struct {
    const char *data, *next;
    const uint16_t *scales;
    int64_t t, n; /* index in the chunk, slots */
} run;

INLINE void fetch(const char *x, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(x + i, _MM_HINT_T0);
}

INLINE run run_at(const gp_attend *a, int part, int64_t t)
{
    const gp_pages *c = a->pages;
    const int64_t slot = a->begin + t;
    const gp_place at = gp_slot(c, a->table, part, a->kv_head, slot);
    const int64_t n = gp_min(c->page_size - slot % c->page_size, a->end - slot);
    run found = {(const char *)c->pages + at.row * gp_size(c->type), NULL,
                 c->scales ? c->scales + at.scale : NULL, t, n};
    found.next = found.data;
    int64_t after = slot + n;
    if (after == a->end) part ^= 1, after = part ? a->begin : a->end;
    if (after < a->limit)
        found.next = (const char *)c->pages +
                     gp_slot(c, a->table, part, a->kv_head, after).row * gp_size(c->type);
    return found;
}

/* s[r][t .. t + TOKENS) of R rows; q has rows of D_pad, zero beyond D. */
INLINE void score_tile(const char *k, const char *next, gp_dtype type, int64_t D, int full, const float *q, int R,
                       int TOKENS, float *s)
{
    const int64_t D_pad = gp_ceil_div(D, 16) * 16, row = D * gp_size(type);
    v16 sum[TILE];
    fetch(next, TOKENS * row);
    for (int i = 0; i < R * TOKENS; i++) sum[i] = v16_zero();
    for (int64_t d = 0; d < D; d += 16) {
        v16 x[ROWS];
        for (int r = 0; r < R; r++) x[r] = v16_load(q + r * D_pad + d);
        for (int t = 0; t < TOKENS; t++) {
            const v16 y = v16_row(k + t * row, type, d, full ? 16 : D - d);
            for (int r = 0; r < R; r++) sum[r * TOKENS + t] = v16_fma(x[r], y, sum[r * TOKENS + t]);
        }
    }
    if (R * TOKENS == TILE) {
        float folded[TILE];
        v16_fold_tile(sum, folded);
        for (int r = 0; r < R; r++)
            memcpy(s + r * GP_CHUNK, folded + r * TOKENS, (size_t)TOKENS * sizeof(float));
    } else {
        for (int i = 0; i < R * TOKENS; i++)
            s[i / TOKENS * GP_CHUNK + i % TOKENS] = v16_fold(sum[i]);
    }
}

INLINE void score_run(run keys, gp_dtype type, int64_t D, int full, const float *q, int R, float *s)
{
    const int64_t row = D * gp_size(type);
    int64_t t = 0;
    for (; t + TILE / R <= keys.n; t += TILE / R)
        score_tile(keys.data + t * row, keys.next + t * row, type, D, full, q, R, TILE / R,
                   s + keys.t + t);
    for (; t < keys.n; t++)
        score_tile(keys.data + t * row, keys.next + t * row, type, D, full, q, R, 1, s + keys.t + t);
}

/* out[r][d .. d + 16 V) += sum of w v over a run, token by token. */
INLINE void value_strip(run values, gp_dtype type, int64_t D, int64_t d, int full, const float *w,
                        int R, int V, float *const *out)
{
    v16 sum[ROWS][STRIP];
    const int64_t row = D * gp_size(type);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = v16_load(out[r] + d + 16 * v);
    for (int64_t t = 0; t < values.n; t++) {
        v16 y[STRIP];
        fetch(values.next + t * row + d * gp_size(type), 16 * V * gp_size(type));
        for (int v = 0; v < V; v++)
            y[v] = v16_row(values.data + t * row, type, d + 16 * v, full ? 16 : D - d);
        for (int r = 0; r < R; r++) {
            const v16 x = v16_set1(w[r * GP_CHUNK + values.t + t]);
            for (int v = 0; v < V; v++) sum[r][v] = v16_fma(x, y[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) v16_store(out[r] + d + 16 * v, sum[r][v]);
}

INLINE void value_run(run values, gp_dtype type, int64_t D, const float *w, int R, float *const *out)
{
    int64_t d = 0;
    for (; d + 16 * STRIP <= D; d += 16 * STRIP)
        value_strip(values, type, D, d, 1, w, R, STRIP, out);
    for (; d + 16 <= D; d += 16) value_strip(values, type, D, d, 1, w, R, 1, out);
    if (d < D) value_strip(values, type, D, d, 0, w, R, 1, out);
}

/* p of a row's n scores, in their place; returns their sum. */
INLINE float soften(float *s, int64_t n, float *top)
{
    const int64_t n_pad = gp_ceil_div(n, 16) * 16;
    for (int64_t t = n; t < n_pad; t++) s[t] = -INFINITY; /* adds 0 */
    v16 m = v16_set1(-INFINITY), sum = v16_zero();
    for (int64_t t = 0; t < n_pad; t += 16) m = v16_max(v16_load(s + t), m);
    *top = v16_highest(m);
    for (int64_t t = 0; t < n_pad; t += 16) {
        const v16 p = v16_exp2(v16_sub(v16_load(s + t), v16_set1(*top)));
        sum = v16_add(sum, p);
        v16_store(s + t, p);
    }
    return v16_fold(sum);
}

INLINE void attend_rows(const gp_attend *a, int64_t first, int R, gp_dtype type)
{
    const int64_t D = a->pages->D, D_pad = gp_ceil_div(D, 16) * 16, n = a->end - a->begin;
    float q[ROWS * GP_HEAD_DIM_MAX], s[ROWS * GP_CHUNK], last[ROWS][GP_HEAD_DIM_MAX];
    float *out[ROWS];
    for (int r = 0; r < R; r++) {
        const float *x = a->q + (first + r) * D;
        /* The partial sums in memory padded to the lanes of a vector, copied out at the end. */
        out[r] = last[r];
        for (int64_t d = 0; d < D_pad; d++) {
            q[r * D_pad + d] = d < D ? x[d] * a->scale : 0;
            out[r][d] = 0;
        }
    }
    for (int64_t t = 0; t < n;) {
        const run keys = run_at(a, 0, t);
        if (D % 16)
            score_run(keys, type, D, 0, q, R, s);
        else
            score_run(keys, type, D, 1, q, R, s);
        t += keys.n;
    }
    for (int r = 0; r < R; r++) {
        float *partial = a->partial + (first + r) * GP_PARTIAL(D);
        partial[D + 1] = soften(s + r * GP_CHUNK, n, partial + D);
    }
    for (int64_t t = 0; t < n;) {
        const run values = run_at(a, 1, t);
        value_run(values, type, D, s, R, out);
        t += values.n;
    }
    for (int r = 0; r < R; r++)
        memcpy(a->partial + (first + r) * GP_PARTIAL(D), out[r], (size_t)D * sizeof(float));
}

#include "attention_bytes.h"

/* Scales of a chunk's slots as floats; 1 beyond them. */
INLINE void load_scales(const gp_attend *a, int part, float *scale)
{
    const int64_t n = a->end - a->begin;
    for (run r = run_at(a, part, 0); r.n; r = run_at(a, part, r.t + r.n)) {
        int64_t t = 0;
        for (; t + 16 <= r.n; t += 16)
            v16_store(scale + r.t + t, v16_row(r.scales + t, GP_F16, 0, 16));
        for (; t < r.n; t++) scale[r.t + t] = gp_f16_to_float(r.scales[t]);
        if (r.t + r.n == n) break;
    }
    for (int64_t t = n; t % 16; t++) scale[t] = 1;
}

/* rows_of(a, first, R, ...) for all query heads, with constants for R. */
#define IN_FOURS(rows_of, a, ...)                                                                 \
    do {                                                                                          \
        int64_t r = 0;                                                                            \
        for (; r + 4 <= (a)->rows; r += 4) rows_of(a, r, 4, __VA_ARGS__);                         \
        if ((a)->rows - r >= 2) rows_of(a, r, 2, __VA_ARGS__), r += 2;                            \
        if ((a)->rows - r) rows_of(a, r, 1, __VA_ARGS__);                                         \
    } while (0)

INLINE void attend_bytes(const gp_attend *a)
{
    float k_scale[GP_CHUNK], v_scale[GP_CHUNK];
    load_scales(a, 0, k_scale);
    load_scales(a, 1, v_scale);
    IN_FOURS(attend_byte_rows, a, k_scale, v_scale);
}

TARGET static void NAME(attend_chunk)(const gp_attend *a)
{
    switch (a->pages->type) {
    case GP_F32: IN_FOURS(attend_rows, a, GP_F32); break;
    case GP_BF16: IN_FOURS(attend_rows, a, GP_BF16); break;
    case GP_F16: IN_FOURS(attend_rows, a, GP_F16); break;
    default: attend_bytes(a);
    }
}

TARGET static void NAME(attend_combine)(const float *partial, int64_t n, int64_t stride, int64_t D,
                                        float *out)
{
    gp_attend_combine(partial, n, stride, D, out);
}

/* `x` is padded with zeros. */
INLINE float page_error(const float *x, int64_t D, float scale)
{
    const v16 by = v16_set1(scale), inverse = v16_set1(1 / scale), minus = v16_set1(-0.0f);
    v16 sum = v16_zero();
    for (int64_t d = 0; d < D; d += 16) {
        const v16 v = v16_load(x + d), q = v16_page_value(v16_mul(v, inverse));
        const v16 e = v16_fma(v16_xor(q, minus), by, v);
        sum = v16_fma(e, e, sum);
    }
    return v16_fold(sum);
}

/* Any D but of int8 rows, which have at most GP_HEAD_DIM_MAX. */
TARGET static uint16_t NAME(page_store_row)(const float *x_in, int64_t D, gp_dtype type, void *y)
{
    int64_t d = 0;
    if (type != GP_I8) {
        for (; d + 16 <= D; d += 16) v16_store_as(y, type, d, v16_load(x_in + d));
        for (; d < D; d++) gp_store(y, type, d, x_in[d]);
        return 0;
    }
    float x[GP_HEAD_DIM_MAX];
    for (; d < D; d++) x[d] = x_in[d];
    for (; d % 16; d++) x[d] = 0;
    const uint16_t scale = gp_page_scale(x, D, page_error);
    if (!gp_page_live(scale)) {
        memset(y, 0, (size_t)D);
        return scale;
    }
    const float inverse = 1 / gp_f16_to_float(scale);
    for (d = 0; d + 16 <= D; d += 16)
        v16_store_bytes((int8_t *)y + d, v16_page_value(v16_mul(v16_load(x + d), v16_set1(inverse))));
    for (; d < D; d++) ((int8_t *)y)[d] = (int8_t)gp_page_value(x[d], inverse);
    return scale;
}
