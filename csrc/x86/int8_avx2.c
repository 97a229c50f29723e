/* SPDX-License-Identifier: MIT
 *
 * int8 kernels for AVX2. vpmaddubsw saturates pairs of products at 16 bits, which 255 * 127 * 2
 * exceeds (an offset of 128 gave 1278 wrong results of 1280 in a trial). So both operands keep
 * their magnitude: |w| is the unsigned one and x, given w's sign, the signed one. |w| <= 128,
 * |x| <= 127: a pair reaches 32512 < 32767, exact for every weight, -128 included.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "avx2.h"

#define STREAM_ROWS 2
#define STREAM_HINT _MM_HINT_T0 /* two tokens of a16 read the weights twice: not at all past L1, 5.5 ms became 7 */
#include "linear_tile.h"

INLINE int32_t add_lanes(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* The reference's absmax_bits. */
INLINE uint32_t absmax_bits(const void *x, gp_dtype type, int64_t K)
{
    const int64_t K8 = K / 8 * 8;
    __m256i top = _mm256_setzero_si256();
    for (int64_t k = 0; k < K; k += 8) {
        __m256 v = k < K8 ? load8(x, type, k) : load_tail(x, type, k, K - k);
        top = _mm256_max_epi32(
            top, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
    }
    uint32_t lanes[8], bits = 0;
    _mm256_storeu_si256((__m256i *)lanes, top);
    for (int i = 0; i < 8; i++) bits = lanes[i] > bits ? lanes[i] : bits;
    return bits;
}

INLINE float quantize_row(const void *x, gp_dtype type, int64_t K, int planes, int8_t *q,
                          int64_t stride, int32_t *sum)
{
    const int64_t K8 = K / 8 * 8;
    const gp_grid grid = gp_grid_of(absmax_bits(x, type, K), GP_Q_MAX(planes));
    const __m256i keep = _mm256_set1_epi32(grid.inverse ? -1 : 0);
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
    for (int64_t k = 0; k < K; k += 8) {
        __m256 v = k < K8 ? load8(x, type, k) : load_tail(x, type, k, K - k);
        __m256i r = _mm256_cvtps_epi32(_mm256_mul_ps(v, _mm256_set1_ps(grid.inverse)));
        r = _mm256_and_si256(r, keep);
        if (planes == 2) {
            __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(r), _mm256_set1_ps(1.0f / 254.0f));
            __m256i high = _mm256_cvtps_epi32(part);
            __m256i low = _mm256_sub_epi32(r, _mm256_mullo_epi32(high, _mm256_set1_epi32(254)));
            store_bytes(q + stride + k, low, K - k);
            sum1 = _mm256_add_epi32(sum1, low);
            r = high;
        }
        store_bytes(q + k, r, K - k);
        sum0 = _mm256_add_epi32(sum0, r);
    }
    sum[0] = add_lanes(sum0);
    if (planes == 2) sum[1] = add_lanes(sum1);
    return grid.scale;
}

TARGET static float int8_quantize_row_avx2(const void *x, gp_dtype type, int64_t K, int planes,
                                           int8_t *q, int64_t stride, int32_t *sum)
{
#define CASE(T, P)                                                                                \
    if (type == T && planes == P) return quantize_row(x, T, K, P, q, stride, sum);
    CASE(GP_F32, 1) CASE(GP_F32, 2) CASE(GP_BF16, 1) CASE(GP_BF16, 2) CASE(GP_F16, 1)
#undef CASE
    return quantize_row(x, GP_F16, K, 2, q, stride, sum);
}

/* q of 16 fixed point weights as int16. */
INLINE __m256i clipped(__m256i fixed, int clip)
{
    __m256i v = _mm256_mulhrs_epi16(fixed, _mm256_set1_epi16((short)(128 + clip)));
    v = _mm256_min_epi16(v, _mm256_set1_epi16(127));
    return _mm256_max_epi16(v, _mm256_set1_epi16(-127));
}

/* Sixteen fixed point weights, zero beyond count. */
INLINE __m256i load_fixed(const int16_t *fixed, int64_t count)
{
    if (count >= 16) return _mm256_loadu_si256((const __m256i *)fixed);
    int16_t tail[16] = {0};
    memcpy(tail, fixed, (size_t)count * 2);
    return _mm256_loadu_si256((const __m256i *)tail);
}

/* Lanes of pairs reach 2 * 32512 * 127 a step: 2048 columns are 128 steps, 260 would overflow. */
#define CLIP_BLOCK 2048

INLINE int64_t add_lanes_wide(__m256i v)
{
    __m256i s = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                                 _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
    __m128i t = _mm_add_epi64(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    return _mm_cvtsi128_si64(t) + _mm_extract_epi64(t, 1);
}

INLINE float quantize_weight_row(const void *x, gp_dtype type, int64_t K, int8_t *q,
                                 int16_t *fixed)
{
    const int64_t K8 = K / 8 * 8;
    const uint32_t absmax = absmax_bits(x, type, K);
    const gp_grid grid = gp_grid_of(absmax, GP_FIXED_MAX);
    if (!grid.inverse) {
        memset(q, 0, (size_t)K);
        return grid.scale;
    }
    const __m256 inverse = _mm256_set1_ps(grid.inverse);
    for (int64_t k = 0; k < K; k += 8) {
        __m256 v = k < K8 ? load8(x, type, k) : load_tail(x, type, k, K - k);
        __m256i r = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
        __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
        memcpy(fixed + k, &s, (size_t)gp_min(K - k, 8) * 2);
    }
    double best = -1, best_ratio = 0;
    int best_clip = 0;
    for (int clip = 0; clip < GP_CLIPS; clip++) {
        int64_t xq = 0, qq = 0;
        for (int64_t k0 = 0; k0 < K; k0 += CLIP_BLOCK) {
            int64_t k1 = gp_min(k0 + CLIP_BLOCK, K);
            __m256i xq8 = _mm256_setzero_si256(), qq8 = xq8;
            for (int64_t k = k0; k < k1; k += 16) {
                __m256i f = load_fixed(fixed + k, K - k), v = clipped(f, clip);
                xq8 = _mm256_add_epi32(xq8, _mm256_madd_epi16(f, v));
                qq8 = _mm256_add_epi32(qq8, _mm256_madd_epi16(v, v));
            }
            xq += add_lanes_wide(xq8);
            qq += add_lanes_wide(qq8);
        }
        gp_choose_clip(xq, qq, clip, &best, &best_ratio, &best_clip);
    }
    for (int64_t k = 0; k < K; k += 16) {
        __m256i v = clipped(load_fixed(fixed + k, K - k), best_clip);
        __m128i b = _mm_packs_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        memcpy(q + k, &b, (size_t)gp_min(K - k, 16));
    }
    return (float)(best_ratio * (double)gp_from_bits(absmax) / (double)GP_FIXED_MAX);
}

TARGET static float int8_quantize_weight_row_avx2(const void *x, gp_dtype type, int64_t K,
                                                  int8_t *q, int16_t *fixed)
{
    if (type == GP_F32) return quantize_weight_row(x, GP_F32, K, q, fixed);
    if (type == GP_BF16) return quantize_weight_row(x, GP_BF16, K, q, fixed);
    return quantize_weight_row(x, GP_F16, K, q, fixed);
}

/* Sums of four vectors, as the four lanes of one. */
INLINE __m128i sum4(const __m256i v[4])
{
    __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

/* 32 columns of one weight row times V activation rows. */
INLINE void dot_step(__m256i wk, const int8_t *x, int64_t x_stride, int V, __m256i acc[])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i magnitude = _mm256_abs_epi8(wk);
    for (int v = 0; v < V; v++) {
        __m256i xk = _mm256_loadu_si256((const __m256i *)(x + v * x_stride));
        __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(xk, wk));
        acc[v] = _mm256_add_epi32(acc[v], _mm256_madd_epi16(pairs, ones));
    }
}

/* Four rows abreast are four streams from memory; more than two activation rows would need more
 * registers than there are, so then row after row. */
INLINE void dot_tile(const int8_t *const w[4], const int8_t *x, int64_t x_stride, int64_t K,
                     int V, __m128i out[])
{
    const int R = V <= STREAM_ROWS ? 4 : 1;
    __m256i sums[4][4];
    for (int r0 = 0; r0 < 4; r0 += R) {
        __m256i acc[4][4];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) acc[r][v] = _mm256_setzero_si256();
        int64_t k = 0;
        for (; k + 32 <= K; k += 32) {
            for (int r = 0; r < R; r++) {
                const int8_t *wk = w[r0 + r] + k;
                dot_step(_mm256_loadu_si256((const __m256i *)wk), x + k, x_stride, V, acc[r]);
                if (k % 64 == 0) PREFETCH_STREAM(wk);
            }
        }
        if (k < K) {
            for (int r = 0; r < R; r++) {
                int8_t tail[32] = {0};
                memcpy(tail, w[r0 + r] + k, (size_t)(K - k));
                __m256i wk = _mm256_loadu_si256((const __m256i *)tail);
                dot_step(wk, x + k, x_stride, V, acc[r]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[v][r0 + r] = acc[r][v];
    }
    for (int v = 0; v < V; v++) out[v] = sum4(sums[v]);
}

INLINE __m128i exact(__m128i sum, int32_t x_sum)
{
    (void)x_sum; /* signed operands need no correction */
    return sum;
}

TILE_LINEAR(int8_linear_avx2, TARGET, 4)

INLINE void float_step(__m256 wk, const float *x, int64_t x_stride, int V, int r,
                       __m256 acc[2][4])
{
    for (int v = 0; v < V; v++)
        acc[v][r] = _mm256_fmadd_ps(wk, _mm256_loadu_ps(x + v * x_stride), acc[v][r]);
}

INLINE void float_tile(const int8_t *const w[4], gp_dtype type, const float *x, int64_t x_stride,
                       int64_t K, int V, __m128 out[])
{
    const int64_t size = gp_size(type);
    __m256 acc[2][4];
    for (int v = 0; v < V; v++)
        for (int r = 0; r < 4; r++) acc[v][r] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
        for (int r = 0; r < 4; r++) {
            if (k * size % 64 == 0) PREFETCH_STREAM(w[r] + k * size);
            float_step(load8(w[r], type, k), x + k, x_stride, V, r, acc);
        }
    }
    if (k < K)
        for (int r = 0; r < 4; r++)
            float_step(load_tail(w[r], type, k, K - k), x + k, x_stride, V, r, acc);
    for (int v = 0; v < V; v++) {
        __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(acc[v][0], acc[v][1]),
                                  _mm256_hadd_ps(acc[v][2], acc[v][3]));
        out[v] = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    }
}

TILE_FLOAT_LINEAR(float_linear_avx2, TARGET, 2)

INLINE void dequantize_row(const int8_t *q, float scale, float offset, int64_t K, void *y,
                           gp_dtype type)
{
    const __m256 scales = _mm256_set1_ps(scale), offsets = _mm256_set1_ps(offset);
    int64_t k = 0;
    for (; k + 8 <= K; k += 8)
        store8(y, type, k, _mm256_fmadd_ps(load8(q, GP_I8, k), scales, offsets));
    for (; k < K; k++) gp_store(y, type, k, fmaf((float)q[k], scale, offset));
}

TARGET static void int8_dequantize_row_avx2(const int8_t *q, float scale, float offset, int64_t K,
                                            void *y, gp_dtype type)
{
    if (type == GP_F32)
        dequantize_row(q, scale, offset, K, y, GP_F32);
    else if (type == GP_BF16)
        dequantize_row(q, scale, offset, K, y, GP_BF16);
    else
        dequantize_row(q, scale, offset, K, y, GP_F16);
}

TARGET static void to_float_row_avx2(const void *x, gp_dtype type, int64_t K, float *y)
{
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) _mm256_storeu_ps(y + k, load8(x, type, k));
    for (; k < K; k++) y[k] = gp_load(x, type, k);
}

const gp_impl gp_impl_int8_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .int8_quantize_row = int8_quantize_row_avx2,
    .int8_quantize_weight_row = int8_quantize_weight_row_avx2,
    .int8_linear = int8_linear_avx2,
    .float_linear = float_linear_avx2,
    .int8_dequantize_row = int8_dequantize_row_avx2,
    .to_float_row = to_float_row_avx2,
};
#endif
