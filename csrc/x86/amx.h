/* SPDX-License-Identifier: MIT
 * What the AMX kernels share: the target, the shape of a configuration, a fence. */
#ifndef GPU_POOR_AMX_H
#define GPU_POOR_AMX_H

#define TARGET                                                                                    \
    GP_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")
#include "avx512.h"

#ifdef GPU_POOR_EMULATE_TILES /* `make asan` only: the same kernels where the CPU lacks AMX */
#include "emulated_tiles.h"
#endif

/* What ldtilecfg reads: of each of the eight tiles, its rows and the bytes of one. gcc 12 takes
 * _tile_loadconfig for a read of 8 bytes, and may store the rest of a configuration built on the
 * stack after it: so they are constants. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) tile_config;

/* Between plain stores and the tile loads that read them: gcc 12 does not know that those read. */
#define TILE_FENCE() __asm__ volatile("" ::: "memory")
#endif
