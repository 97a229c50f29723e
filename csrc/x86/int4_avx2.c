/* SPDX-License-Identifier: MIT
 *
 * int4 linear for AVX2. vpmaddubsw multiplies the unsigned nibbles by the signed activations and adds
 * pairs: at most 2 * 15 * 127 = 3810, so that the 8 of a block of 32 columns (30480) stay within int16
 * before they are widened. A panel is two vectors of 8 rows.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "int4.h"

#define TARGET GP_TARGET("avx2,fma,f16c")
#define INLINE GP_INLINE TARGET
#define INT4_TILE_ROWS 4
/* Of a stream of 41 GB/s on one core, a8 and a16, G = 32: 4 streams 19 and 16 (its registers are too
 * few), 2 streams 37 and 22, 1 stream 30 and 24. */
#define INT4_STREAMS 2

/* 4 bytes at x, in every lane. */
INLINE __m256i broadcast4(const int8_t *x)
{
    int32_t v;
    memcpy(&v, x, 4);
    return _mm256_set1_epi32(v);
}

INLINE __m256 load_halves(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

/* The last step: 8 outputs of token m, from row n on. */
INLINE void store_rows(void *y, gp_dtype type, const float *bias, int64_t N, int64_t n, int64_t m,
                       __m256 t)
{
    if (n + 8 <= N && type == GP_F32) {
        if (bias) t = _mm256_add_ps(t, _mm256_loadu_ps(bias + n));
        _mm256_storeu_ps((float *)y + m * N + n, t);
        return;
    }
    float f[8];
    _mm256_storeu_ps(f, t);
    for (int64_t r = 0; r < gp_min(8, N - n); r++)
        gp_store(y, type, m * N + n + r, bias ? f[r] + bias[n + r] : f[r]);
}

INLINE void int4_tile(const gp_int4_linear *a, int4_shape s, int64_t p, int64_t step, int P,
                      int64_t m, int V, int planes, int asym, int ahead)
{
    const __m256i fifteen = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int8_t *x = a->x + m * planes * a->K_pad;
    const int R = V * planes;
    __m256 t[4][4][2];
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++) t[i][v][0] = t[i][v][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < s.groups; g++) {
        __m256i acc[4][4][2];
        for (int i = 0; i < P; i++)
            for (int r = 0; r < R; r++) acc[i][r][0] = acc[i][r][1] = _mm256_setzero_si256();
        for (int64_t b = g * s.per; b < gp_min((g + 1) * s.per, s.blocks); b++) {
            const int8_t *xb = x + b * GP_INT4_BLOCK;
            for (int i = 0; i < P; i++) {
                const uint8_t *block = a->w.w + (p + i * step) * s.panel_bytes +
                                       b * GP_INT4_PANEL_BLOCK;
                __m256i pairs[4][2];
                for (int r = 0; r < R; r++) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
                for (int j = 0; j < 4; j++) {
                    const __m256i *line = (const __m256i *)(block + 64 * j);
                    if (ahead) _mm_prefetch((const char *)line + INT4_AHEAD, _MM_HINT_T0);
                    for (int half = 0; half < 2; half++) {
                        __m256i both = _mm256_loadu_si256(line + half);
                        __m256i low = _mm256_and_si256(both, fifteen);
                        __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), fifteen);
                        for (int r = 0; r < R; r++) {
                            const int8_t *xr = xb + r * a->K_pad + 4 * j;
                            __m256i sum = _mm256_add_epi16(
                                _mm256_maddubs_epi16(low, broadcast4(xr)),
                                _mm256_maddubs_epi16(high, broadcast4(xr + 16)));
                            pairs[r][half] = _mm256_add_epi16(pairs[r][half], sum);
                        }
                    }
                }
                for (int r = 0; r < R; r++)
                    for (int half = 0; half < 2; half++)
                        acc[i][r][half] = _mm256_add_epi32(
                            acc[i][r][half], _mm256_madd_epi16(pairs[r][half], ones));
            }
        }
        for (int i = 0; i < P; i++) {
            for (int half = 0; half < 2; half++) {
                const uint16_t *scales = int4_scales(&a->w, s, p + i * step, g, asym) + 8 * half;
                const __m256 scale = load_halves(scales);
                for (int v = 0; v < V; v++) {
                    const int32_t sum = a->x_sum[(m + v) * s.groups + g];
                    __m256i d = acc[i][v * planes][half];
                    if (planes == 2) { /* 254 h + l */
                        __m256i twice = _mm256_add_epi32(d, d);
                        d = _mm256_sub_epi32(_mm256_slli_epi32(d, 8), twice);
                        d = _mm256_add_epi32(d, acc[i][v * planes + 1][half]);
                    }
                    if (!asym) d = _mm256_sub_epi32(d, _mm256_set1_epi32(8 * sum));
                    __m256 f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), scale, t[i][v][half]);
                    if (asym)
                        f = _mm256_fmadd_ps(_mm256_set1_ps((float)sum),
                                            load_halves(scales + GP_INT4_ROWS), f);
                    t[i][v][half] = f;
                }
            }
        }
    }
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++)
            for (int half = 0; half < 2; half++)
                store_rows(a->y, a->y_type, a->bias, a->N,
                           (p + i * step) * GP_INT4_ROWS + 8 * half, m + v,
                           _mm256_mul_ps(t[i][v][half], _mm256_set1_ps(a->x_scale[m + v])));
}

