/* SPDX-License-Identifier: MIT
 *
 * int8 kernels for AVX-512 with VNNI.
 *
 * vpdpbusd multiplies unsigned by signed bytes. The weight, xor 0x80, is the unsigned operand
 * (w + 128) and the activation the signed one, so
 *     sum (w + 128) x = sum w x + 128 sum x,
 * and the correction belongs to the token: computed once by the quantizer. Making the activation
 * unsigned instead would need 128 * sum w, either stored beside the weights or added up by a
 * second dot product.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "avx512.h"

#define STREAM_ROWS 4
#include "linear_tile.h"

/* The reference's absmax_bits. */
INLINE uint32_t absmax_bits(const void *x, gp_dtype type, int64_t K)
{
    __m512i top = _mm512_setzero_si512();
    for (int64_t k = 0; k < K; k += 16) {
        __m512i v = _mm512_castps_si512(load16(x, type, k, tail_mask(K - k)));
        top = _mm512_max_epi32(top, _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff)));
    }
    return (uint32_t)_mm512_reduce_max_epi32(top);
}

INLINE float quantize_row(const void *x, gp_dtype type, int64_t K, int planes, int8_t *q,
                          int64_t stride, int32_t *sum)
{
    const gp_grid grid = gp_grid_of(absmax_bits(x, type, K), GP_Q_MAX(planes));
    const __mmask16 live = grid.inverse ? 0xffff : 0;
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
    for (int64_t k = 0; k < K; k += 16) {
        __mmask16 mask = tail_mask(K - k);
        __m512 v = _mm512_mul_ps(load16(x, type, k, mask), _mm512_set1_ps(grid.inverse));
        __m512i r = _mm512_maskz_cvtps_epi32(live, v);
        if (planes == 2) {
            __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(r), _mm512_set1_ps(1.0f / 254.0f));
            __m512i high = _mm512_cvtps_epi32(part);
            __m512i low = _mm512_sub_epi32(r, _mm512_mullo_epi32(high, _mm512_set1_epi32(254)));
            _mm_mask_storeu_epi8(q + stride + k, mask, _mm512_cvtepi32_epi8(low));
            sum1 = _mm512_add_epi32(sum1, low);
            r = high;
        }
        _mm_mask_storeu_epi8(q + k, mask, _mm512_cvtepi32_epi8(r));
        sum0 = _mm512_add_epi32(sum0, r);
    }
    sum[0] = _mm512_reduce_add_epi32(sum0);
    if (planes == 2) sum[1] = _mm512_reduce_add_epi32(sum1);
    return grid.scale;
}

TARGET static float int8_quantize_row_avx512_vnni(const void *x, gp_dtype type, int64_t K,
                                                  int planes, int8_t *q, int64_t stride,
                                                  int32_t *sum)
{
#define CASE(T, P)                                                                                \
    if (type == T && planes == P) return quantize_row(x, T, K, P, q, stride, sum);
    CASE(GP_F32, 1) CASE(GP_F32, 2) CASE(GP_BF16, 1) CASE(GP_BF16, 2) CASE(GP_F16, 1)
#undef CASE
    return quantize_row(x, GP_F16, K, 2, q, stride, sum);
}

/* q of 32 fixed point weights as int16. */
INLINE __m512i clipped(__m512i fixed, int clip)
{
    __m512i v = _mm512_mulhrs_epi16(fixed, _mm512_set1_epi16((short)(128 + clip)));
    v = _mm512_min_epi16(v, _mm512_set1_epi16(127));
    return _mm512_max_epi16(v, _mm512_set1_epi16(-127));
}

/* Lanes of pairs reach 2 * 32512 * 127 a step: 4096 columns are 128 steps, 260 would overflow. */
#define CLIP_BLOCK 4096

