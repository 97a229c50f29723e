/* SPDX-License-Identifier: MIT
 *
 * Grouped linear for AVX-512 with VNNI. A line of weights (64 bytes, or the low or the high nibbles of
 * them) is the unsigned operand of vpdpbusd: 16 rows by 4 columns; the 4 activations, broadcast from
 * memory, are the signed one. So each lane is an output: no horizontal sum, no second operand.
 */
#if defined(__x86_64__)
#include "grouped_avx512.h"

#define GROUPED_TILE_ROWS 8
#define GROUPED_STREAMS 4

typedef int32_t __attribute__((may_alias, aligned(1))) four_bytes;

/* acc += w . (4 bytes at x, in every lane). Not the intrinsics: see dpbusd in int8_avx512_vnni.c. */
INLINE __m512i dpbusd_broadcast(__m512i acc, __m512i w, const int8_t *x)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const four_bytes *)x));
    return acc;
}

INLINE void grouped_tile(const gp_grouped_linear *a, grouped_shape s, int64_t p, int64_t step, int P,
                         int64_t m, int V, int planes, int bits, int asym, int ahead)
{
    const __m512i fifteen = _mm512_set1_epi8(15);
    const int32_t zero = asym ? 0 : 1 << (bits - 1);
    const int8_t *x = a->x + m * planes * a->K_pad;
    const int R = V * planes;
    const uint8_t *w[4];
    const uint16_t *scale[4];
    __m512 t[4][8];
    for (int i = 0; i < P; i++) {
        w[i] = a->w.w + (p + i * step) * s.panel_bytes;
        scale[i] = grouped_scales(&a->w, s, p + i * step, 0, asym);
        for (int v = 0; v < V; v++) t[i][v] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < s.groups; g++) {
        __m512i acc[4][8];
        for (int i = 0; i < P; i++)
            for (int r = 0; r < R; r++) acc[i][r] = _mm512_setzero_si512();
        for (int64_t b = g * s.per; b < gp_min((g + 1) * s.per, s.blocks); b++) {
            for (int j = 0; j < bits; j++) {
                const int8_t *xk = x + b * GP_BLOCK + 4 * j;
                for (int i = 0; i < P; i++) {
                    const uint8_t *line = w[i] + b * GP_BLOCK_BYTES(bits) + 64 * j;
                    __m512i q = _mm512_loadu_si512(line), high = q;
                    if (bits == 4) {
                        high = _mm512_and_si512(_mm512_srli_epi16(q, 4), fifteen);
                        q = _mm512_and_si512(q, fifteen);
                    }
                    if (ahead) _mm_prefetch((const char *)line + GROUPED_AHEAD, STREAM_HINT);
                    for (int r = 0; r < R; r++) {
                        const int8_t *xr = xk + r * a->K_pad;
                        acc[i][r] = dpbusd_broadcast(acc[i][r], q, xr);
                        if (bits == 4) acc[i][r] = dpbusd_broadcast(acc[i][r], high, xr + 16);
                    }
                }
            }
        }
        for (int i = 0; i < P; i++) {
            const uint16_t *scales = scale[i] + g * (1 + asym) * GP_PANEL_ROWS;
            const __m512 sc = load_halves(scales);
            for (int v = 0; v < V; v++) {
                const int32_t sum = a->x_sum[(m + v) * s.groups + g];
                __m512i d = acc[i][v * planes];
                if (planes == 2) { /* 254 h + l */
                    __m512i twice = _mm512_add_epi32(d, d);
                    d = _mm512_sub_epi32(_mm512_slli_epi32(d, 8), twice);
                    d = _mm512_add_epi32(d, acc[i][v * planes + 1]);
                }
                if (!asym) d = _mm512_sub_epi32(d, _mm512_set1_epi32(zero * sum));
                t[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), sc, t[i][v]);
                if (asym)
                    t[i][v] = _mm512_fmadd_ps(_mm512_set1_ps((float)sum),
                                              load_halves(scales + GP_PANEL_ROWS), t[i][v]);
            }
        }
    }
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++)
            store_panel(a->y, a->y_type, a->bias, a->N, p + i * step, m + v,
                        _mm512_mul_ps(t[i][v], _mm512_set1_ps(a->x_scale[m + v])));
}

