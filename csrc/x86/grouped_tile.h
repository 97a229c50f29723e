/* SPDX-License-Identifier: MIT
 *
 * The loops around a tile of grouped products, shared by AVX2 and AVX-512. The includer defines TARGET
 * and, always inlined, with P, V, planes, bits and asym constant,
 *     grouped_tile(a, s, p, step, P, m, V, planes, bits, asym, ahead)    panels p, p + step, ... (P of
 *     grouped_float_tile(a, s, p, step, P, m, V, bits, asym, ahead)      them) by tokens [m, m + V), up
 *                                                                        to y; `ahead`: prefetching w
 * and GROUPED_TILE_ROWS, the rows of activations (tokens times planes) of a tile of one panel, and
 * GROUPED_STREAMS, the streams that the weights are read as when there are few.
 */
#ifndef GPU_POOR_GROUPED_TILE_H
#define GPU_POOR_GROUPED_TILE_H

/* Up to this many rows of activations the weights are read as GROUPED_STREAMS streams, each a part of
 * the panels, as in linear_tile.h. */
#define GROUPED_STREAM_ROWS 2

/* Tokens of a block, which all panels work on before the next: 512 KB, a multiple of the tile. */
INLINE int64_t grouped_block(int64_t token_bytes)
{
    return ((1 << 19) / (token_bytes * GROUPED_TILE_ROWS + 1) + 1) * GROUPED_TILE_ROWS;
}

INLINE void grouped_panels(const gp_grouped_linear *a, int64_t p0, int64_t p1, int planes, int bits,
                           int asym)
{
    enum { V1 = GROUPED_TILE_ROWS, V2 = GROUPED_TILE_ROWS / 2 };
    const grouped_shape s = grouped_shape_of(&a->w);
    if (a->M * planes <= GROUPED_STREAM_ROWS) {
        const int64_t part = (p1 - p0) / GROUPED_STREAMS;
        for (int64_t p = p0; p < p0 + part; p++) {
            if (planes == 1 && a->M == 2)
                grouped_tile(a, s, p, part, GROUPED_STREAMS, 0, 2, 1, bits, asym, 1);
            else
                grouped_tile(a, s, p, part, GROUPED_STREAMS, 0, 1, planes, bits, asym, 1);
        }
        p0 += GROUPED_STREAMS * part;
    }
    const int64_t block = grouped_block(a->K_pad * planes);
    for (int64_t m0 = 0; m0 < a->M; m0 += block) {
        const int64_t m1 = gp_min(m0 + block, a->M);
        for (int64_t p = p0; p < p1; p++) {
            int64_t m = m0;
            /* The first tile of a panel reads it from memory, the others from L1. */
            if (planes == 1) {
                if (m + V1 <= m1) grouped_tile(a, s, p, 0, 1, m, V1, 1, bits, asym, 1), m += V1;
                for (; m + V1 <= m1; m += V1) grouped_tile(a, s, p, 0, 1, m, V1, 1, bits, asym, 0);
            } else {
                if (m + V2 <= m1) grouped_tile(a, s, p, 0, 1, m, V2, 2, bits, asym, 1), m += V2;
                for (; m + V2 <= m1; m += V2) grouped_tile(a, s, p, 0, 1, m, V2, 2, bits, asym, 0);
            }
            for (; m + 2 <= m1; m += 2) grouped_tile(a, s, p, 0, 1, m, 2, planes, bits, asym, 1);
            if (m < m1) grouped_tile(a, s, p, 0, 1, m, 1, planes, bits, asym, 1);
        }
    }
}

INLINE void grouped_float_panels(const gp_grouped_float_linear *a, int64_t p0, int64_t p1, int bits,
                                 int asym)
{
    const grouped_shape s = grouped_shape_of(&a->w);
    if (a->M == 1) {
        const int64_t part = (p1 - p0) / GROUPED_STREAMS;
        for (int64_t p = p0; p < p0 + part; p++)
            grouped_float_tile(a, s, p, part, GROUPED_STREAMS, 0, 1, bits, asym, 1);
        p0 += GROUPED_STREAMS * part;
    }
    const int64_t block = grouped_block(a->K_pad * 4);
    for (int64_t m0 = 0; m0 < a->M; m0 += block) {
        const int64_t m1 = gp_min(m0 + block, a->M);
        for (int64_t p = p0; p < p1; p++) {
            int64_t m = m0;
            for (; m + GROUPED_TILE_ROWS <= m1; m += GROUPED_TILE_ROWS)
                grouped_float_tile(a, s, p, 0, 1, m, GROUPED_TILE_ROWS, bits, asym, 1);
            for (; m + 2 <= m1; m += 2) grouped_float_tile(a, s, p, 0, 1, m, 2, bits, asym, 1);
            if (m < m1) grouped_float_tile(a, s, p, 0, 1, m, 1, bits, asym, 1);
        }
    }
}

/* Each combination is compiled apart. */
TARGET static void grouped_linear_tiled(const gp_grouped_linear *a, int64_t p0, int64_t p1)
{
#define CASE(planes_, bits_, asym_)                                                               \
    if (a->planes == planes_ && a->w.bits == bits_ && a->w.asym == asym_)                         \
        grouped_panels(a, p0, p1, planes_, bits_, asym_);
    CASE(1, 4, 0) CASE(1, 4, 1) CASE(2, 4, 0) CASE(2, 4, 1)
    CASE(1, 8, 0) CASE(1, 8, 1) CASE(2, 8, 0) CASE(2, 8, 1)
#undef CASE
}

TARGET static void grouped_float_linear_tiled(const gp_grouped_float_linear *a, int64_t p0,
                                              int64_t p1)
{
#define CASE(bits_, asym_)                                                                        \
    if (a->w.bits == bits_ && a->w.asym == asym_) grouped_float_panels(a, p0, p1, bits_, asym_);
    CASE(4, 0) CASE(4, 1) CASE(8, 0) CASE(8, 1)
#undef CASE
}
#endif