INLINE float quantize_weight_row(const void *x, gp_dtype type, int64_t K, int8_t *q,
                                 int16_t *fixed)
{
    const uint32_t absmax = absmax_bits(x, type, K);
    const gp_grid grid = gp_grid_of(absmax, GP_FIXED_MAX);
    if (!grid.inverse) {
        memset(q, 0, (size_t)K);
        return grid.scale;
    }
    const __m512 inverse = _mm512_set1_ps(grid.inverse);
    for (int64_t k = 0; k < K; k += 16) {
        __mmask16 mask = tail_mask(K - k);
        __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x, type, k, mask), inverse));
        _mm256_mask_storeu_epi16(fixed + k, mask, _mm512_cvtepi32_epi16(v));
    }
    double best = -1, best_ratio = 0;
    int best_clip = 0;
    for (int clip = 0; clip < GP_CLIPS; clip++) {
        int64_t xq = 0, qq = 0;
        for (int64_t k0 = 0; k0 < K; k0 += CLIP_BLOCK) {
            int64_t k1 = gp_min(k0 + CLIP_BLOCK, K);
            __m512i xq16 = _mm512_setzero_si512(), qq16 = xq16;
            for (int64_t k = k0; k < k1; k += 32) {
                __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
                __m512i f = _mm512_maskz_loadu_epi16(mask, fixed + k), v = clipped(f, clip);
                xq16 = _mm512_add_epi32(xq16, _mm512_madd_epi16(f, v));
                qq16 = _mm512_add_epi32(qq16, _mm512_madd_epi16(v, v));
            }
            xq += _mm512_reduce_add_epi64(_mm512_add_epi64(
                _mm512_cvtepi32_epi64(_mm512_castsi512_si256(xq16)),
                _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(xq16, 1))));
            qq += _mm512_reduce_add_epi32(qq16); /* 127^2 * 4096 fits */
        }
        gp_choose_clip(xq, qq, clip, &best, &best_ratio, &best_clip);
    }
    for (int64_t k = 0; k < K; k += 32) {
        __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
        __m512i v = clipped(_mm512_maskz_loadu_epi16(mask, fixed + k), best_clip);
        _mm256_mask_storeu_epi8(q + k, mask, _mm512_cvtepi16_epi8(v));
    }
    return (float)(best_ratio * (double)gp_from_bits(absmax) / (double)GP_FIXED_MAX);
}

TARGET static float int8_quantize_weight_row_avx512(const void *x, gp_dtype type, int64_t K,
                                                    int8_t *q, int16_t *fixed)
{
    if (type == GP_F32) return quantize_weight_row(x, GP_F32, K, q, fixed);
    if (type == GP_BF16) return quantize_weight_row(x, GP_BF16, K, q, fixed);
    return quantize_weight_row(x, GP_F16, K, q, fixed);
}

/* Sums of four vectors, as the four lanes of one. */
INLINE __m128i sum4(const __m512i v[4])
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]),
                                  _mm512_unpackhi_epi32(v[0], v[1]));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]),
                                  _mm512_unpackhi_epi32(v[2], v[3]));
    __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64(s, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

/* Not the intrinsic: around arrays of accumulators gcc 12 spills it (18 stack accesses in the loop of
 * 24, half the speed), as if each result were a new register. */
INLINE __m512i dpbusd(__m512i acc, __m512i w, __m512i x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}

/* One step of 64 columns: four weight rows times V activation rows. */
INLINE void dot_step(const int8_t *const w[4], __mmask64 mask, const int8_t *x, int64_t x_stride,
                     int64_t k, int V, __m512i acc[][4])
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i wk[4];
    for (int r = 0; r < 4; r++)
        wk[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[r] + k), flip);
    for (int v = 0; v < V; v++) {
        __m512i xk = _mm512_loadu_si512(x + v * x_stride + k);
        for (int r = 0; r < 4; r++) acc[v][r] = dpbusd(acc[v][r], wk[r], xk);
    }
}

/* Four weight rows times V activation rows (planes count as rows), over all of K; one vector of
 * four results each, whose sum4 costs 3 instructions a result where a reduction of one costs 7. */