/* q - zero of column k of a block, as floats. Of 4 bits by a table: vpermps looks at the low 4 bits of
 * a lane. */
INLINE __m512 weights_of(const uint8_t *block, int k, int bits, int zero)
{
    const __m512i to_15 = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i q = _mm512_loadu_si512(block + 64 * (k / 4 % bits));
    if (bits == 4) {
        __m512 table = _mm512_cvtepi32_ps(_mm512_sub_epi32(to_15, _mm512_set1_epi32(zero)));
        return _mm512_permutexvar_ps(_mm512_srli_epi32(q, (unsigned)(k % 4 * 8 + k / 16 * 4)), table);
    }
    q = _mm512_and_si512(_mm512_srli_epi32(q, (unsigned)(k % 4 * 8)), _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_set1_epi32(zero)));
}

INLINE void grouped_float_tile(const gp_grouped_float_linear *a, grouped_shape s, int64_t p,
                               int64_t step, int P, int64_t m, int V, int bits, int asym, int ahead)
{
    const int zero = asym ? 0 : 1 << (bits - 1);
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
            for (int k = 0; k < GP_BLOCK; k++) { /* in order: the bits depend on it */
                for (int i = 0; i < P; i++) {
                    const uint8_t *block = a->w.w + (p + i * step) * s.panel_bytes +
                                           b * GP_BLOCK_BYTES(bits);
                    __m512 q = weights_of(block, k, bits, zero);
                    if (ahead && k % (32 / bits) == 0) /* once a line */
                        _mm_prefetch((const char *)block + 2 * bits * k + GROUPED_AHEAD, STREAM_HINT);
                    for (int v = 0; v < V; v++)
                        d[i][v] = _mm512_fmadd_ps(
                            _mm512_set1_ps(x[v * a->K_pad + b * GP_BLOCK + k]), q, d[i][v]);
                }
            }
        }
        for (int v = 0; v < V; v++) {
            float sum = 0;
            if (asym)
                for (int64_t k = g * s.per * GP_BLOCK; k < b1 * GP_BLOCK; k++)
                    sum += x[v * a->K_pad + k];
            for (int i = 0; i < P; i++) {
                const uint16_t *scales = grouped_scales(&a->w, s, p + i * step, g, asym);
                t[i][v] = _mm512_fmadd_ps(d[i][v], load_halves(scales), t[i][v]);
                if (asym)
                    t[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(sum), load_halves(scales + GP_PANEL_ROWS), t[i][v]);
            }
        }
    }
    for (int i = 0; i < P; i++)
        for (int v = 0; v < V; v++)
            store_panel(a->y, a->y_type, a->bias, a->N, p + i * step, m + v, t[i][v]);
}

#include "grouped_tile.h"

INLINE __m512i load32(const int8_t *x)
{
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)x));
}

TARGET static void grouped_sum_groups_avx512(const int8_t *x, int64_t K, int64_t K_pad, int planes,
                                          int64_t group, int32_t *sum)
{
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t k0 = 0; k0 < K; k0 += group, sum++) {
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int64_t k = k0; k < gp_min(k0 + group, K_pad); k += GP_BLOCK) {
            high = _mm512_dpbusd_epi32(high, ones, load32(x + k));
            if (planes == 2) low = _mm512_dpbusd_epi32(low, ones, load32(x + K_pad + k));
        }
        *sum = _mm512_reduce_add_epi32(high);
        if (planes == 2) *sum = 254 * *sum + _mm512_reduce_add_epi32(low);
    }
}

const gp_impl gp_impl_grouped_avx512_vnni = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .grouped_sum_groups = grouped_sum_groups_avx512,
    .grouped_linear = grouped_linear_tiled,
    .grouped_float_linear = grouped_float_linear_tiled,
};
#endif
