/* SPDX-License-Identifier: MIT
 * Attention over pages for AVX-512: sixteen lanes are one register. */
#if defined(__x86_64__)
#include "../attention.h"
#include "avx512.h"

#define NAME(name) name##_avx512
#define TILE 16 /* sums of 32 registers */
#define STRIP 4 /* x 4 heads: 16 sums */

typedef __m512 v16;

INLINE v16 v16_zero(void) { return _mm512_setzero_ps(); }
INLINE v16 v16_set1(float x) { return _mm512_set1_ps(x); }
INLINE v16 v16_load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void v16_store(float *y, v16 v) { _mm512_storeu_ps(y, v); }
INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
INLINE v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
INLINE v16 v16_xor(v16 a, v16 b) { return _mm512_xor_ps(a, b); }
INLINE v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); } /* b if one is a NaN */
INLINE float v16_highest(v16 v) { return _mm512_reduce_max_ps(v); }
/* x in lanes [begin, end), `other` in the rest. */
INLINE v16 v16_within(v16 x, int64_t begin, int64_t end, float other)
{
    const __mmask16 in = (__mmask16)(tail_mask(end) & ~tail_mask(begin));
    return _mm512_mask_mov_ps(_mm512_set1_ps(other), in, x);
}
INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }

/* Elements [i, i + 16) of a row, zero beyond `left` of them. */
INLINE v16 v16_row(const void *x, gp_dtype type, int64_t i, int64_t left)
{
    return load16(x, type, i, tail_mask(left));
}

INLINE void v16_store_as(void *y, gp_dtype type, int64_t i, v16 v)
{
    store16(y, type, i, (__mmask16)0xffff, v);
}

INLINE v16 v16_rint(v16 v)
{
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* gp_page_value of what is multiplied already */
INLINE v16 v16_page_value(v16 v)
{
    return _mm512_max_ps(_mm512_min_ps(v16_rint(v), _mm512_set1_ps(127)), _mm512_set1_ps(-127));
}

INLINE void v16_store_bytes(int8_t *y, v16 v)
{
    _mm_storeu_si128((__m128i *)y, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

/* gp_exp2 */
INLINE v16 v16_exp2(v16 x)
{
    static const float c[] = GP_EXP2_POLYNOMIAL;
    const v16 round = _mm512_set1_ps(GP_EXP2_ROUND), shifted = _mm512_add_ps(x, round);
    const v16 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, round));
    v16 p = _mm512_set1_ps(c[0]);
    for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    const __m512i power = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23),
                                           _mm512_set1_epi32(0x3f800000));
    const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    return _mm512_maskz_mul_ps(keep, p, _mm512_castsi512_ps(power));
}

INLINE __m128 fold4(__m512 v) /* lanes l + 8, then l + 4 */
{
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Lanes l + 8 to l of two, then l + 4 to l of two such. */
INLINE __m512 fold_pair8(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
INLINE __m512 fold_pair4(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Sixteen folds at once. After two steps register i has four lanes left of sums i, i + 4, i + 8 and i + 12,
 * so that after two more they lie in order. */
INLINE void v16_fold_tile(const v16 sum[TILE], float *out)
{
    __m512 x[4];
    for (int i = 0; i < 4; i++)
        x[i] = fold_pair4(fold_pair8(sum[i], sum[i + 4]), fold_pair8(sum[i + 8], sum[i + 12]));
    __m512 u = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 v = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(u, v, 0x44), _mm512_shuffle_ps(u, v, 0xee)));
}

/* -- int8: attention_bytes.h ------------------------------------------------------------------- */

#define LANES 16

/* w = 256 high + low */
typedef struct {
    int8_t high[GP_WORDS], low[GP_WORDS];
} words;
typedef struct {
    __m512i high, low;
} quad, sums;
typedef __m512i bytes, lanes;

INLINE void words_store(words *w, int64_t i, v16 v)
{
    const __m512i x = _mm512_cvtps_epi32(v);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128((__m128i *)(w->high + 16 + i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i *)(w->low + 16 + i), _mm512_cvtepi32_epi8(x));
}

INLINE quad quad_load(const words *w, int64_t i)
{
    int32_t high, low;
    memcpy(&high, w->high + 16 + i, 4), memcpy(&low, w->low + 16 + i, 4);
    return (quad){_mm512_set1_epi32(high), _mm512_set1_epi32(low)};
}

/* Of LANES fours, zero beyond `left` of them. */
INLINE bytes bytes_load(const char *x, int64_t left)
{
    return left >= LANES ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi32(tail_mask(left), x);
}

INLINE lanes lanes_zero(void) { return _mm512_setzero_si512(); }
INLINE sums sums_of(lanes x) { return (sums){_mm512_setzero_si512(), x}; }
INLINE lanes lanes_of(sums s) { return _mm512_add_epi32(_mm512_slli_epi32(s.high, 8), s.low); }

/* As int8_avx512_vnni.c: gcc 12 spills the accumulators of the intrinsic. */
INLINE sums sums_dot(sums s, bytes x, quad w)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(s.high) : "v"(x), "v"(w.high));
    __asm__("vpdpbusd %2, %1, %0" : "+v"(s.low) : "v"(x), "v"(w.low));
    return s;
}

/* y = (x - bias) * scale, of LANES of them. */
INLINE void lanes_store(lanes x, int32_t bias, float scale, float *y)
{
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(bias)));
    _mm512_storeu_ps(y, _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
}

/* Largest magnitude so far, as bits. */
INLINE v16 v16_absmax(v16 top, v16 x)
{
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(top), bits));
}

INLINE uint32_t v16_bits(v16 top) { return _mm512_reduce_max_epu32(_mm512_castps_si512(top)); }

#include "attention_template.h"

const gp_impl gp_impl_attention_avx512 = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .page_store_row = page_store_row_avx512,
    .attend_chunk = attend_chunk_avx512,
    .attend_merge = attend_merge_avx512,
    .attend_finish = attend_finish_avx512,
};
#endif
