/* SPDX-License-Identifier: MIT
 *
 * csrc/attention.c's sums with its 16 lanes in registers; included once per instruction set with NAME, TARGET,
 * TILE, STRIP, the v16_* operations and fold4 defined.
 *
 * Up to four rows, query heads of one token or more, go over the keys of a chunk together, then over its
 * values, so a head is never expanded, and what is read of a page for one of them serves all. Scores come in
 * tiles of TILE sums: that many keys and rows whose 16 lanes are folded at once. Scores and weights of a slot
 * lie at its place in the chunk.
 */
#define ROWS 4

INLINE float v16_fold(v16 v)
{
    __m128 x = fold4(v);
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/* What a run of slots within one page looks like to the loops. While one is read, `next` is fetched, the run
 * AHEAD bytes or a page further on: of keys, then of the values, then of the keys that follow. Pages lie
 * anywhere, so no hardware knows. One core of Zen 5, 32 heads of 128 on 8, 8192 slots of int8: 5.9 GB/s
 * without, 13 with. */
#define AHEAD 8192
typedef struct {
    const char *data, *next;
    const uint16_t *scales;
    int64_t t, n; /* place in the chunk, slots */
} run;

INLINE void fetch(const char *x, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(x + i, _MM_HINT_T0);
}

/* Of part 0, keys, or 1, values: the run of `seen` from `slot` on. */
INLINE run run_at(const gp_attend *a, gp_span seen, int part, int64_t slot)
{
    const gp_pages *c = a->pages;
    const gp_place at = gp_slot(c, a->table, part, a->kv_head, slot);
    const int64_t n = gp_min(c->page_size - slot % c->page_size, seen.end - slot), row = c->D * gp_size(c->type);
    run found = {(const char *)c->pages + at.row * gp_size(c->type), NULL,
                 c->scales ? c->scales + at.scale : NULL, slot - a->from, n};
    found.next = found.data;
    int64_t after = slot - slot % c->page_size + gp_ceil_div(AHEAD, c->page_size * row) * c->page_size;
    if (after >= seen.end) part ^= 1, after += part ? seen.begin - seen.end : 0;
    if (after < a->limit)
        found.next = (const char *)c->pages +
                     gp_slot(c, a->table, part, a->kv_head, after).row * gp_size(c->type);
    return found;
}

/* Rows are the heads of all tokens in turn. */
INLINE const float *row_query(const gp_attend *a, int64_t row)
{
    return a->q + row / a->heads * a->q_stride + row % a->heads * a->pages->D;
}
INLINE gp_span row_seen(const gp_attend *a, int64_t row) { return a->seen[row / a->heads]; }

/* What any of R rows sees, and what all of them see: an empty span within the first, if there is nothing. */
INLINE gp_span seen_by_any(const gp_attend *a, int64_t first, int R)
{
    return (gp_span){row_seen(a, first).begin, row_seen(a, first + R - 1).end};
}
INLINE gp_span seen_by_all(const gp_attend *a, int64_t first, int R)
{
    const gp_span all = {row_seen(a, first + R - 1).begin, row_seen(a, first).end};
    return all.begin < all.end ? all : (gp_span){all.begin, all.begin};
}

/* x of slots [t, t + 16) of the chunk that are seen, `other` of the rest. */
INLINE v16 v16_seen(v16 x, const gp_attend *a, gp_span seen, int64_t t, float other)
{
    const int64_t begin = seen.begin - a->from - t;
    if (begin <= 0 && seen.end - a->from - t >= 16) return x;
    return v16_within(x, begin > 0 ? begin : 0, seen.end - a->from - t, other);
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

/* p of a row's scores, in their place, in whole vectors; returns their sum. */
INLINE float soften(const gp_attend *a, gp_span seen, float *s, float *top)
{
    const int64_t begin = (seen.begin - a->from) / 16 * 16, end = seen.end - a->from;
    v16 m = v16_set1(-INFINITY), sum = v16_zero();
    for (int64_t t = begin; t < end; t += 16) {
        const v16 x = v16_seen(v16_load(s + t), a, seen, t, -INFINITY); /* whose p is 0 */
        m = v16_max(x, m);
        v16_store(s + t, x);
    }
    *top = v16_highest(m);
    for (int64_t t = begin; t < end; t += 16) {
        const v16 p = v16_exp2(v16_sub(v16_load(s + t), v16_set1(*top)));
        sum = v16_add(sum, p);
        v16_store(s + t, p);
    }
    return v16_fold(sum);
}

/* out[r] += sum of w v of a span. */
INLINE void add_values(const gp_attend *a, gp_span span, gp_dtype type, const float *w, int R, float *const *out)
{
    for (int64_t slot = span.begin; slot < span.end;) {
        const run values = run_at(a, span, 1, slot);
        value_run(values, type, a->pages->D, w, R, out);
        slot += values.n;
    }
}

INLINE void attend_rows(const gp_attend *a, int64_t first, int R, gp_dtype type)
{
    const int64_t D = a->pages->D, D_pad = gp_ceil_div(D, 16) * 16;
    const gp_span any = seen_by_any(a, first, R), all = seen_by_all(a, first, R);
    float q[ROWS * GP_HEAD_DIM_MAX], s[ROWS * GP_CHUNK], sums[ROWS][GP_HEAD_DIM_MAX];
    float *out[ROWS];
    for (int r = 0; r < R; r++) {
        const float *x = row_query(a, first + r);
        /* The partial sums in memory padded to the lanes of a vector, copied out at the end. */
        out[r] = sums[r];
        for (int64_t d = 0; d < D_pad; d++) {
            q[r * D_pad + d] = d < D ? x[d] * a->scale : 0;
            out[r][d] = 0;
        }
    }
    for (int64_t slot = any.begin; slot < any.end;) {
        const run keys = run_at(a, any, 0, slot);
        if (D % 16)
            score_run(keys, type, D, 0, q, R, s);
        else
            score_run(keys, type, D, 1, q, R, s);
        slot += keys.n;
    }
    for (int r = 0; r < R; r++) {
        float *partial = a->partial + (first + r) * GP_PARTIAL(D);
        const gp_span seen = row_seen(a, first + r);
        if (seen.begin < seen.end) partial[D + 1] = soften(a, seen, s + r * GP_CHUNK, partial + D);
    }
    /* Each row's in order, and nothing else: 0 times what a row must not see may be a NaN. */
    for (int r = 0; r < R; r++) {
        const gp_span seen = row_seen(a, first + r), before = {seen.begin, gp_min(seen.end, all.begin)};
        add_values(a, before, type, s + r * GP_CHUNK, 1, out + r);
    }
    add_values(a, all, type, s, R, out);
    for (int r = 0; r < R; r++) {
        const gp_span seen = row_seen(a, first + r), after = {gp_max(seen.begin, all.end), seen.end};
        float *partial = a->partial + (first + r) * GP_PARTIAL(D);
        add_values(a, after, type, s + r * GP_CHUNK, 1, out + r);
        if (seen.begin < seen.end)
            memcpy(partial, out[r], (size_t)D * sizeof(float));
        else
            gp_saw_nothing(partial, D);
    }
}

#include "attention_bytes.h"

/* Scales of the chunk's slots that are seen as floats. */
INLINE void load_scales(const gp_attend *a, gp_span seen, int part, float *scale)
{
    for (int64_t slot = seen.begin; slot < seen.end;) {
        const run r = run_at(a, seen, part, slot);
        int64_t t = 0;
        for (; t + 16 <= r.n; t += 16)
            v16_store(scale + r.t + t, v16_row(r.scales + t, GP_F16, 0, 16));
        for (; t < r.n; t++) scale[r.t + t] = gp_f16_to_float(r.scales[t]);
        slot += r.n;
    }
}

/* rows_of(a, first, R, ...) for all rows, with constants for R. */
#define IN_FOURS(rows_of, a, ...)                                                                 \
    do {                                                                                          \
        const int64_t rows = (a)->tokens * (a)->heads;                                            \
        int64_t r = 0;                                                                            \
        for (; r + 4 <= rows; r += 4) rows_of(a, r, 4, __VA_ARGS__);                              \
        if (rows - r >= 2) rows_of(a, r, 2, __VA_ARGS__), r += 2;                                 \
        if (rows - r) rows_of(a, r, 1, __VA_ARGS__);                                              \
    } while (0)

INLINE void attend_bytes(const gp_attend *a)
{
    const gp_span any = seen_by_any(a, 0, (int)(a->tokens * a->heads));
    float k_scale[GP_CHUNK], v_scale[GP_CHUNK];
    load_scales(a, any, 0, k_scale);
    load_scales(a, any, 1, v_scale);
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

TARGET static void NAME(attend_merge)(float *partial, const float *more, int64_t rows, int64_t D)
{
    gp_attend_merge(partial, more, rows, D);
}

TARGET static void NAME(attend_finish)(const float *partial, int64_t rows, int64_t D, float *out)
{
    gp_attend_finish(partial, rows, D, out);
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
