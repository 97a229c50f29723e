/* SPDX-License-Identifier: MIT
 *
 * int4 linear for AVX-512 with VNNI. Half a line of weights (the low or the high nibbles of 64 bytes)
 * is the unsigned operand of vpdpbusd: 16 rows by 4 columns; the 4 activations, broadcast from
 * memory, are the signed one. So each lane is an output: no horizontal sum, no second operand.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "avx512.h"
#include "int4.h"

#define INT4_TILE_ROWS 8
#define INT4_STREAMS 4

typedef int32_t __attribute__((may_alias, aligned(1))) four_bytes;

/* acc += w . (4 bytes at x, in every lane). Not the intrinsics: see dpbusd in int8_avx512_vnni.c. */
INLINE __m512i dpbusd_broadcast(__m512i acc, __m512i w, const int8_t *x)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const four_bytes *)x));
    return acc;
}

INLINE __m512 load_halves(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* The last step: 16 outputs of token m. */
INLINE void store_panel(void *y, gp_dtype type, const float *bias, int64_t N, int64_t p, int64_t m,
                        __m512 t)
{
    int64_t n = p * GP_INT4_ROWS;
    __mmask16 mask = tail_mask(N - n);
    if (bias) t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(mask, bias + n));
    store16(y, type, m * N + n, mask, t);
}

INLINE void int4_tile(const gp_int4_linear *a, int4_shape s, int64_t p, int64_t step, int P,
                      int64_t m, int V, int planes, int asym, int ahead)
{
    const __m512i fifteen = _mm512_set1_epi8(15);
    const int8_t *x = a->x + m * planes * a->K_pad;
    const int R = V * planes;
    const uint8_t *w[4];
    const uint16_t *scale[4];
    __m512 t[4][8];
    for (int i = 0; i < P; i++) {
        w[i] = a->w.w + (p + i * step) * s.panel_bytes;
        scale[i] = int4_scales(&a->w, s, p + i * step, 0, asym);
        for (int v = 0; v < V; v++) t[i][v] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < s.groups; g++) {
        __m512i acc[4][8];
        for (int i = 0; i < P; i++)
            for (int r = 0; r < R; r++) acc[i][r] = _mm512_setzero_si512();
        for (int64_t b = g * s.per; b < gp_min((g + 1) * s.per, s.blocks); b++) {
            for (int j = 0; j < 4; j++) {
                const int8_t *xk = x + b * GP_INT4_BLOCK + 4 * j;
                for (int i = 0; i < P; i++) {
                    const uint8_t *line = w[i] + b * GP_INT4_PANEL_BLOCK + 64 * j;
                    __m512i both = _mm512_loadu_si512(line);
                    __m512i low = _mm512_and_si512(both, fifteen);
                    __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen);
                    if (ahead) _mm_prefetch((const char *)line + INT4_AHEAD, _MM_HINT_T0);
                    for (int r = 0; r < R; r++) {
                        acc[i][r] = dpbusd_broadcast(acc[i][r], low, xk + r * a->K_pad);
                        acc[i][r] = dpbusd_broadcast(acc[i][r], high, xk + r * a->K_pad + 16);
                    }
                }
            }
        }
        for (int i = 0; i < P; i++) {
            const uint16_t *scales = scale[i] + g * (1 + asym) * GP_INT4_ROWS;
            const __m512 sc = load_halves(scales);
            for (int v = 0; v < V; v++) {
                const int32_t sum = a->x_sum[(m + v) * s.groups + g];
                __m512i d = acc[i][v * planes];
                if (planes == 2) { /* 254 h + l */
                    __m512i twice = _mm512_add_epi32(d, d);
                    d = _mm512_sub_epi32(_mm512_slli_epi32(d, 8), twice);
                    d = _mm512_add_epi32(d, acc[i][v * planes + 1]);
                }
                if (!asym) d = _mm512_sub_epi32(d, _mm512_set1_epi32(8 * sum));
                t[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), sc, t[i][v]);
                if (asym)
                    t[i][v] = _mm512_fmadd_ps(_mm512_set1_ps((float)sum),
                                              load_halves(scales + GP_INT4_ROWS), t[i][v]);
            }
        }
    }
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++)
            store_panel(a->y, a->y_type, a->bias, a->N, p + i * step, m + v,
                        _mm512_mul_ps(t[i][v], _mm512_set1_ps(a->x_scale[m + v])));
}

