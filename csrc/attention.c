/* SPDX-License-Identifier: MIT
 *
 * Reference attention over a cache in pages: softmax(q . k * scale) v, with the sequence cut into chunks of
 * GP_CHUNK slots that are merged in their order (Dao et al., arXiv:2205.14135; the split over the sequence is
 * flash decoding). The chunks are counted from the first token that isn't padding, and each query is alone, so
 * neither pages nor batch, padding, threads or the other tokens of a call change a bit of the result.
 *
 *     s[t] = dot(q * scale, k[t])       scale holds log2 e
 *     p[t] = 2^(s[t] - m)
 *     out  = sum of p[t] v[t]
 *
 * Sums whose order matters are kept in 16 lanes, element i of a head, or slot i of a chunk, in lane i % 16, and
 * folded in halves: lane l + 8 to l, l + 4 to l, and so on. That is the vector of AVX-512, and two of AVX2.
 *
 * Rows of int8 are summed as integers, whose order does not matter. For that q * scale, and the weights of
 * a chunk, become integers of 16 bits, each row with a scale of its own; what the pages hold stays as it is:
 *
 *     s[t] = dot(q16, k8[t]) * q_scale * k_scale[t]
 *     w[t] = p[t] * v_scale[t]
 *     out  = sum of w16[t] v8[t], * w_scale
 *
 * Each operation rounds once, in that order, and so do the exact sums when they become floats.
 */
#include "attention.h"

static float fold(float lane[16])
{
    for (int width = 8; width; width /= 2)
        for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    return lane[0];
}

static float dot_row(const float *q, const void *k, gp_dtype type, int64_t at, int64_t D)
{
    float lane[16] = {0};
    for (int64_t d = 0; d < D; d++) lane[d % 16] = fmaf(q[d], gp_load(k, type, at + d), lane[d % 16]);
    return fold(lane);
}

/* q = rint(x * GP_WORD_MAX / absmax); returns the scale. */
static float quantize(const float *x, int64_t n, int16_t *q)
{
    const gp_word_grid grid = gp_grid_of_words(gp_absmax(x, n));
    for (int64_t i = 0; i < n; i++) q[i] = grid.inverse > 0 ? (int16_t)rintf(x[i] * grid.inverse) : 0;
    return grid.scale;
}

static float score_bytes(const int16_t *q, float q_scale, const gp_pages *c, gp_place k)
{
    int32_t sum = 0;
    for (int64_t d = 0; d < c->D; d++) sum += q[d] * gp_get_byte(c, 0, k, d);
    return (float)sum * q_scale * gp_f16_to_float(c->scales[k.scale]);
}

static void sum_values(const gp_attend *a, gp_span seen, const float *p, float *out)
{
    const gp_pages *c = a->pages;
    for (int64_t d = 0; d < c->D; d++) out[d] = 0;
    for (int64_t slot = seen.begin; slot < seen.end; slot++) {
        const gp_place v = gp_slot(c, a->table, 1, a->kv_head, slot);
        for (int64_t d = 0; d < c->D; d++)
            out[d] = fmaf(p[slot - a->from], gp_load(c->pages, c->type, v.row + d), out[d]);
    }
}

static void sum_bytes(const gp_attend *a, gp_span seen, const float *p, float *out)
{
    const gp_pages *c = a->pages;
    int32_t sum[GP_HEAD_DIM_MAX] = {0};
    int16_t w16[GP_CHUNK];
    float w[GP_CHUNK] = {0};
    for (int64_t slot = seen.begin; slot < seen.end; slot++) {
        const gp_place v = gp_slot(c, a->table, 1, a->kv_head, slot);
        w[slot - a->from] = p[slot - a->from] * gp_f16_to_float(c->scales[v.scale]);
    }
    const float w_scale = quantize(w, GP_CHUNK, w16);
    for (int64_t slot = seen.begin; slot < seen.end; slot++) {
        const gp_place v = gp_slot(c, a->table, 1, a->kv_head, slot);
        for (int64_t d = 0; d < c->D; d++) sum[d] += w16[slot - a->from] * gp_get_byte(c, 1, v, d);
    }
    for (int64_t d = 0; d < c->D; d++) out[d] = (float)sum[d] * w_scale;
}

