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

/* What ldtilecfg reads: of each of the eight tiles, its rows and the bytes of one. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) tile_config;

/* Between stores to what p points to and the tile instructions that read it. gcc 12 does not know that
 * a tile load reads memory, and takes _tile_loadconfig for a read of 8 bytes: without this it may move
 * the stores, or drop them. */
#define TILE_FENCE(p) __asm__ volatile("" : : "r"(p) : "memory")
#endif