/* q of column 4 j + b (or 16 more) of a block, as floats: vpermps looks at the low 4 bits of a lane. */
INLINE __m512 weights_of(const uint8_t *block, int half, int j, int b, __m512 table)
{
    __m512i line = _mm512_loadu_si512(block + 64 * j);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, (unsigned)(8 * b + 4 * half)), table);
}

INLINE void int4_float_tile(const gp_int4_float_linear *a, int4_shape s, int64_t p, int64_t step,
                            int P, int64_t m, int V, int asym, int ahead)
{
    const __m512 zero_to_15 = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 table = _mm512_sub_ps(zero_to_15, _mm512_set1_ps(asym ? 0.0f : 8.0f));
    const float *x = a->x + m * a->K_pad;
    __m512 t[4][8];
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++) t[i][v] = _mm512_setzero_ps();
    for (int64_t g = 0; g < s.groups; g++) {
        const int64_t b1 = gp_min((g + 1) * s.per, s.blocks);
        __m512 d[4][8];
        for (int i = 0; i < P; i++)
            for (int v = 0; v < V; v++) d[i][v] = _mm512_setzero_ps();
        for (int64_t b = g * s.per; b < b1; b++) {
            for (int k = 0; k < GP_INT4_BLOCK; k++) { /* in order: the bits depend on it */
                for (int i = 0; i < P; i++) {
                    const uint8_t *block = a->w.w + (p + i * step) * s.panel_bytes +
                                           b * GP_INT4_PANEL_BLOCK;
                    __m512 q = weights_of(block, k / 16, k % 16 / 4, k % 4, table);
                    if (ahead && k % 8 == 0)
                        _mm_prefetch((const char *)block + 8 * k + INT4_AHEAD, _MM_HINT_T0);
                    for (int v = 0; v < V; v++)
                        d[i][v] = _mm512_fmadd_ps(
                            _mm512_set1_ps(x[v * a->K_pad + b * GP_INT4_BLOCK + k]), q, d[i][v]);
                }
            }
        }
        for (int v = 0; v < V; v++) {
            float sum = 0;
            if (asym)
                for (int64_t k = g * s.per * GP_INT4_BLOCK; k < b1 * GP_INT4_BLOCK; k++)
                    sum += x[v * a->K_pad + k];
            for (int i = 0; i < P; i++) {
                const uint16_t *scales = int4_scales(&a->w, s, p + i * step, g, asym);
                t[i][v] = _mm512_fmadd_ps(d[i][v], load_halves(scales), t[i][v]);
                if (asym)
                    t[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(sum), load_halves(scales + GP_INT4_ROWS), t[i][v]);
            }
        }
    }
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++)
            store_panel(a->y, a->y_type, a->bias, a->N, p + i * step, m + v, t[i][v]);
}

#include "int4_tile.h"

INLINE __m512i load32(const int8_t *x)
{
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)x));
}

TARGET static void int4_sum_groups_avx512(const int8_t *x, int64_t K, int64_t K_pad, int planes,
                                          int64_t group, int32_t *sum)
{
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t k0 = 0; k0 < K; k0 += group, sum++) {
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int64_t k = k0; k < gp_min(k0 + group, K_pad); k += GP_INT4_BLOCK) {
            high = _mm512_dpbusd_epi32(high, ones, load32(x + k));
            if (planes == 2) low = _mm512_dpbusd_epi32(low, ones, load32(x + K_pad + k));
        }
        *sum = _mm512_reduce_add_epi32(high);
        if (planes == 2) *sum = 254 * *sum + _mm512_reduce_add_epi32(low);
    }
}

const gp_impl gp_impl_int4_avx512_vnni = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .int4_sum_groups = int4_sum_groups_avx512,
    .int4_linear = int4_linear_tiled,
    .int4_float_linear = int4_float_linear_tiled,
};
#endif