INLINE void int4_float_tile(const gp_int4_float_linear *a, int4_shape s, int64_t p, int64_t step,
                            int P, int64_t m, int V, int asym, int ahead)
{
    const float *x = a->x + m * a->K_pad;
    __m256 t[4][4][2];
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++) t[i][v][0] = t[i][v][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < s.groups; g++) {
        const int64_t b1 = gp_min((g + 1) * s.per, s.blocks);
        float sum[4] = {0};
        if (asym)
            for (int v = 0; v < V; v++)
                for (int64_t k = g * s.per * GP_INT4_BLOCK; k < b1 * GP_INT4_BLOCK; k++)
                    sum[v] += x[v * a->K_pad + k];
        for (int i = 0; i < P; i++) {
            const uint8_t *panel = a->w.w + (p + i * step) * s.panel_bytes;
            __m256 d[4][2];
            for (int v = 0; v < V; v++) d[v][0] = d[v][1] = _mm256_setzero_ps();
            for (int64_t b = g * s.per; b < b1; b++) {
                for (int k = 0; k < GP_INT4_BLOCK; k++) { /* in order: the bits depend on it */
                    const uint8_t *line = panel + b * GP_INT4_PANEL_BLOCK + k % 16 / 4 * 64;
                    for (int half = 0; half < 2; half++) {
                        __m256i q = _mm256_loadu_si256((const __m256i *)line + half);
                        q = _mm256_srli_epi32(q, k % 4 * 8 + k / 16 * 4);
                        q = _mm256_and_si256(q, _mm256_set1_epi32(15));
                        if (!asym) q = _mm256_sub_epi32(q, _mm256_set1_epi32(8));
                        for (int v = 0; v < V; v++)
                            d[v][half] = _mm256_fmadd_ps(
                                _mm256_set1_ps(x[v * a->K_pad + b * GP_INT4_BLOCK + k]),
                                _mm256_cvtepi32_ps(q), d[v][half]);
                    }
                    if (ahead && k % 8 == 0)
                        _mm_prefetch((const char *)line + INT4_AHEAD, _MM_HINT_T0);
                }
            }
            for (int half = 0; half < 2; half++) {
                const uint16_t *scales = int4_scales(&a->w, s, p + i * step, g, asym) + 8 * half;
                for (int v = 0; v < V; v++) {
                    __m256 f = _mm256_fmadd_ps(d[v][half], load_halves(scales), t[i][v][half]);
                    if (asym)
                        f = _mm256_fmadd_ps(_mm256_set1_ps(sum[v]), load_halves(scales + GP_INT4_ROWS),
                                            f);
                    t[i][v][half] = f;
                }
            }
        }
    }
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++)
            for (int half = 0; half < 2; half++)
                store_rows(a->y, a->y_type, a->bias, a->N,
                           (p + i * step) * GP_INT4_ROWS + 8 * half, m + v, t[i][v][half]);
}

#include "int4_tile.h"

const gp_impl gp_impl_int4_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .int4_linear = int4_linear_tiled,
    .int4_float_linear = int4_float_linear_tiled,
};
#endif
