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
#define ROWS 4 /* 4 x 2 accumulators, of 16 registers */
#define VECS 2
#define vec __m256
#define vec_load(p) _mm256_loadu_ps(p)
#define vec_store(p, v) _mm256_storeu_ps(p, v)
#define vec_set1(x) _mm256_set1_ps(x)
#define vec_zero() _mm256_setzero_ps()
#define vec_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#include "stats_template.h"

#define NAME(name) name##_avx512
#define TARGET GP_TARGET("avx2,fma,avx512f,avx512vl")
#define LANES 16
#define ROWS 6 /* 6 x 4 accumulators, of 32 registers */
#define VECS 4
#define vec __m512
#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, v) _mm512_storeu_ps(p, v)
#define vec_set1(x) _mm512_set1_ps(x)
#define vec_zero() _mm512_setzero_ps()
#define vec_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "stats_template.h"

const gp_impl gp_impl_stats_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .channel_stats = channel_stats_avx2,
    .gram = gram_avx2,
};

const gp_impl gp_impl_stats_avx512 = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .channel_stats = channel_stats_avx512,
    .gram = gram_avx512,
};
#endif
