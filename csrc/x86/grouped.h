/* SPDX-License-Identifier: MIT
 * The geometry of a grouped weight, for the kernels of every instruction set. */
#ifndef GPU_POOR_GROUPED_H
#define GPU_POOR_GROUPED_H

#include "../common.h"

/* Bytes ahead of a stream that is prefetched. */
#define GROUPED_AHEAD 2048

typedef struct {
    int64_t blocks, groups, per; /* blocks of 32 columns; groups; blocks to a group */
    int64_t panel_bytes;
} grouped_shape;

GP_INLINE grouped_shape grouped_shape_of(const gp_grouped_weight *w)
{
    int64_t blocks = gp_ceil_div(w->K, GP_BLOCK), per = w->group / GP_BLOCK;
    const int64_t bytes = blocks * GP_BLOCK_BYTES(w->bits);
    return (grouped_shape){blocks, gp_ceil_div(blocks, per), per, bytes};
}

/* The 16 scales of panel p, group g; the minima, of an asymmetric weight, follow them. */
GP_INLINE const uint16_t *grouped_scales(const gp_grouped_weight *w, grouped_shape s, int64_t p, int64_t g,
                                      int asym)
{
    return w->scale + (p * s.groups + g) * (1 + asym) * GP_PANEL_ROWS;
}
#endif
