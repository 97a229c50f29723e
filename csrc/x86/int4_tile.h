/* SPDX-License-Identifier: MIT
 *
 * The loops around a tile of int4 products, shared by AVX2 and AVX-512. The includer defines TARGET
 * and, always inlined, with P, V, planes and asym constant,
 *     int4_tile(a, s, p, step, P, m, V, planes, asym, ahead)    panels p, p + step, ... (P of them) by
 *     int4_float_tile(a, s, p, step, P, m, V, asym, ahead)      tokens [m, m + V), up to y; `ahead`:
 *                                                               prefetching weights
 * and INT4_TILE_ROWS, the rows of activations (tokens times planes) of a tile of one panel, and
 * INT4_STREAMS, the streams that the weights are read as when there are few.
 */
#ifndef GPU_POOR_INT4_TILE_H
#define GPU_POOR_INT4_TILE_H

/* Up to this many rows of activations the weights are read as INT4_STREAMS streams, each a part of the
 * panels, as in linear_tile.h. */
#define INT4_STREAM_ROWS 2

/* Tokens of a block, which all panels work on before the next: 512 KB, a multiple of the tile. */
INLINE int64_t int4_block(int64_t token_bytes)
{
    return ((1 << 19) / (token_bytes * INT4_TILE_ROWS + 1) + 1) * INT4_TILE_ROWS;
}

INLINE void int4_panels(const gp_int4_linear *a, int64_t p0, int64_t p1, int planes, int asym)
{
    enum { V1 = INT4_TILE_ROWS, V2 = INT4_TILE_ROWS / 2 };
    const int4_shape s = int4_shape_of(&a->w);
    if (a->M * planes <= INT4_STREAM_ROWS) {
        const int64_t part = (p1 - p0) / INT4_STREAMS;
        for (int64_t p = p0; p < p0 + part; p++) {
            if (planes == 1 && a->M == 2)
                int4_tile(a, s, p, part, INT4_STREAMS, 0, 2, 1, asym, 1);
            else
                int4_tile(a, s, p, part, INT4_STREAMS, 0, 1, planes, asym, 1);
        }
        p0 += INT4_STREAMS * part;
    }
    const int64_t block = int4_block(a->K_pad * planes);
    for (int64_t m0 = 0; m0 < a->M; m0 += block) {
        const int64_t m1 = gp_min(m0 + block, a->M);
        for (int64_t p = p0; p < p1; p++) {
            int64_t m = m0;
            /* The first tile of a panel reads it from memory, the others from L1. */
            if (planes == 1) {
                if (m + V1 <= m1) int4_tile(a, s, p, 0, 1, m, V1, 1, asym, 1), m += V1;
                for (; m + V1 <= m1; m += V1) int4_tile(a, s, p, 0, 1, m, V1, 1, asym, 0);
            } else {
                if (m + V2 <= m1) int4_tile(a, s, p, 0, 1, m, V2, 2, asym, 1), m += V2;
                for (; m + V2 <= m1; m += V2) int4_tile(a, s, p, 0, 1, m, V2, 2, asym, 0);
            }
            for (; m + 2 <= m1; m += 2) int4_tile(a, s, p, 0, 1, m, 2, planes, asym, 1);
            if (m < m1) int4_tile(a, s, p, 0, 1, m, 1, planes, asym, 1);
        }
    }
}

INLINE void int4_float_panels(const gp_int4_float_linear *a, int64_t p0, int64_t p1, int asym)
{
    const int4_shape s = int4_shape_of(&a->w);
    if (a->M == 1) {
        const int64_t part = (p1 - p0) / INT4_STREAMS;
        for (int64_t p = p0; p < p0 + part; p++)
            int4_float_tile(a, s, p, part, INT4_STREAMS, 0, 1, asym, 1);
        p0 += INT4_STREAMS * part;
    }
    const int64_t block = int4_block(a->K_pad * 4);
    for (int64_t m0 = 0; m0 < a->M; m0 += block) {
        const int64_t m1 = gp_min(m0 + block, a->M);
        for (int64_t p = p0; p < p1; p++) {
            int64_t m = m0;
            for (; m + INT4_TILE_ROWS <= m1; m += INT4_TILE_ROWS)
                int4_float_tile(a, s, p, 0, 1, m, INT4_TILE_ROWS, asym, 1);
            for (; m + 2 <= m1; m += 2) int4_float_tile(a, s, p, 0, 1, m, 2, asym, 1);
            if (m < m1) int4_float_tile(a, s, p, 0, 1, m, 1, asym, 1);
        }
    }
}

TARGET static void int4_linear_tiled(const gp_int4_linear *a, int64_t p0, int64_t p1)
{
    if (a->planes == 1 && !a->w.asym) int4_panels(a, p0, p1, 1, 0);
    if (a->planes == 2 && !a->w.asym) int4_panels(a, p0, p1, 2, 0);
    if (a->planes == 1 && a->w.asym) int4_panels(a, p0, p1, 1, 1);
    if (a->planes == 2 && a->w.asym) int4_panels(a, p0, p1, 2, 1);
}

TARGET static void int4_float_linear_tiled(const gp_int4_float_linear *a, int64_t p0, int64_t p1)
{
    if (a->w.asym)
        int4_float_panels(a, p0, p1, 1);
    else
        int4_float_panels(a, p0, p1, 0);
}
#endif
