/* SPDX-License-Identifier: MIT
 * Eight floats at a time: loads of every type and stores of every float type, shared by the AVX2 kernels;
 * defines TARGET and INLINE. */
#ifndef GPU_POOR_AVX2_H
#define GPU_POOR_AVX2_H

#include <immintrin.h>

#include "../common.h"

#define TARGET GP_TARGET("avx2,fma,f16c")
#define INLINE GP_INLINE TARGET

INLINE __m256 load8(const void *x, gp_dtype type, int64_t i)
{
    if (type == GP_F32) return _mm256_loadu_ps((const float *)x + i);
    if (type == GP_I8) {
        __m128i b = _mm_loadl_epi64((const __m128i *)((const int8_t *)x + i));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
    }
    __m128i h = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (type == GP_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* The last K % 8 elements, zero beyond: AVX2 has no masked loads of 16 bits. */
INLINE __m256 load_tail(const void *x, gp_dtype type, int64_t i, int64_t count)
{
    float f[8] = {0};
    for (int64_t j = 0; j < count; j++) f[j] = gp_load(x, type, i + j);
    return _mm256_loadu_ps(f);
}

INLINE __m128i float_to_bf16(__m256 v)
{
    __m256i u = _mm256_castps_si256(v), top = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    r = _mm256_blendv_epi8(_mm256_srli_epi32(r, 16), quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

INLINE void store8(void *y, gp_dtype type, int64_t i, __m256 v)
{
    if (type == GP_F32) {
        _mm256_storeu_ps((float *)y + i, v);
        return;
    }
    __m128i h = type == GP_BF16 ? float_to_bf16(v)
                                : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i *)((uint16_t *)y + i), h);
}

/* Eight int32 in [-128, 127] to eight bytes at q. */
INLINE void store_bytes(int8_t *q, __m256i v, int64_t count)
{
    __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(s, s));
    memcpy(q, &bytes, (size_t)gp_min(count, 8));
}

#endif
