/* SPDX-License-Identifier: MIT
 *
 * int8 linear for AMX: tile products C[16 n][16 v] += W[16 n][64 k] . X[64 k][16 v], int8 x int8.
 *
 * The weight is operand A (16 rows of 64 bytes, stride K), so it needs no repacking; the small
 * activation matrix is packed as operand B by int8_pack. The usual orientation packs the weights
 * instead and leaves two copies of them, or one that nothing else can read.
 *
 * A 2 x 2 block of tiles: 32 weight rows times two groups of 16 activation rows. A group is 16
 * tokens (a8), or one plane of 16 tokens (a16: the two groups of a block are the two planes).
 *
 * What limits it (one core, register-only peak 7.4 TOPS): with all operands in L1 the loop reaches
 * 6.0, from L2 3.6, activations from L1 and weights from L2 4.6. Each line fetched from memory
 * meanwhile costs a further 1.6 ns, whether by a prefetch or a load: L1's fill buffers are what
 * runs out.
 */
#if defined(__x86_64__)
#include "amx.h"

/* Bytes of packed activations worked on at a time: half of a 2 MB L2, the other half is for the
 * PANELS of 32 weight rows in use and as many prefetched next. */
#define BLOCK_BYTES (1 << 20)

/* Bytes ahead in each row, and up to how many blocks of tokens a panel counts as streamed. */
#define STREAM_AHEAD 256
#define STREAM_BLOCKS 2
/* Beyond that: panels worked on together, and the columns of a chunk (of 2 groups 16 KB, which a
 * third of L1 holds although weight rows 4096 bytes apart all fall into the same few sets). */
#define PANELS 2
#define K_CHUNK 512

static const tile_config whole_tiles = {
    .palette = 1,
    .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

TARGET static void int8_pack_amx(const gp_int8_linear *a, int64_t b, int8_t *packed)
{
    for (int p = 0; p < a->planes; p++) {
        for (int64_t k = 0; k < a->K_pad; k += 64) {
            __m512i r[16], t[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t m = 16 * b + i;
                r[i] = m < a->M ? _mm512_loadu_si512(a->x + (m * a->planes + p) * a->K_pad + k)
                                : _mm512_setzero_si512();
            }
            /* 16 x 16 transpose of 4-byte quads: 4-byte, 8-byte, then two 16-byte steps. */
            for (int i = 0; i < 16; i += 2) {
                t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
            for (int i = 0; i < 16; i += 4) {
                r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
                r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
                r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
                r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
            }
            int8_t *out = packed + p * 16 * a->K_pad + k * 16;
            for (int i = 0; i < 4; i++) {
                __m512i s0 = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
                __m512i s1 = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
                __m512i s2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
                __m512i s3 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
                _mm512_storeu_si512(out + 64 * i, _mm512_shuffle_i32x4(s0, s2, 0x88));
                _mm512_storeu_si512(out + 64 * (i + 8), _mm512_shuffle_i32x4(s0, s2, 0xdd));
                _mm512_storeu_si512(out + 64 * (i + 4), _mm512_shuffle_i32x4(s1, s3, 0x88));
                _mm512_storeu_si512(out + 64 * (i + 12), _mm512_shuffle_i32x4(s1, s3, 0xdd));
            }
        }
    }
}

/* 16 rows (n) of 16 lanes (m) to y[m][n..n+16), converted. */
INLINE void store_transposed(__m512 r[16], const gp_int8_linear *a, int64_t m0, int64_t n)
{
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]),
                                                   _mm512_castps_pd(t[i + 2])));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]),
                                                       _mm512_castps_pd(t[i + 2])));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]),
                                                       _mm512_castps_pd(t[i + 3])));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]),
                                                       _mm512_castps_pd(t[i + 3])));
    }
    for (int i = 0; i < 4; i++) {
        __m512 s0 = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        __m512 s1 = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        __m512 s2 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        __m512 s3 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_f32x4(s0, s2, 0x88);
        t[i + 8] = _mm512_shuffle_f32x4(s0, s2, 0xdd);
        t[i + 4] = _mm512_shuffle_f32x4(s1, s3, 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(s1, s3, 0xdd);
    }
    int64_t rows = gp_min(a->M - m0, 16), i0 = m0 * a->N + n;
    /* Whole lines past the caches: reading a line from memory only to overwrite it took a quarter
     * of all the time at K = 1280. Outputs that small that they are read back at once don't come
     * here: that is the few rows of decoding, where STREAM_BLOCKS holds. */
    if (a->y_type == GP_F32 && a->M > 32 * STREAM_BLOCKS && (uintptr_t)a->y % 64 == 0 &&
        i0 % 16 == 0 && a->N % 16 == 0) {
        for (int64_t i = 0; i < rows; i++)
            _mm512_stream_ps((float *)a->y + i0 + i * a->N, t[i]);
        return;
    }
    for (int64_t i = 0; i < rows; i++) store16(a->y, a->y_type, i0 + i * a->N, 0xffff, t[i]);
}

