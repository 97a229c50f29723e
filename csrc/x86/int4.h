/* SPDX-License-Identifier: MIT
 * The geometry of an int4 weight, for the kernels of every instruction set. */
#ifndef GPU_POOR_INT4_H
#define GPU_POOR_INT4_H

#include "../common.h"

/* Bytes ahead of a stream that is prefetched. */
#define INT4_AHEAD 2048

typedef struct {
    int64_t blocks, groups, per; /* blocks of 32 columns; groups; blocks to a group */
    int64_t panel_bytes;
} int4_shape;

GP_INLINE int4_shape int4_shape_of(const gp_int4_weight *w)
{
    int64_t blocks = gp_ceil_div(w->K, GP_INT4_BLOCK), per = w->group / GP_INT4_BLOCK;
    return (int4_shape){blocks, gp_ceil_div(blocks, per), per, blocks * GP_INT4_PANEL_BLOCK};
}

/* The 16 scales of panel p, group g; the minima, of an asymmetric weight, follow them. */
GP_INLINE const uint16_t *int4_scales(const gp_int4_weight *w, int4_shape s, int64_t p, int64_t g,
                                      int asym)
{
    return w->scale + (p * s.groups + g) * (1 + asym) * GP_INT4_ROWS;
}
#endif
