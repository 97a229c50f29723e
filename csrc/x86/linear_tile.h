/* SPDX-License-Identifier: MIT
 *
 * The loops around a tile of dot products, shared by the AVX2 and AVX-512 linears; the includer
 * supplies, always inlined with a constant V:
 *     dot_tile(w[4], x, x_stride, K, V, out[V])    4 weight rows x V activation rows, lanes = rows
 *     exact(sum, x_sum)                            its integer dot product
 *     float_tile(w[4], type, ...)                  the same with float activations; w of any type
 *
 * STREAM_ROWS, up to how many activation rows the weights are read as streams, and STREAM_HINT.
 */
#ifndef GPU_POOR_LINEAR_TILE_H
#define GPU_POOR_LINEAR_TILE_H

#include <immintrin.h>

#include "../common.h"

/* With each line read of a stream. Two threads, of a best read loop of 33.4 GB/s, a16, M = 1 and 2:
 * no prefetch 29.6 and 27.2, from 512 bytes ahead 32.8 and 28, from 2048 33.8 and 33.0; one stream
 * in place of four, prefetched into L2 too, 28. Beyond the end it is harmless: it never faults. */
#define PREFETCH_STREAM(w) _mm_prefetch((const char *)(w) + 2048, STREAM_HINT)

/* Activation rows to a block: 512 KB of them, a multiple of V_MAX (an even number: both planes).
 * Of all rows at once, 2 MB, AVX512-VNNI made 0.28 TOPS a core; of 128 KB 0.55, 512 KB 0.60. */
#define TILE_BLOCK(row_bytes, V_MAX) (((1 << 19) / ((row_bytes) + 1) / (V_MAX) + 1) * (V_MAX))

void gp_int8_linear_ref(const gp_int8_linear *a, int64_t n0, int64_t n1);

/* Which four weight rows a tile takes: n, n + step, ... Rows at and beyond `end` repeat the last one
 * and are not stored. */
typedef struct {
    int64_t n, step, end;
} gp_rows;

#define TILE_STORE(attr)                                                                          \
    GP_INLINE attr void tile_store(void *y, gp_dtype type, int64_t row, gp_rows at, __m128 v)     \
    {                                                                                             \
        if (at.step == 1 && at.n + 4 <= at.end && type == GP_F32) {                               \
            _mm_storeu_ps((float *)y + row + at.n, v);                                            \
            return;                                                                               \
        }                                                                                         \
        float f[4];                                                                               \
        _mm_storeu_ps(f, v);                                                                      \
        for (int64_t r = 0, n = at.n; r < 4 && n < at.end; r++, n += at.step)                     \
            gp_store(y, type, row + n, f[r]);                                                     \
    }

#define TILE_ROWS(a, at, w, type)                                                                 \
    const int8_t *w[4];                                                                           \
    float w_scale[4], bias[4] = {0};                                                              \
    for (int64_t r = 0; r < 4; r++) {                                                             \
        int64_t row = gp_min(at.n + r * at.step, at.end - 1);                                     \
        w[r] = (const int8_t *)a->w + row * a->K * gp_size(type);                                 \
        w_scale[r] = a->w_scale ? a->w_scale[row] : 1.0f;                                         \
        if (a->bias) bias[r] = a->bias[row];                                                      \
    }                                                                                             \
    const __m128 scale4 = _mm_loadu_ps(w_scale), bias4 = _mm_loadu_ps(bias)

/* t -> y in the order the contract fixes; adding an absent bias could turn -0 into 0. */
#define TILE_FINISH(a, t)                                                                         \
    t = _mm_mul_ps(t, scale4);                                                                    \
    if (a->bias) t = _mm_add_ps(t, bias4)

#define TILE_CASE(name, V, V_MAX)                                                                 \
    case V:                                                                                       \
        if (V_MAX > V) name##_tokens(a, w, v, V, at, scale4, bias4);                              \
        break;

