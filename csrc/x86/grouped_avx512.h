/* SPDX-License-Identifier: MIT
 * Sixteen rows of a grouped weight at a time: shared by AVX-512 and AMX. The includer may define TARGET. */
#ifndef GPU_POOR_GROUPED_AVX512_H
#define GPU_POOR_GROUPED_AVX512_H

#include "avx512.h"
#include "grouped.h"

INLINE __m512 load_halves(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* The last step: 16 outputs of token m. */
INLINE void store_panel(void *y, gp_dtype type, const float *bias, int64_t N, int64_t p, int64_t m,
                        __m512 t)
{
    int64_t n = p * GP_PANEL_ROWS;
    __mmask16 mask = tail_mask(N - n);
    if (bias) t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(mask, bias + n));
    store16(y, type, m * N + n, mask, t);
}
#endif