/* Sixteen weight rows from n and 16 tokens from m0: integer tiles to y. */
INLINE void finish(const gp_int8_linear *a, const int32_t *high, const int32_t *low, int64_t m0,
                   int64_t n)
{
    __mmask16 mask = a->M - m0 >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (a->M - m0)) - 1);
    __m512 x_scale = _mm512_maskz_loadu_ps(mask, a->x_scale + m0), r[16];
    for (int i = 0; i < 16; i++) {
        __m512 t = _mm512_cvtepi32_ps(_mm512_load_si512(high + 16 * i));
        if (low)
            t = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(254.0f), t),
                              _mm512_cvtepi32_ps(_mm512_load_si512(low + 16 * i)));
        t = _mm512_mul_ps(_mm512_mul_ps(t, x_scale), _mm512_set1_ps(a->w_scale[n + i]));
        if (a->bias) t = _mm512_add_ps(t, _mm512_set1_ps(a->bias[n + i]));
        r[i] = t;
    }
    store_transposed(r, a, m0, n);
}

/* The last K % 64 columns of 16 weight rows, zero beyond: a tile load there would leave the
 * buffer. */
INLINE void load_tail(const gp_int8_linear *a, int64_t n, int8_t tail[16 * 64])
{
    int64_t k = a->K / 64 * 64;
    __mmask64 mask = ~0ull >> (64 - (a->K - k));
    for (int64_t r = 0; r < 16; r++)
        _mm512_store_si512(tail + 64 * r, _mm512_maskz_loadu_epi8(mask, a->w + (n + r) * a->K + k));
}

/* Weights to bring into L2, a few lines with each step of the tiles: [next, end) and as much from
 * next + half on, for two streams are faster than one (up to 15 %, four no more). */
typedef struct {
    const int8_t *next, *end;
    int64_t half, pairs; /* of lines, a step */
} gp_ahead;

/* Columns [k0, k1) of 16 * R weight rows from n times groups g and (if G == 2) g + 1, added to the
 * tiles c unless k0 is 0. tails: R zero-padded tiles, used beyond K / 64 * 64.
 *
 * Two ways to have the weights in cache in time. `stream`: these rows come from memory now, so each
 * step prefetches 256 bytes ahead in each of them, and at their end in those of the next panel.
 * Otherwise they are in L2, and those ahead are brought there meanwhile. M = 16, of a stream of
 * 14.0 GB/s on one core, K = 4096 and 1280: the first way 14.6 and 13, the second 11.2 and 11.2,
 * neither 14.4 and 12.2. */
INLINE void tiles(const gp_int8_linear *a, int64_t n, int R, int64_t g, int G, int64_t k0,
                  int64_t k1, int stream, const int8_t *tails, gp_ahead *ahead, int32_t c[4][256])
{
    const int8_t *w0 = a->w + n * a->K, *w1 = w0 + 16 * a->K;
    const int8_t *x0 = a->x_packed + g * 16 * a->K_pad, *x1 = x0 + 16 * a->K_pad;
    const int64_t K64 = a->K / 64 * 64;
    if (k0 == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c[0], 64);
        if (G == 2) _tile_loadd(1, c[1], 64);
        if (R == 2) _tile_loadd(2, c[2], 64);
        if (R == 2 && G == 2) _tile_loadd(3, c[3], 64);
    }
    for (int64_t k = k0; k < k1; k += 64) {
        int whole = k < K64;
        _tile_loadd(4, whole ? w0 + k : tails, whole ? (size_t)a->K : 64);
        _tile_loadd(6, x0 + k * 16, 64);
        _tile_dpbssd(0, 4, 6);
        if (R == 2) {
            _tile_loadd(5, whole ? w1 + k : tails + 16 * 64, whole ? (size_t)a->K : 64);
            _tile_dpbssd(2, 5, 6);
        }
        if (G == 2) {
            _tile_loadd(7, x1 + k * 16, 64);
            _tile_dpbssd(1, 4, 7);
            if (R == 2) _tile_dpbssd(3, 5, 7);
        }
        if (stream) {
            int64_t next = k + STREAM_AHEAD < K64 ? 0 : 16 * R * a->K - K64;
            for (int r = 0; r < 16 * R; r++)
                _mm_prefetch((const char *)w0 + r * a->K + k + STREAM_AHEAD + next, _MM_HINT_T0);
        } else if (ahead->next < ahead->end) {
            for (int64_t i = 0; i < ahead->pairs; i++, ahead->next += 64) {
                _mm_prefetch((const char *)ahead->next, _MM_HINT_T1);
                _mm_prefetch((const char *)ahead->next + ahead->half, _MM_HINT_T1);
            }
        }
    }
    _tile_stored(0, c[0], 64);
    if (G == 2) _tile_stored(1, c[1], 64);
    if (R == 2) _tile_stored(2, c[2], 64);
    if (R == 2 && G == 2) _tile_stored(3, c[3], 64);
}