static void attend_row(const gp_attend *a, gp_span seen, const float *q_in, float *partial)
{
    const gp_pages *c = a->pages;
    const int64_t D = c->D;
    const int bytes = c->type == GP_I8;
    float q[GP_HEAD_DIM_MAX], p[GP_CHUNK], lane[16] = {0}, m = -INFINITY;
    int16_t q16[GP_HEAD_DIM_MAX];
    if (seen.begin == seen.end) {
        gp_saw_nothing(partial, D);
        return;
    }
    for (int64_t d = 0; d < D; d++) q[d] = q_in[d] * a->scale;
    const float q_scale = bytes ? quantize(q, D, q16) : 1;
    for (int64_t slot = seen.begin; slot < seen.end; slot++) {
        const gp_place k = gp_slot(c, a->table, 0, a->kv_head, slot);
        const float s = bytes ? score_bytes(q16, q_scale, c, k) : dot_row(q, c->pages, c->type, k.row, D);
        p[slot - a->from] = s;
        if (s > m) m = s;
    }
    for (int64_t t = seen.begin - a->from; t < seen.end - a->from; t++) {
        p[t] = gp_exp2(p[t] - m);
        lane[t % 16] += p[t];
    }
    (bytes ? sum_bytes : sum_values)(a, seen, p, partial);
    partial[D] = m;
    partial[D + 1] = fold(lane);
}

static void attend_chunk_ref(const gp_attend *a)
{
    const int64_t D = a->pages->D;
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t h = 0; h < a->heads; h++)
            attend_row(a, a->seen[t], a->q + t * a->q_stride + h * D,
                       a->partial + (t * a->heads + h) * GP_PARTIAL(D));
}

static void attend_merge_ref(float *partial, const float *more, int64_t rows, int64_t D)
{
    gp_attend_merge(partial, more, rows, D);
}

static void attend_finish_ref(const float *partial, int64_t rows, int64_t D, float *out)
{
    gp_attend_finish(partial, rows, D, out);
}

/* q = rint(x / scale), with the scale as it is stored, of the GP_PAGE_SCALES that leaves the least squared
 * error. A row has few elements, so the luck of their rounding differs: in rows of 8, 64 and 128 normal
 * values the best of 16 leaves 0.60, 0.88 and 0.92 times the squared error of the first one, absmax / 127. */
static float squared_error(const float *x, int64_t D, float scale)
{
    const float inverse = 1 / scale;
    float lane[16] = {0};
    for (int64_t d = 0; d < D; d++) {
        const float e = fmaf(-gp_page_value(x[d], inverse), scale, x[d]);
        lane[d % 16] = fmaf(e, e, lane[d % 16]);
    }
    return fold(lane);
}

static uint16_t page_store_row_ref(const float *x, int64_t D, gp_dtype type, void *y)
{
    if (type != GP_I8) {
        for (int64_t d = 0; d < D; d++) gp_store(y, type, d, x[d]);
        return 0;
    }
    const uint16_t scale = gp_page_scale(x, D, squared_error);
    if (!gp_page_live(scale)) {
        memset(y, 0, (size_t)D);
        return scale;
    }
    const float inverse = 1 / gp_f16_to_float(scale);
    for (int64_t d = 0; d < D; d++) ((int8_t *)y)[d] = (int8_t)gp_page_value(x[d], inverse);
    return scale;
}

const gp_impl gp_impl_attention_ref = {
    .name = "ref",
    .page_store_row = page_store_row_ref,
    .attend_chunk = attend_chunk_ref,
    .attend_merge = attend_merge_ref,
    .attend_finish = attend_finish_ref,
};