/* One tile row for activation rows [v0, v1). */
#define TILE_VECTORS(name, attr, args_type, type, V_MAX)                                          \
    GP_INLINE attr void name##_rows(const args_type *a, gp_rows at, int64_t v0, int64_t v1)       \
    {                                                                                             \
        TILE_ROWS(a, at, w, type);                                                                \
        int64_t v = v0;                                                                           \
        for (; v + V_MAX <= v1; v += V_MAX) name##_tokens(a, w, v, V_MAX, at, scale4, bias4);     \
        switch (v1 - v) {                                                                         \
            TILE_CASE(name, 1, V_MAX)                                                             \
            TILE_CASE(name, 2, V_MAX)                                                             \
            TILE_CASE(name, 3, V_MAX)                                                             \
            TILE_CASE(name, 4, V_MAX)                                                             \
            TILE_CASE(name, 5, V_MAX)                                                             \
        }                                                                                         \
    }                                                                                             \
    /* Columns [n0, n1). Few activation rows: the weights come from memory, in four streams, one   \
     * from each quarter of the rows. Many: four neighbours stay in L1 for a block of them. */    \
    attr static void name##_columns(const args_type *a, int64_t V, int64_t block, int64_t n0,     \
                                    int64_t n1)                                                   \
    {                                                                                             \
        if (V <= STREAM_ROWS) {                                                                   \
            const int64_t quarter = (n1 - n0) / 4;                                                \
            for (int64_t n = n0; n < n0 + quarter; n++)                                           \
                name##_rows(a, (gp_rows){n, quarter, n1}, 0, V);                                  \
            n0 += 4 * quarter;                                                                    \
        }                                                                                         \
        for (int64_t v = 0; v < V; v += block)                                                    \
            for (int64_t n = n0; n < n1; n += 4)                                                  \
                name##_rows(a, (gp_rows){n, 1, n1}, v, gp_min(v + block, V));                     \
    }

#define TILE_LINEAR(name, attr, V_MAX)                                                            \
    TILE_STORE(attr)                                                                              \
    GP_INLINE attr void name##_tokens(const gp_int8_linear *a, const int8_t *const w[4],          \
                                      int64_t v0, int V, gp_rows at, __m128 scale4, __m128 bias4) \
    {                                                                                             \
        __m128i out[V_MAX];                                                                       \
        dot_tile(w, a->x + v0 * a->K_pad, a->K_pad, a->K, V, out);                                \
        for (int v = 0; v < V; v += a->planes) {                                                  \
            int64_t m = (v0 + v) / a->planes;                                                     \
            __m128 t = _mm_cvtepi32_ps(exact(out[v], a->x_sum[v0 + v]));                          \
            if (a->planes == 2) {                                                                 \
                __m128 low = _mm_cvtepi32_ps(exact(out[v + 1], a->x_sum[v0 + v + 1]));            \
                t = _mm_add_ps(_mm_mul_ps(_mm_set1_ps(254.0f), t), low);                          \
            }                                                                                     \
            t = _mm_mul_ps(t, _mm_set1_ps(a->x_scale[m]));                                        \
            TILE_FINISH(a, t);                                                                    \
            tile_store(a->y, a->y_type, m * a->N, at, t);                                         \
        }                                                                                         \
    }                                                                                             \
    TILE_VECTORS(name, attr, gp_int8_linear, GP_I8, V_MAX)                                        \
    attr static void name(const gp_int8_linear *a, int64_t n0, int64_t n1)                        \
    {                                                                                             \
        if (a->K > GP_K_MAX)                                                                      \
            gp_int8_linear_ref(a, n0, n1);                                                        \
        else                                                                                      \
            name##_columns(a, a->M * a->planes, TILE_BLOCK(a->K_pad, V_MAX), n0, n1);             \
    }

/* Float activations times a weight of one type. */
#define TILE_FLOAT_TYPE(name, attr, type, V_MAX)                                                  \
    GP_INLINE attr void name##_tokens(const gp_float_linear *a, const int8_t *const w[4],         \
                                      int64_t m0, int V, gp_rows at, __m128 scale4, __m128 bias4) \
    {                                                                                             \
        __m128 out[V_MAX];                                                                        \
        float_tile(w, type, a->x + m0 * a->K_pad, a->K_pad, a->K, V, out);                        \
        for (int v = 0; v < V; v++) {                                                             \
            __m128 t = out[v];                                                                    \
            TILE_FINISH(a, t);                                                                    \
            tile_store(a->y, a->y_type, (m0 + v) * a->N, at, t);                                  \
        }                                                                                         \
    }                                                                                             \
    TILE_VECTORS(name, attr, gp_float_linear, type, V_MAX)

#define TILE_FLOAT_LINEAR(name, attr, V_MAX)                                                      \
    TILE_FLOAT_TYPE(name##_i8, attr, GP_I8, V_MAX)                                                \
    TILE_FLOAT_TYPE(name##_bf16, attr, GP_BF16, V_MAX)                                            \
    TILE_FLOAT_TYPE(name##_f16, attr, GP_F16, V_MAX)                                              \
    attr static void name(const gp_float_linear *a, int64_t n0, int64_t n1)                       \
    {                                                                                             \
        const int64_t block = TILE_BLOCK(4 * a->K_pad, V_MAX);                                    \
        if (a->w_type == GP_I8) name##_i8_columns(a, a->M, block, n0, n1);                        \
        if (a->w_type == GP_BF16) name##_bf16_columns(a, a->M, block, n0, n1);                    \
        if (a->w_type == GP_F16) name##_f16_columns(a, a->M, block, n0, n1);                      \
    }
#endif
