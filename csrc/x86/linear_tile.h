/* SPDX-License-Identifier: MIT
 *
 * The loops around a tile of dot products, shared by the AVX2 and AVX-512 linears; the includer
 * supplies, always inlined with a constant V:
 *     dot_tile(w[4], x, x_stride, K, V, out[V])    4 weight rows x V activation rows, lanes = rows
 *     exact(sum, x_sum)                            its integer dot product
 *     float_tile(...)                              the same with float activations
 *
 * Four weight rows at a time stay in L1 for a block of activation rows that stays in L2. Weight rows
 * beyond the end repeat the last one and are not stored.
 */
#ifndef GPU_POOR_LINEAR_TILE_H
#define GPU_POOR_LINEAR_TILE_H

#include <immintrin.h>

#include "../common.h"

/* Weights come from memory in one linear stream, row after row. Into L2 from 16 KB ahead (plus 3
 * lines: a multiple of 4096 falls into the same sets of L1), into L1 from 1 KB. Measured on one
 * core, M = 2, a16, K = 1280, the stream being 14.3 GB/s: L1 alone from 512 B to 8 KB ahead 9 to
 * 12.5, L2 alone 13.1, both 13.9. Addresses beyond the end are harmless: a prefetch never faults. */
GP_INLINE void prefetch_stream(const int8_t *w)
{
    _mm_prefetch((const char *)w + 16576, _MM_HINT_T1);
    _mm_prefetch((const char *)w + 1024, _MM_HINT_T0);
}

/* Activation rows to a block: 512 KB of them, a multiple of V_MAX (an even number: both planes).
 * Of all rows at once, 2 MB, AVX512-VNNI made 0.28 TOPS a core; of 128 KB 0.55, 512 KB 0.60. */
#define TILE_BLOCK(row_bytes, V_MAX) (((1 << 19) / ((row_bytes) + 1) / (V_MAX) + 1) * (V_MAX))

void gp_int8_linear_ref(const gp_int8_linear *a, int64_t n0, int64_t n1);

/* y[m][n..n+count) from four lanes. */
#define TILE_STORE(attr)                                                                          \
    GP_INLINE attr void tile_store(void *y, gp_dtype type, int64_t i, int64_t count, __m128 v)    \
    {                                                                                             \
        if (count >= 4 && type == GP_F32) {                                                       \
            _mm_storeu_ps((float *)y + i, v);                                                     \
            return;                                                                               \
        }                                                                                         \
        float f[4];                                                                               \
        _mm_storeu_ps(f, v);                                                                      \
        for (int64_t r = 0; r < gp_min(count, 4); r++) gp_store(y, type, i + r, f[r]);            \
    }

#define TILE_ROWS(a, n, n1, w)                                                                    \
    const int8_t *w[4];                                                                           \
    float w_scale[4] = {0}, bias[4] = {0};                                                        \
    for (int64_t r = 0; r < 4; r++) {                                                             \
        int64_t row = gp_min(n + r, n1 - 1);                                                      \
        w[r] = a->w + row * a->K;                                                                 \
        w_scale[r] = a->w_scale[row];                                                             \
        if (a->bias) bias[r] = a->bias[row];                                                      \
    }                                                                                             \
    const __m128 scale4 = _mm_loadu_ps(w_scale), bias4 = _mm_loadu_ps(bias)

/* t -> y in the order the contract fixes; adding an absent bias could turn -0 into 0. */
#define TILE_FINISH(a, t)                                                                         \
    t = _mm_mul_ps(t, scale4);                                                                    \
    if (a->bias) t = _mm_add_ps(t, bias4)

#define TILE_LINEAR(name, attr, V_MAX)                                                            \
    TILE_STORE(attr)                                                                              \
    GP_INLINE attr void name##_tokens(const gp_int8_linear *a, const int8_t *const w[4],          \
                                      int64_t v0, int V, int64_t n, int64_t n1, __m128 scale4,    \
                                      __m128 bias4)                                               \
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
            tile_store(a->y, a->y_type, m * a->N + n, n1 - n, t);                                 \
        }                                                                                         \
    }                                                                                             \
    attr static void name(const gp_int8_linear *a, int64_t n0, int64_t n1)                        \
    {                                                                                             \
        const int64_t V = a->M * a->planes, block = TILE_BLOCK(a->K_pad, V_MAX);                  \
        for (int64_t v0 = 0; v0 < V; v0 += block)                                                 \
        for (int64_t n = n0; n < n1; n += 4) {                                                    \
            TILE_ROWS(a, n, n1, w);                                                               \
            int64_t v = v0, v1 = gp_min(v0 + block, V);                                           \
            for (; v + V_MAX <= v1; v += V_MAX)                                                   \
                name##_tokens(a, w, v, V_MAX, n, n1, scale4, bias4);                              \
            switch (v1 - v) {                                                                     \
            case 1: name##_tokens(a, w, v, 1, n, n1, scale4, bias4); break;                       \
            case 2: name##_tokens(a, w, v, 2, n, n1, scale4, bias4); break;                       \
            case 3: if (V_MAX > 3) name##_tokens(a, w, v, 3, n, n1, scale4, bias4); break;        \
            case 4: if (V_MAX > 4) name##_tokens(a, w, v, 4, n, n1, scale4, bias4); break;        \
            case 5: if (V_MAX > 5) name##_tokens(a, w, v, 5, n, n1, scale4, bias4); break;        \
            }                                                                                     \
        }                                                                                         \
    }

#define TILE_FLOAT_LINEAR(name, attr, V_MAX)                                                      \
    GP_INLINE attr void name##_tokens(const gp_float_linear *a, const int8_t *const w[4],         \
                                      int64_t m0, int V, int64_t n, int64_t n1, __m128 scale4,    \
                                      __m128 bias4)                                               \
    {                                                                                             \
        __m128 out[V_MAX];                                                                        \
        float_tile(w, a->x + m0 * a->K_pad, a->K_pad, a->K, V, out);                              \
        for (int v = 0; v < V; v++) {                                                             \
            __m128 t = out[v];                                                                    \
            TILE_FINISH(a, t);                                                                    \
            tile_store(a->y, a->y_type, (m0 + v) * a->N + n, n1 - n, t);                          \
        }                                                                                         \
    }                                                                                             \
    attr static void name(const gp_float_linear *a, int64_t n0, int64_t n1)                       \
    {                                                                                             \
        const int64_t block = TILE_BLOCK(4 * a->K_pad, V_MAX);                                    \
        for (int64_t m0 = 0; m0 < a->M; m0 += block)                                              \
        for (int64_t n = n0; n < n1; n += 4) {                                                    \
            TILE_ROWS(a, n, n1, w);                                                               \
            int64_t m = m0, m1 = gp_min(m0 + block, a->M);                                        \
            for (; m + V_MAX <= m1; m += V_MAX)                                                   \
                name##_tokens(a, w, m, V_MAX, n, n1, scale4, bias4);                              \
            switch (m1 - m) {                                                                     \
            case 1: name##_tokens(a, w, m, 1, n, n1, scale4, bias4); break;                       \
            case 2: if (V_MAX > 2) name##_tokens(a, w, m, 2, n, n1, scale4, bias4); break;        \
            case 3: if (V_MAX > 3) name##_tokens(a, w, m, 3, n, n1, scale4, bias4); break;        \
            case 4: if (V_MAX > 4) name##_tokens(a, w, m, 4, n, n1, scale4, bias4); break;        \
            case 5: if (V_MAX > 5) name##_tokens(a, w, m, 5, n, n1, scale4, bias4); break;        \
            }                                                                                     \
        }                                                                                         \
    }
#endif
