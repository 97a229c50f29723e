/* SPDX-License-Identifier: MIT
 * Sixteen floats at a time: loads of every type and stores of every float type, shared by the AVX-512 and AMX
 * kernels. The includer defines TARGET. */
#ifndef GPU_POOR_AVX512_H
#define GPU_POOR_AVX512_H

#include <immintrin.h>

#include "../common.h"

#ifndef TARGET
#define TARGET GP_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#define INLINE GP_INLINE TARGET

/* How weights that are read once a token are prefetched: into L1 alone, so that what runs between the tokens,
 * Python above all, stays in the other caches. Zen 5, ms a token through generate, in turn with T0: GPT-2-large
 * int8 19.7 for 20.6, TinyLlama int4 15.0 for 15.7. */
#define STREAM_HINT _MM_HINT_NTA

INLINE __m512 load16(const void *x, gp_dtype type, int64_t i, __mmask16 mask)
{
    if (type == GP_F32) return _mm512_maskz_loadu_ps(mask, (const float *)x + i);
    if (type == GP_I8) {
        __m128i b = _mm_maskz_loadu_epi8(mask, (const int8_t *)x + i);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
    }
    __m256i h = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i);
    if (type == GP_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Round to nearest even, NaN made quiet: gp_float_to_bf16 on 16 lanes. */
INLINE __m256i float_to_bf16(__m512 v)
{
    __m512i u = _mm512_castps_si512(v), top = _mm512_srli_epi32(u, 16);
    __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_srli_epi32(r, 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, top, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(r);
}

INLINE void store16(void *y, gp_dtype type, int64_t i, __mmask16 mask, __m512 v)
{
    if (type == GP_F32) {
        _mm512_mask_storeu_ps((float *)y + i, mask, v);
        return;
    }
    __m256i h = type == GP_BF16 ? float_to_bf16(v)
                                : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16((uint16_t *)y + i, mask, h);
}

INLINE __mmask16 tail_mask(int64_t left)
{
    return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
}

#endif