/* 16 * R * P weight rows from n (P panels) times groups [g0, g1). With P > 1, chunk after chunk of
 * K, so that the two groups' chunk stays in L1 for all P panels: half of a step's operands then come
 * from L1 (4.6 TOPS a core where all from L2 give 3.6), and the lines they leave free fetch `next`,
 * the rows after these, which otherwise costs a wait of its own. */
INLINE void panels(const gp_int8_linear *a, int64_t n, int R, int P, int64_t g0, int64_t g1,
                   int64_t rows_left)
{
    int8_t tails[PANELS][2 * 16 * 64] __attribute__((aligned(64)));
    int32_t c[PANELS][4][256] __attribute__((aligned(64)));
    const int64_t rows = 16 * R, chunk = P > 1 ? K_CHUNK : a->K_pad;
    if (a->K % 64)
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++)
                load_tail(a, n + rows * p + 16 * r, tails[p] + r * 16 * 64);
    TILE_FENCE(tails);
    const int64_t blocks = gp_ceil_div(g1 - g0, 2);
    const int8_t *next = a->w + (n + rows * P) * a->K;
    gp_ahead ahead = {next, next, 0, 0};
    if (P > 1) {
        ahead.half = gp_min(rows_left, rows * P) * a->K / 2;
        ahead.end += ahead.half;
        ahead.pairs = gp_ceil_div(rows * a->K, 2 * blocks * a->K_pad);
    }
    for (int64_t g = g0; g < g1; g += 2) {
        const int G = g + 1 < g1 ? 2 : 1, stream = P == 1 && g == g0;
        for (int64_t k = 0; k < a->K_pad; k += chunk) {
            int64_t k1 = gp_min(k + chunk, a->K_pad);
            for (int p = 0; p < P; p++) {
                int64_t m = n + rows * p;
                if (G == 1)
                    tiles(a, m, R, g, 1, k, k1, stream, tails[p], &ahead, c[p]);
                else if (stream)
                    tiles(a, m, R, g, 2, k, k1, 1, tails[p], &ahead, c[p]);
                else
                    tiles(a, m, R, g, 2, k, k1, 0, tails[p], &ahead, c[p]);
            }
        }
        for (int p = 0; p < P; p++) {
            for (int r = 0; r < R; r++) {
                int64_t m = n + rows * p + 16 * r;
                if (a->planes == 2) {
                    finish(a, c[p][2 * r], c[p][2 * r + 1], g / 2 * 16, m);
                } else {
                    finish(a, c[p][2 * r], NULL, g * 16, m);
                    if (G == 2) finish(a, c[p][2 * r + 1], NULL, g * 16 + 16, m);
                }
            }
        }
    }
}

TARGET static void linear_packed(const gp_int8_linear *a, int64_t n0, int64_t n1)
{
    const int64_t groups = gp_ceil_div(a->M, 16) * a->planes;
    int64_t block_groups = BLOCK_BYTES / (16 * a->K_pad) / 2 * 2;
    if (block_groups < 2) block_groups = 2;
    _tile_loadconfig(&whole_tiles);
    for (int64_t g0 = 0; g0 < groups; g0 += block_groups) {
        int64_t g1 = gp_min(g0 + block_groups, groups), n = n0;
        if (g1 - g0 > 2 * STREAM_BLOCKS)
            for (; n + 32 * PANELS <= n1; n += 32 * PANELS)
                panels(a, n, 2, PANELS, g0, g1, n1 - n - 32 * PANELS);
        for (; n + 32 <= n1; n += 32) panels(a, n, 2, 1, g0, g1, 0);
        if (n + 16 <= n1) panels(a, n, 1, 1, g0, g1, 0);
    }
    _tile_release(); /* the threads are torch's: oneDNN uses the tiles too */
    _mm_sfence();    /* after the streaming stores */
}

/* The linear of the level below serves unpacked activations and the last N % 16 rows. */
extern const gp_impl gp_impl_int8_avx512_vnni;

TARGET static void int8_linear_amx(const gp_int8_linear *a, int64_t n0, int64_t n1)
{
    int64_t whole = n0;
    if (a->x_packed && a->K > 0 && a->K <= GP_K_MAX) {
        whole = n0 + (n1 - n0) / 16 * 16;
        if (whole > n0) linear_packed(a, n0, whole);
    }
    if (whole < n1) gp_impl_int8_avx512_vnni.int8_linear(a, whole, n1);
}

const gp_impl gp_impl_int8_amx = {
    .name = "amx",
    .needs = GP_CPU_AMX,
    .pack_min_rows = 5, /* 4 rows of all planes stream as well through the vectors */
    .int8_linear = int8_linear_amx,
    .int8_pack = int8_pack_amx,
};
#endif
