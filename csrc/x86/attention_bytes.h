/* SPDX-License-Identifier: MIT
 *
 * The int8 half of attention_template.h. Of a page come `bytes`, LANES times four that lie beside each other:
 * elements of a key, or tokens of one element of the values. Their products with a `quad` of `words`, four
 * elements of a query or the weights of four tokens, are `sums`. The bytes are q + 128, which adds 128 times the
 * sum of the words to each: their `bias`. Sums may wrap on the way, but not what is left without that.
 */
#define BYTE_TILE 8 /* sums in registers, of so many heads times registers of bytes */
#define BYTE_STRIP(R) (BYTE_TILE / (R) < 4 ? BYTE_TILE / (R) : 4)

typedef struct {
    words x;
    float scale;
    int32_t bias;
} factors;

static_assert(GP_WORD_MAX * GP_HEAD_DIM_MAX < 1 << 24, "sums of words are exact as floats");

/* Words [begin, end) are rint(x * inverse), both multiples of 16; the largest magnitudes are in `top`. */
INLINE void quantize_words(const float *x, int64_t begin, int64_t end, v16 top, factors *f)
{
    const gp_word_grid grid = gp_grid_of_words(v16_bits(top));
    const v16 inverse = v16_set1(grid.inverse);
    v16 sum = v16_zero();
    for (int64_t i = begin; i < end; i += 16) {
        const v16 q = grid.inverse > 0 ? v16_rint(v16_mul(v16_load(x + i), inverse)) : v16_zero();
        sum = v16_add(sum, q);
        words_store(&f->x, i, q);
    }
    f->scale = grid.scale;
    f->bias = 128 * (int32_t)v16_fold(sum);
}

INLINE void quantize_queries(const gp_attend *a, int64_t first, int R, factors *q)
{
    const int64_t D = a->pages->D;
    float x[ROWS][GP_HEAD_DIM_MAX];
    v16 top[ROWS];
    for (int r = 0; r < R; r++) {
        top[r] = v16_zero();
        for (int64_t d = 0; d < D; d += 16) {
            const v16 v = v16_mul(v16_row(row_query(a, first + r), GP_F32, d, D - d), v16_set1(a->scale));
            v16_store(x[r] + d, v);
            top[r] = v16_absmax(top[r], v);
        }
    }
    for (int r = 0; r < R; r++) quantize_words(x[r], 0, gp_ceil_div(D, 16) * 16, top[r], q + r);
}

#define SCORES (16 + GP_CHUNK + 16) /* of a row: what tiles of slots at both ends of a chunk take */

/* R rows of scores, yet without the keys' scales, become weights, in whole vectors; sum and maximum go to
 * `partial`. What a row does not see has the weight 0, whatever its scale. All rows take each step together:
 * while one waits for the maximum of its lanes, there is something to do for another. */
INLINE void weigh(const gp_attend *a, int64_t first, int R, float *scores, const float *k_scale,
                  const float *v_scale, factors *w)
{
    const int64_t D = a->pages->D;
    const gp_span any = seen_by_any(a, first, R);
    float top_score[ROWS];
    v16 top[ROWS];
    for (int r = 0; r < R; r++) {
        const gp_span seen = row_seen(a, first + r);
        float *s = scores + r * SCORES;
        v16 m = v16_set1(-INFINITY);
        for (int64_t t = (seen.begin - a->from) / 16 * 16; t < seen.end - a->from; t += 16) {
            const v16 x = v16_seen(v16_mul(v16_load(s + t), v16_load(k_scale + t)), a, seen, t, -INFINITY);
            v16_store(s + t, x);
            m = v16_max(x, m);
        }
        top_score[r] = v16_highest(m);
    }
    for (int r = 0; r < R; r++) {
        const gp_span seen = row_seen(a, first + r);
        float *s = scores + r * SCORES, *partial = a->partial + (first + r) * GP_PARTIAL(D);
        v16 sum = v16_zero(), m = v16_zero();
        for (int64_t t = (seen.begin - a->from) / 16 * 16; t < seen.end - a->from; t += 16) {
            const v16 p = v16_exp2(v16_sub(v16_load(s + t), v16_set1(top_score[r])));
            const v16 x = v16_seen(v16_mul(p, v16_load(v_scale + t)), a, seen, t, 0);
            sum = v16_add(sum, p);
            v16_store(s + t, x);
            m = v16_absmax(m, x);
        }
        partial[D] = top_score[r];
        partial[D + 1] = v16_fold(sum);
        top[r] = m;
    }
    for (int r = 0; r < R; r++) {
        const gp_span seen = row_seen(a, first + r);
        const int64_t begin = (seen.begin - a->from) / 16 * 16, end = gp_ceil_div(seen.end - a->from, 16) * 16;
        quantize_words(scores + r * SCORES, begin, end, top[r], w + r);
        for (int64_t t = begin - 16; t > any.begin - a->from - 32; t -= 16) words_store(&w[r].x, t, v16_zero());
        for (int64_t t = end; t < any.end - a->from + 16; t += 16) words_store(&w[r].x, t, v16_zero());
    }
}