INLINE void dot_tile(const int8_t *const w[4], const int8_t *x, int64_t x_stride, int64_t K,
                     int V, __m128i out[])
{
    __m512i acc[6][4];
    for (int v = 0; v < V; v++)
        for (int r = 0; r < 4; r++) acc[v][r] = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
        dot_step(w, ~0ull, x, x_stride, k, V, acc);
        if (V <= STREAM_ROWS)
            for (int r = 0; r < 4; r++) PREFETCH_STREAM(w[r] + k);
    }
    if (k < K) dot_step(w, ~0ull >> (64 - (K - k)), x, x_stride, k, V, acc);
    for (int v = 0; v < V; v++) out[v] = sum4(acc[v]);
}

/* The integer dot products are the unsigned sum less 128 times the token's. */
INLINE __m128i exact(__m128i sum, int32_t x_sum)
{
    return _mm_sub_epi32(sum, _mm_set1_epi32(128 * x_sum));
}

TILE_LINEAR(int8_linear_avx512_vnni, TARGET, 6)

/* Weight-only: four weight rows times V tokens in float32, one chain of fused multiply-adds per
 * lane whatever V is, so that a token's result does not depend on its neighbours. */
INLINE void float_tile(const int8_t *const w[4], gp_dtype type, const float *x, int64_t x_stride,
                       int64_t K, int V, __m128 out[])
{
    const int64_t size = gp_size(type);
    __m512 acc[6][4];
    for (int v = 0; v < V; v++)
        for (int r = 0; r < 4; r++) acc[v][r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 16) {
        __mmask16 mask = tail_mask(K - k);
        __m512 wk[4];
        for (int r = 0; r < 4; r++) {
            wk[r] = load16(w[r], type, k, mask);
            if (V <= STREAM_ROWS && k * size % 64 == 0) PREFETCH_STREAM(w[r] + k * size);
        }
        for (int v = 0; v < V; v++) {
            __m512 xk = _mm512_loadu_ps(x + v * x_stride + k);
            for (int r = 0; r < 4; r++) acc[v][r] = _mm512_fmadd_ps(wk[r], xk, acc[v][r]);
        }
    }
    for (int v = 0; v < V; v++) {
        float s[4];
        for (int r = 0; r < 4; r++) s[r] = _mm512_reduce_add_ps(acc[v][r]);
        out[v] = _mm_loadu_ps(s);
    }
}

TILE_FLOAT_LINEAR(float_linear_avx512, TARGET, 6)

INLINE void dequantize_row(const int8_t *q, float scale, float offset, int64_t K, void *y,
                           gp_dtype type)
{
    const __m512 scales = _mm512_set1_ps(scale), offsets = _mm512_set1_ps(offset);
    for (int64_t k = 0; k < K; k += 16) {
        __mmask16 mask = tail_mask(K - k);
        store16(y, type, k, mask, _mm512_fmadd_ps(load16(q, GP_I8, k, mask), scales, offsets));
    }
}

TARGET static void int8_dequantize_row_avx512(const int8_t *q, float scale, float offset, int64_t K,
                                              void *y, gp_dtype type)
{
    if (type == GP_F32)
        dequantize_row(q, scale, offset, K, y, GP_F32);
    else if (type == GP_BF16)
        dequantize_row(q, scale, offset, K, y, GP_BF16);
    else
        dequantize_row(q, scale, offset, K, y, GP_F16);
}

TARGET static void to_float_row_avx512(const void *x, gp_dtype type, int64_t K, float *y)
{
    for (int64_t k = 0; k < K; k += 16) {
        __mmask16 mask = tail_mask(K - k);
        _mm512_mask_storeu_ps(y + k, mask, load16(x, type, k, mask));
    }
}

const gp_impl gp_impl_int8_avx512_vnni = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .int8_quantize_row = int8_quantize_row_avx512_vnni,
    .int8_quantize_weight_row = int8_quantize_weight_row_avx512,
    .int8_linear = int8_linear_avx512_vnni,
    .float_linear = float_linear_avx512,
    .int8_dequantize_row = int8_dequantize_row_avx512,
    .to_float_row = to_float_row_avx512,
};
#endif
