/* SPDX-License-Identifier: MIT
 *
 * The tile instructions of AMX in plain C, in place of the compiler's intrinsics: csrc/x86/amx.h
 * includes this if GPU_POOR_EMULATE_TILES is defined, so that the AMX kernels are checked, bit for
 * bit and with every byte they touch, on CPUs that lack it. What the hardware would fault on aborts
 * with a message. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
 * LDTILECFG, TILELOADD, TILESTORED, TDPBSSD. Each file that includes this has tiles of its own.
 */
#ifndef GPU_POOR_EMULATED_TILES_H
#define GPU_POOR_EMULATED_TILES_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int rows, bytes; /* 0 and 0: not configured */
    uint8_t data[16][64];
} emulated_tile;

static _Thread_local emulated_tile emulated_tiles[8];

#define TILE_FAULT_IF(condition, ...)                                                             \
    do {                                                                                          \
        if (condition) {                                                                          \
            fprintf(stderr, "%s: ", __func__);                                                    \
            fprintf(stderr, __VA_ARGS__);                                                         \
            fprintf(stderr, " (%s)\n", #condition);                                               \
            abort();                                                                              \
        }                                                                                         \
    } while (0)

static inline emulated_tile *emulated_tile_at(int i)
{
    TILE_FAULT_IF(i < 0 || i > 7, "no tile %d", i);
    TILE_FAULT_IF(!emulated_tiles[i].rows, "tile %d is not configured", i);
    return &emulated_tiles[i];
}

static inline void emulated_loadconfig(const void *config)
{
    const uint8_t *c = (const uint8_t *)config;
    TILE_FAULT_IF(c[0] != 1, "palette %d", c[0]);
    TILE_FAULT_IF(c[1] != 0, "start row %d", c[1]);
    for (int i = 2; i < 16; i++) TILE_FAULT_IF(c[i], "reserved byte %d", i);
    memset(emulated_tiles, 0, sizeof(emulated_tiles));
    for (int i = 0; i < 16; i++) {
        uint16_t bytes;
        memcpy(&bytes, c + 16 + 2 * i, 2);
        const int rows = c[48 + i];
        TILE_FAULT_IF(i >= 8 && (rows || bytes), "no tile %d", i);
        TILE_FAULT_IF(rows > 16 || bytes > 64, "tile %d: %d rows of %d bytes", i, rows, bytes);
        TILE_FAULT_IF(!rows != !bytes, "tile %d: %d rows of %d bytes", i, rows, bytes);
        if (i < 8) emulated_tiles[i].rows = rows, emulated_tiles[i].bytes = bytes;
    }
}

static inline void emulated_release(void) { memset(emulated_tiles, 0, sizeof(emulated_tiles)); }

static inline void emulated_zero(int i)
{
    emulated_tile *t = emulated_tile_at(i);
    memset(t->data, 0, sizeof(t->data));
}

static inline void emulated_load(int i, const void *base, int64_t stride)
{
    emulated_tile *t = emulated_tile_at(i);
    memset(t->data, 0, sizeof(t->data));
    for (int r = 0; r < t->rows; r++)
        memcpy(t->data[r], (const uint8_t *)base + r * stride, (size_t)t->bytes);
}

static inline void emulated_store(int i, void *base, int64_t stride)
{
    const emulated_tile *t = emulated_tile_at(i);
    for (int r = 0; r < t->rows; r++)
        memcpy((uint8_t *)base + r * stride, t->data[r], (size_t)t->bytes);
}

/* c[m][n] += sum over k of a[m][k] b[k / 4][4 n + k % 4], modulo 2^32; b's bytes signed or not. */
static inline void emulated_dot(int c, int a, int b, int b_signed)
{
    emulated_tile *C = emulated_tile_at(c), *A = emulated_tile_at(a), *B = emulated_tile_at(b);
    TILE_FAULT_IF(c == a || c == b || a == b, "tiles %d, %d, %d", c, a, b);
    TILE_FAULT_IF(A->bytes % 4 || B->bytes % 4, "rows of %d and %d bytes", A->bytes, B->bytes);
    TILE_FAULT_IF(C->rows != A->rows, "%d rows from %d", C->rows, A->rows);
    TILE_FAULT_IF(C->bytes != B->bytes, "rows of %d bytes from %d", C->bytes, B->bytes);
    TILE_FAULT_IF(A->bytes != 4 * B->rows, "rows of %d bytes times %d rows", A->bytes, B->rows);
    for (int m = 0; m < A->rows; m++) {
        for (int n = 0; n < B->bytes / 4; n++) {
            uint32_t sum;
            memcpy(&sum, C->data[m] + 4 * n, 4);
            for (int k = 0; k < A->bytes; k++) {
                const uint8_t w = B->data[k / 4][4 * n + k % 4];
                sum += (uint32_t)((int8_t)A->data[m][k] * (b_signed ? (int8_t)w : w));
            }
            memcpy(C->data[m] + 4 * n, &sum, 4);
        }
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_loadd(i, base, stride) emulated_load(i, base, (int64_t)(stride))
#define _tile_stored(i, base, stride) emulated_store(i, base, (int64_t)(stride))
#define _tile_zero(i) emulated_zero(i)
#define _tile_dpbssd(c, a, b) emulated_dot(c, a, b, 1)
#define _tile_dpbsud(c, a, b) emulated_dot(c, a, b, 0)
#endif
