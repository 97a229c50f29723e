/* SPDX-License-Identifier: MIT
 *
 * The int8 half of attention_template.h, sums of 16 bits times 8. A register `words` holds WORDS integers of 16
 * bits, or half as many sums: words_dot adds the products of two neighbours to each, which are neighbours in a
 * row for the scores, the same element of two tokens for the values. Scores come in tiles of WORD_TILE sums
 * as there; of values the sums of WORD_STRIP registers of bytes stay in registers.
 */

/* q = rint(x * inverse) of n floats, a multiple of 16, of the largest magnitudes in `top`; returns the scale. */
INLINE float quantize_words(const float *x, int64_t n, v16 top, int16_t *q)
{
    const gp_word_grid grid = gp_grid_of_words(v16_bits(top));
    if (grid.inverse > 0)
        for (int64_t i = 0; i < n; i += 16)
            v16_store_words(q + i, v16_mul(v16_load(x + i), v16_set1(grid.inverse)));
    else
        memset(q, 0, (size_t)n * sizeof(int16_t));
    return grid.scale;
}

INLINE float quantize_query(const float *q, float scale, int64_t D, int16_t *words_of_q)
{
    float x[GP_HEAD_DIM_MAX];
    v16 top = v16_zero();
    int64_t d = 0;
    for (; d < D; d += 16) {
        const v16 v = v16_mul(v16_row(q, GP_F32, d, D - d), v16_set1(scale));
        v16_store(x + d, v);
        top = v16_absmax(top, v);
    }
    for (; d % WORDS; d += 16) v16_store(x + d, v16_zero());
    return quantize_words(x, d, top, words_of_q);
}

/* A row's dot products s become its weights w, whose scale is returned, in whole vectors; sum and maximum go to
 * `partial`. What it does not see has weight 0, whatever its scale. */
INLINE float weigh(const gp_attend *a, gp_span seen, float *s, float q_scale, const float *k_scale,
                   const float *v_scale, float *partial, int16_t *w)
{
    const int64_t begin = (seen.begin - a->from) / 16 * 16, end = seen.end - a->from, D = a->pages->D;
    v16 m = v16_set1(-INFINITY), sum = v16_zero(), top = v16_zero();
    for (int64_t t = begin; t < end; t += 16) {
        const v16 scaled = v16_mul(v16_mul(v16_load(s + t), v16_set1(q_scale)), v16_load(k_scale + t));
        const v16 x = v16_seen(scaled, a, seen, t, -INFINITY);
        v16_store(s + t, x);
        m = v16_max(x, m);
    }
    const float top_score = v16_highest(m);
    for (int64_t t = begin; t < end; t += 16) {
        const v16 p = v16_exp2(v16_sub(v16_load(s + t), v16_set1(top_score)));
        const v16 x = v16_seen(v16_mul(p, v16_load(v_scale + t)), a, seen, t, 0);
        sum = v16_add(sum, p);
        v16_store(s + t, x);
        top = v16_absmax(top, x);
    }
    partial[D] = top_score;
    partial[D + 1] = v16_fold(sum);
    return quantize_words(s + begin, gp_ceil_div(end, 16) * 16 - begin, top, w + begin);
}

/* (float)dot of R rows with TOKENS keys; q has rows of D_pad. */
INLINE void score_bytes_tile(const int8_t *k, const char *next, int64_t D, int full, const int16_t *q, int R,
                             int TOKENS, float *s)
{
    const int64_t D_pad = gp_ceil_div(D, WORDS) * WORDS;
    words sum[WORD_TILE];
    fetch(next, TOKENS * D);
    for (int i = 0; i < R * TOKENS; i++) sum[i] = words_zero();
    for (int64_t d = 0; d < D; d += WORDS) {
        words x[ROWS];
        for (int r = 0; r < R; r++) x[r] = words_load(q + r * D_pad + d);
        for (int t = 0; t < TOKENS; t++) {
            const words y = words_row(k + t * D + d, full ? WORDS : D - d);
            for (int r = 0; r < R; r++) sum[r * TOKENS + t] = words_dot(x[r], y, sum[r * TOKENS + t]);
        }
    }
    float folded[WORD_TILE];
    if (R * TOKENS == WORD_TILE)
        words_fold_tile(sum, folded);
    else
        for (int i = 0; i < R * TOKENS; i++) folded[i] = (float)words_fold(sum[i]);
    for (int r = 0; r < R; r++) memcpy(s + r * GP_CHUNK, folded + r * TOKENS, (size_t)TOKENS * sizeof(float));
}

INLINE void score_bytes_run(run keys, int64_t D, int full, const int16_t *q, int R, float *s)
{
    const int8_t *k = (const int8_t *)keys.data;
    int64_t t = 0;
    for (; t + WORD_TILE / R <= keys.n; t += WORD_TILE / R)
        score_bytes_tile(k + t * D, keys.next + t * D, D, full, q, R, WORD_TILE / R, s + keys.t + t);
    for (; t < keys.n; t++) score_bytes_tile(k + t * D, keys.next + t * D, D, full, q, R, 1, s + keys.t + t);
}

