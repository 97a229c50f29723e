/* SPDX-License-Identifier: MIT
 * Attention over pages for AVX2: sixteen lanes are two registers. */
#if defined(__x86_64__)
#include "../attention.h"
#include "avx2.h"

#define NAME(name) name##_avx2
#define TILE 4  /* sums of 2 registers, of 16 */
#define STRIP 1 /* x 4 heads: 8 registers of sums */

typedef struct {
    __m256 a, b;
} v16;

INLINE v16 v16_set1(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE v16 v16_zero(void) { return v16_set1(0); }
INLINE v16 v16_load(const float *x) { return (v16){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE void v16_store(float *y, v16 v) { _mm256_storeu_ps(y, v.a), _mm256_storeu_ps(y + 8, v.b); }
#define EACH(name, operation)                                                                     \
    INLINE v16 name(v16 x, v16 y) { return (v16){operation(x.a, y.a), operation(x.b, y.b)}; }
EACH(v16_add, _mm256_add_ps)
EACH(v16_sub, _mm256_sub_ps)
EACH(v16_mul, _mm256_mul_ps)
EACH(v16_xor, _mm256_xor_ps)
EACH(v16_max, _mm256_max_ps) /* y if one is a NaN */
#undef EACH
INLINE float v16_highest(v16 v)
{
    const __m256 x = _mm256_max_ps(v.a, v.b);
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
/* x in lanes [begin, end), `other` in the rest. */
INLINE v16 v16_within(v16 x, int64_t begin, int64_t end, float other)
{
    const __m256 o = _mm256_set1_ps(other);
    const __m256i first = _mm256_set1_epi32((int)gp_min(begin, 16)), last = _mm256_set1_epi32((int)gp_min(end, 16));
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 y[2] = {x.a, x.b};
    for (int i = 0; i < 2; i++) {
        const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(first, lane), _mm256_cmpgt_epi32(last, lane));
        y[i] = _mm256_blendv_ps(o, y[i], _mm256_castsi256_ps(in));
        lane = _mm256_add_epi32(lane, _mm256_set1_epi32(8));
    }
    return (v16){y[0], y[1]};
}
INLINE v16 v16_fma(v16 x, v16 y, v16 z)
{
    return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

/* Elements [i, i + 16) of a row, zero beyond `left` of them. */
INLINE v16 v16_row(const void *x, gp_dtype type, int64_t i, int64_t left)
{
    if (left >= 16) return (v16){load8(x, type, i), load8(x, type, i + 8)};
    return (v16){load_tail(x, type, i, gp_min(left, 8)),
                 left > 8 ? load_tail(x, type, i + 8, left - 8) : _mm256_setzero_ps()};
}

INLINE void v16_store_as(void *y, gp_dtype type, int64_t i, v16 v)
{
    store8(y, type, i, v.a), store8(y, type, i + 8, v.b);
}

INLINE __m256 rint8(__m256 v)
{
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE v16 v16_rint(v16 v) { return (v16){rint8(v.a), rint8(v.b)}; }

/* gp_page_value of what is multiplied already */
INLINE __m256 page_value8(__m256 v)
{
    return _mm256_max_ps(_mm256_min_ps(rint8(v), _mm256_set1_ps(127)), _mm256_set1_ps(-127));
}
INLINE v16 v16_page_value(v16 v) { return (v16){page_value8(v.a), page_value8(v.b)}; }

INLINE void v16_store_bytes(int8_t *y, v16 v)
{
    store_bytes(y, _mm256_cvtps_epi32(v.a), 8), store_bytes(y + 8, _mm256_cvtps_epi32(v.b), 8);
}

/* gp_exp2 */
INLINE __m256 exp8(__m256 x)
{
    static const float c[] = GP_EXP2_POLYNOMIAL;
    const __m256 round = _mm256_set1_ps(GP_EXP2_ROUND), shifted = _mm256_add_ps(x, round);
    const __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, round));
    __m256 p = _mm256_set1_ps(c[0]);
    for (int i = 1; i < 7; i++) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c[i]));
    const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                                           _mm256_set1_epi32(0x3f800000));
    const __m256 drop = _mm256_cmp_ps(x, _mm256_set1_ps(-126), _CMP_LT_OQ);
    return _mm256_andnot_ps(drop, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}
INLINE v16 v16_exp2(v16 x) { return (v16){exp8(x.a), exp8(x.b)}; }

INLINE __m128 fold4(v16 v) /* lanes l + 8, then l + 4 */
{
    const __m256 half = _mm256_add_ps(v.a, v.b);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Four folds at once. */
INLINE void v16_fold_tile(const v16 sum[TILE], float *out)
{
    __m128 x[4];
    for (int i = 0; i < 4; i++) x[i] = fold4(sum[i]);
    const __m128 u = _mm_add_ps(_mm_unpacklo_ps(x[0], x[1]), _mm_unpackhi_ps(x[0], x[1]));
    const __m128 v = _mm_add_ps(_mm_unpacklo_ps(x[2], x[3]), _mm_unpackhi_ps(x[2], x[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(u, v), _mm_movehl_ps(v, u)));
}

/* -- int8: attention_bytes.h ------------------------------------------------------------------- */

#define LANES 4 /* each two sums, of two products each */

typedef struct {
    int16_t w[GP_WORDS];
} words;
typedef __m256i quad, bytes, sums, lanes;

INLINE void words_store(words *w, int64_t i, v16 v)
{
    const __m256i x = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
    _mm256_storeu_si256((__m256i *)(w->w + 16 + i), _mm256_permute4x64_epi64(x, 0xd8));
}

INLINE quad quad_load(const words *w, int64_t i)
{
    int64_t x;
    memcpy(&x, w->w + 16 + i, 8);
    return _mm256_set1_epi64x(x);
}

/* Of LANES fours; there are always so many left, because D is a multiple of 4. */
INLINE bytes bytes_load(const char *x, int64_t left)
{
    (void)left;
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)x));
}

INLINE lanes lanes_zero(void) { return _mm256_setzero_si256(); }
INLINE sums sums_of(lanes x) { return x; }
INLINE lanes lanes_of(sums s) { return s; }
/* Both as one: gcc 12 does all products first, and spills sums for them. */
INLINE sums sums_dot(sums s, bytes x, quad w)
{
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(s), "=&x"(product) : "x"(x), "x"(w));
    return s;
}

/* y = (x - bias) * scale, of LANES of them. */
INLINE void lanes_store(lanes x, int32_t bias, float scale, float *y)
{
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(x, x), 0x08);
    const __m128i sum = _mm_sub_epi32(_mm256_castsi256_si128(pairs), _mm_set1_epi32(bias));
    _mm_storeu_ps(y, _mm_mul_ps(_mm_cvtepi32_ps(sum), _mm_set1_ps(scale)));
}

/* Largest magnitude so far, as bits. */
INLINE __m256 absmax8(__m256 top, __m256 x)
{
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(top), bits));
}
INLINE v16 v16_absmax(v16 top, v16 x) { return (v16){absmax8(top.a, x.a), absmax8(top.b, x.b)}; }

INLINE uint32_t v16_bits(v16 top)
{
    const __m256i x = _mm256_castps_si256(absmax8(top.a, top.b));
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

#include "attention_template.h"

const gp_impl gp_impl_attention_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .page_store_row = page_store_row_avx2,
    .attend_chunk = attend_chunk_avx2,
    .attend_merge = attend_merge_avx2,
    .attend_finish = attend_finish_avx2,
};
#endif
