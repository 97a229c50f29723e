/* SPDX-License-Identifier: MIT
 *
 * Calibration statistics for AVX2 and AVX-512: one template, the two differ by vector width.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "../common.h"

#define NAME(name) name##_avx2
#define TARGET GP_TARGET("avx2,fma")
#define LANES 8
#define ROWS 4 /* 4 x 3 accumulators, of 16 registers */
#define VECS 3
#define vec __m256
#define vec_load(p) _mm256_loadu_ps(p)
#define vec_store(p, v) _mm256_storeu_ps(p, v)
#define vec_set1(x) _mm256_set1_ps(x)
#define vec_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#include "stats_template.h"

#define NAME(name) name##_avx512
#define TARGET GP_TARGET("avx2,fma,avx512f,avx512vl")
#define LANES 16
#define ROWS 8 /* 8 x 3 accumulators, of 32 registers */
#define VECS 3
#define vec __m512
#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, v) _mm512_storeu_ps(p, v)
#define vec_set1(x) _mm512_set1_ps(x)
#define vec_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "stats_template.h"

/* bfloat16: two exact products a lane and instruction. */
#define NAME(name) name##_pairs
#define TARGET GP_TARGET("avx512f,avx512vl,avx512bf16")
#define LANES 16
#define ROWS 8
#define VECS 3
#define vec __m512
#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, v) _mm512_storeu_ps(p, v)
#define ELEMENT uint32_t
#define STEPS(M) (((M) + 1) / 2)
#define element_load(p) (__m512bh) _mm512_loadu_si512(p)
#define element_set1(x) (__m512bh) _mm512_set1_epi32((int)(x))
#define element_fma(a, b, c) _mm512_dpbf16_ps(c, a, b)
#include "gram_template.h"

TARGET static void gram_pairs_avx512(const uint16_t *packed, int64_t M, int64_t K, int64_t p0,
                                     int64_t p1, float *acc)
{
    squares_pairs((const uint32_t *)packed, M, K, p0, p1, acc);
}

const gp_impl gp_impl_stats_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .channel_stats = channel_stats_avx2,
    .gram = squares_avx2,
};

const gp_impl gp_impl_stats_avx512 = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .channel_stats = channel_stats_avx512,
    .gram = squares_avx512,
};

const gp_impl gp_impl_stats_avx512_bf16 = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI | GP_CPU_AVX512_BF16,
    .fast_pairs = 1,
    .gram_pairs = gram_pairs_avx512,
};
#endif