/* sum[r] += w v of one or two tokens and V registers of their rows: the halves low and high of each. */
INLINE void add_tokens(const int8_t *v, int64_t D, int64_t left, const int16_t *w, int TOKENS, int R, int V,
                       words sum[ROWS][2 * WORD_STRIP])
{
    words pair[2 * WORD_STRIP];
    for (int i = 0; i < V; i++) {
        const words x = words_row(v + i * WORDS, left);
        const words y = TOKENS == 2 ? words_row(v + D + i * WORDS, left) : words_zero();
        pair[2 * i] = words_low(x, y), pair[2 * i + 1] = words_high(x, y);
    }
    for (int r = 0; r < R; r++) {
        int32_t both = 0;
        memcpy(&both, w + r * GP_CHUNK, (size_t)TOKENS * sizeof(int16_t));
        for (int i = 0; i < 2 * V; i++) sum[r][i] = words_dot(pair[i], words_set1(both), sum[r][i]);
    }
}

/* total[r][d .. d + V WORDS) += sum over a run of w v, in the order that words_low and words_high leave. */
INLINE void bytes_strip(run values, int64_t D, int64_t d, int full, const int16_t *w, int R, int V,
                        int32_t (*total)[GP_HEAD_DIM_MAX])
{
    const int64_t left = full ? WORDS : D - d;
    const int8_t *v = (const int8_t *)values.data + d;
    words sum[ROWS][2 * WORD_STRIP];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2 * V; i++) sum[r][i] = words_load(total[r] + d + i * WORDS / 2);
    int64_t t = 0;
    for (; t + 2 <= values.n; t += 2) {
        for (int i = 0; i < 2; i++) fetch(values.next + (t + i) * D + d, V * WORDS);
        add_tokens(v + t * D, D, left, w + values.t + t, 2, R, V, sum);
    }
    if (t < values.n) {
        fetch(values.next + t * D + d, V * WORDS);
        add_tokens(v + t * D, D, left, w + values.t + t, 1, R, V, sum);
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2 * V; i++) words_store(total[r] + d + i * WORDS / 2, sum[r][i]);
}

INLINE void bytes_run(run values, int64_t D, const int16_t *w, int R, int32_t (*total)[GP_HEAD_DIM_MAX])
{
    int64_t d = 0;
    for (; d + WORD_STRIP * WORDS <= D; d += WORD_STRIP * WORDS)
        bytes_strip(values, D, d, 1, w, R, WORD_STRIP, total);
    for (; d + WORDS <= D; d += WORDS) bytes_strip(values, D, d, 1, w, R, 1, total);
    if (d < D) bytes_strip(values, D, d, 0, w, R, 1, total);
}

INLINE void attend_byte_rows(const gp_attend *a, int64_t first, int R, const float *k_scale,
                             const float *v_scale)
{
    const int64_t D = a->pages->D, D_pad = gp_ceil_div(D, WORDS) * WORDS;
    const gp_span any = seen_by_any(a, first, R);
    float s[ROWS * GP_CHUNK], q_scale[ROWS], w_scale[ROWS] = {0}, out[GP_HEAD_DIM_MAX];
    int16_t q[ROWS * GP_HEAD_DIM_MAX], w[ROWS * GP_CHUNK];
    int32_t total[ROWS][GP_HEAD_DIM_MAX];
    for (int r = 0; r < R; r++) {
        q_scale[r] = quantize_query(row_query(a, first + r), a->scale, D, q + r * D_pad);
        memset(total[r], 0, sizeof(total[r]));
    }
    for (int64_t slot = any.begin; slot < any.end;) {
        const run keys = run_at(a, any, 0, slot);
        if (D % WORDS)
            score_bytes_run(keys, D, 0, q, R, s);
        else
            score_bytes_run(keys, D, 1, q, R, s);
        slot += keys.n;
    }
    for (int r = 0; r < R; r++) {
        const gp_span seen = row_seen(a, first + r);
        int16_t *row = w + r * GP_CHUNK;
        memset(row + any.begin - a->from, 0, (size_t)(any.end - any.begin) * sizeof(int16_t));
        if (seen.begin < seen.end)
            w_scale[r] = weigh(a, seen, s + r * GP_CHUNK, q_scale[r], k_scale, v_scale,
                               a->partial + (first + r) * GP_PARTIAL(D), row);
    }
    for (int64_t slot = any.begin; slot < any.end;) {
        const run values = run_at(a, any, 1, slot);
        bytes_run(values, D, w, R, total);
        slot += values.n;
    }
    for (int r = 0; r < R; r++) {
        float *partial = a->partial + (first + r) * GP_PARTIAL(D);
        const gp_span seen = row_seen(a, first + r);
        if (seen.begin == seen.end) {
            gp_saw_nothing(partial, D);
            continue;
        }
        for (int64_t d = 0; d < D; d += WORDS)
            words_store_floats(words_load(total[r] + d), words_load(total[r] + d + WORDS / 2), w_scale[r], out + d);
        memcpy(partial, out, (size_t)D * sizeof(float));
    }
}