/* Scores of R rows with V registers of slots, from slot t of a run on, which is a tile's first. */
INLINE void score_slots(run keys, int64_t t, int64_t D, const factors *q, int R, int V, float *s)
{
    sums sum[BYTE_TILE];
    for (int i = 0; i < R * V; i++) sum[i] = sums_of(lanes_zero());
    for (int64_t d = 0; d < D; d += 4) {
        bytes k[4];
        for (int v = 0; v < V; v++) {
            const int64_t at = gp_byte_row(0, D, t + v * LANES) + gp_byte_step(0, d);
            k[v] = bytes_load(keys.data + at, LANES);
            if (v * LANES % GP_SLOTS == 0) fetch(keys.next + at, 64);
        }
        for (int r = 0; r < R; r++) {
            const quad x = quad_load(&q[r].x, d);
            for (int v = 0; v < V; v++) sum[r * V + v] = sums_dot(sum[r * V + v], k[v], x);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            lanes_store(lanes_of(sum[r * V + v]), q[r].bias, q[r].scale, s + r * SCORES + keys.t + t + v * LANES);
}

INLINE void score_bytes_run(run keys, int64_t D, const factors *q, int R, float *s)
{
    const int64_t n = gp_ceil_div(keys.n, LANES) * LANES, width = BYTE_STRIP(R) * LANES;
    int64_t t = 0;
    for (; t + width <= n; t += width) score_slots(keys, t, D, q, R, BYTE_STRIP(R), s);
    for (; t < n; t += LANES) score_slots(keys, t, D, q, R, 1, s);
}

/* total[r][d / LANES ...] += sum over a run of w v, for V registers of elements. */
INLINE void bytes_strip(run values, int64_t D, int64_t d, int64_t left, const factors *w, int R, int V,
                        lanes (*total)[GP_HEAD_DIM_MAX / LANES])
{
    sums sum[BYTE_TILE];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r * V + v] = sums_of(total[r][d / LANES + v]);
    for (int64_t t = 0; t < values.n; t += 4) {
        const int64_t at = gp_byte_row(1, D, t) + gp_byte_step(1, d);
        bytes y[4];
        fetch(values.next + at, V * LANES * 4);
        for (int v = 0; v < V; v++) y[v] = bytes_load(values.data + at + v * LANES * 4, left);
        for (int r = 0; r < R; r++) {
            const quad x = quad_load(&w[r].x, values.t + t);
            for (int v = 0; v < V; v++) sum[r * V + v] = sums_dot(sum[r * V + v], y[v], x);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][d / LANES + v] = lanes_of(sum[r * V + v]);
}

INLINE void bytes_run(run values, int64_t D, const factors *w, int R, lanes (*total)[GP_HEAD_DIM_MAX / LANES])
{
    const int64_t width = BYTE_STRIP(R) * LANES;
    int64_t d = 0;
    for (; d + width <= D; d += width) bytes_strip(values, D, d, LANES, w, R, BYTE_STRIP(R), total);
    for (; d + LANES <= D; d += LANES) bytes_strip(values, D, d, LANES, w, R, 1, total);
    if (d < D) bytes_strip(values, D, d, D - d, w, R, 1, total);
}

/* Slots are scored in whole tiles, and weighed in whole fours: what that takes in of slots that none of the
 * rows sees is not used, or has the weight 0. */
INLINE void attend_byte_rows(const gp_attend *a, int64_t first, int R, const float *k_scale,
                             const float *v_scale)
{
    const int64_t D = a->pages->D;
    const gp_span any = seen_by_any(a, first, R);
    float scores[ROWS * SCORES], *s = scores + 16, out[GP_HEAD_DIM_MAX];
    factors q[ROWS], w[ROWS];
    lanes total[ROWS][GP_HEAD_DIM_MAX / LANES];
    quantize_queries(a, first, R, q);
    for (int r = 0; r < R; r++)
        for (int64_t d = 0; d < D; d += LANES) total[r][d / LANES] = lanes_zero();
    for (int64_t slot = any.begin - any.begin % GP_SLOTS; slot < any.end;) {
        const run keys = run_at(a, any, 0, slot);
        score_bytes_run(keys, D, q, R, s);
        slot += keys.n;
    }
    weigh(a, first, R, s, k_scale, v_scale, w);
    for (int64_t slot = any.begin - any.begin % 4; slot < any.end;) {
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
        for (int64_t d = 0; d < D; d += LANES)
            lanes_store(total[r][d / LANES], w[r].bias, w[r].scale, out + d);
        memcpy(partial, out, (size_t)D * sizeof(float));
    }
}
