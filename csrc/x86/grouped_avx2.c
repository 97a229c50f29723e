/* SPDX-License-Identifier: MIT
 *
 * Grouped linear for AVX2. vpmaddubsw multiplies unsigned by signed bytes and adds pairs. Of nibbles and
 * activations a pair is at most 2 * 15 * 127 = 3810, so that the 8 of a block of 32 columns (30480) stay
 * within int16 before they are widened. Bytes would saturate: there q - 128 is taken by its magnitude,
 * and the activation by its sign, as in int8_avx2.c, and each pair is widened at once. A panel is two
 * vectors of 8 rows.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "grouped.h"

#define TARGET GP_TARGET("avx2,fma,f16c")
#define INLINE GP_INLINE TARGET
#define GROUPED_TILE_ROWS 4
/* Of a stream of 41 GB/s on one core, a8 and a16, G = 32: 4 streams 19 and 16 (its registers are too
 * few), 2 streams 37 and 22, 1 stream 30 and 24. */
#define GROUPED_STREAMS 2

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

/* 32 columns of a panel of 4 bits times R rows of activations. */
INLINE void nibble_block(const uint8_t *block, const int8_t *x, int64_t x_stride, int R, int ahead,
                         __m256i acc[4][2])
{
    const __m256i fifteen = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i pairs[4][2];
    for (int r = 0; r < R; r++) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
    for (int j = 0; j < 4; j++) {
        const __m256i *line = (const __m256i *)(block + 64 * j);
        if (ahead) _mm_prefetch((const char *)line + GROUPED_AHEAD, _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            __m256i both = _mm256_loadu_si256(line + half);
            __m256i low = _mm256_and_si256(both, fifteen);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), fifteen);
            for (int r = 0; r < R; r++) {
                const int8_t *xr = x + r * x_stride + 4 * j;
                __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(low, broadcast4(xr)),
                                               _mm256_maddubs_epi16(high, broadcast4(xr + 16)));
                pairs[r][half] = _mm256_add_epi16(pairs[r][half], sum);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(pairs[r][half], ones));
}

/* The same of 8 bits, with q - 128 for q. */
INLINE void byte_block(const uint8_t *block, const int8_t *x, int64_t x_stride, int R, int ahead,
                       __m256i acc[4][2])
{
    const __m256i flip = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    for (int j = 0; j < 8; j++) {
        const __m256i *line = (const __m256i *)(block + 64 * j);
        if (ahead) _mm_prefetch((const char *)line + GROUPED_AHEAD, _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            __m256i w = _mm256_xor_si256(_mm256_loadu_si256(line + half), flip);
            __m256i magnitude = _mm256_abs_epi8(w);
            for (int r = 0; r < R; r++) {
                __m256i xr = _mm256_sign_epi8(broadcast4(x + r * x_stride + 4 * j), w);
                __m256i pairs = _mm256_maddubs_epi16(magnitude, xr);
                acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
}

INLINE void grouped_tile(const gp_grouped_linear *a, grouped_shape s, int64_t p, int64_t step, int P,
                         int64_t m, int V, int planes, int bits, int asym, int ahead)
{
    /* What the products below have to lose, times the sum of x: theirs is q, or of 8 bits q - 128. */
    const int32_t zero = (asym ? 0 : 1 << (bits - 1)) - (bits == 8 ? 128 : 0);
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
            const int8_t *xb = x + b * GP_BLOCK;
            for (int i = 0; i < P; i++) {
                const uint8_t *block = a->w.w + (p + i * step) * s.panel_bytes +
                                       b * GP_BLOCK_BYTES(bits);
                if (bits == 4)
                    nibble_block(block, xb, a->K_pad, R, ahead, acc[i]);
                else
                    byte_block(block, xb, a->K_pad, R, ahead, acc[i]);
            }
        }
        for (int i = 0; i < P; i++) {
            for (int half = 0; half < 2; half++) {
                const uint16_t *scales = grouped_scales(&a->w, s, p + i * step, g, asym) + 8 * half;
                const __m256 scale = load_halves(scales);
                for (int v = 0; v < V; v++) {
                    const int32_t sum = a->x_sum[(m + v) * s.groups + g];
                    __m256i d = acc[i][v * planes][half];
                    if (planes == 2) { /* 254 h + l */
                        __m256i twice = _mm256_add_epi32(d, d);
                        d = _mm256_sub_epi32(_mm256_slli_epi32(d, 8), twice);
                        d = _mm256_add_epi32(d, acc[i][v * planes + 1][half]);
                    }
                    if (zero) d = _mm256_sub_epi32(d, _mm256_set1_epi32(zero * sum));
                    __m256 f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), scale, t[i][v][half]);
                    if (asym)
                        f = _mm256_fmadd_ps(_mm256_set1_ps((float)sum),
                                            load_halves(scales + GP_PANEL_ROWS), f);
                    t[i][v][half] = f;
                }
            }
        }
    }
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++)
            for (int half = 0; half < 2; half++)
                store_rows(a->y, a->y_type, a->bias, a->N,
                           (p + i * step) * GP_PANEL_ROWS + 8 * half, m + v,
                           _mm256_mul_ps(t[i][v][half], _mm256_set1_ps(a->x_scale[m + v])));
}

INLINE void grouped_float_tile(const gp_grouped_float_linear *a, grouped_shape s, int64_t p,
                               int64_t step, int P, int64_t m, int V, int bits, int asym, int ahead)
{
    const int zero = asym ? 0 : 1 << (bits - 1);
    const float *x = a->x + m * a->K_pad;
    __m256 t[4][4][2];
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++) t[i][v][0] = t[i][v][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < s.groups; g++) {
        const int64_t b1 = gp_min((g + 1) * s.per, s.blocks);
        float sum[4] = {0};
        if (asym)
            for (int v = 0; v < V; v++)
                for (int64_t k = g * s.per * GP_BLOCK; k < b1 * GP_BLOCK; k++)
                    sum[v] += x[v * a->K_pad + k];
        for (int i = 0; i < P; i++) {
            const uint8_t *panel = a->w.w + (p + i * step) * s.panel_bytes;
            __m256 d[4][2];
            for (int v = 0; v < V; v++) d[v][0] = d[v][1] = _mm256_setzero_ps();
            for (int64_t b = g * s.per; b < b1; b++) {
                for (int k = 0; k < GP_BLOCK; k++) { /* in order: the bits depend on it */
                    const uint8_t *line = panel + b * GP_BLOCK_BYTES(bits) + k / 4 % bits * 64;
                    const int shift = k % 4 * 8 + (bits == 4 ? k / 16 * 4 : 0);
                    for (int half = 0; half < 2; half++) {
                        __m256i q = _mm256_loadu_si256((const __m256i *)line + half);
                        q = _mm256_srli_epi32(q, shift);
                        q = _mm256_and_si256(q, _mm256_set1_epi32((1 << bits) - 1));
                        if (zero) q = _mm256_sub_epi32(q, _mm256_set1_epi32(zero));
                        for (int v = 0; v < V; v++)
                            d[v][half] = _mm256_fmadd_ps(
                                _mm256_set1_ps(x[v * a->K_pad + b * GP_BLOCK + k]),
                                _mm256_cvtepi32_ps(q), d[v][half]);
                    }
                    if (ahead && k % (32 / bits) == 0) /* once a line */
                        _mm_prefetch((const char *)line + GROUPED_AHEAD, _MM_HINT_T0);
                }
            }
            for (int half = 0; half < 2; half++) {
                const uint16_t *scales = grouped_scales(&a->w, s, p + i * step, g, asym) + 8 * half;
                for (int v = 0; v < V; v++) {
                    __m256 f = _mm256_fmadd_ps(d[v][half], load_halves(scales), t[i][v][half]);
                    if (asym)
                        f = _mm256_fmadd_ps(_mm256_set1_ps(sum[v]), load_halves(scales + GP_PANEL_ROWS),
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
                           (p + i * step) * GP_PANEL_ROWS + 8 * half, m + v, t[i][v][half]);
}

#include "grouped_tile.h"

const gp_impl gp_impl_grouped_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .grouped_linear = grouped_linear_tiled,
    .grouped_float_linear = grouped_float_linear_tiled,
};
#endif
