/* SPDX-License-Identifier: MIT
 *
 * Grouped linear for AMX: tile products C[16 m][16 n] += X[16 m][64 k] . W[64 k][16 n].
 *
 * Two blocks of stored weights, lines of 16 rows by 4 columns, are an operand B as they lie. So,
 * unlike in int8_amx.c, the activations are operand A, read in place, and a lane of C is an output:
 * the scales of a group are one vector, and nothing is packed or transposed. Weights are unpacked into
 * L1 for many tokens, and their zero is subtracted there, so that no product needs a correction
 * (asymmetric ones stay unsigned).
 *
 * Only a store to memory gets a group's integers out of a tile. The vectors fold those of group g - 1
 * into float sums, 16 registers, while the tiles, two sets of them in turn, multiply group g.
 *
 * NOT YET TIMED: no machine with AMX has run this; `make asan` checks it with emulated tiles. What is
 * known, in cycles of a core for 16 tokens by 16 outputs by 64 columns (4 bits, K = 4096, many tokens):
 *
 *                                                       a8: G = 64, 128     a16: G = 64, 128
 *     tile products, 16 each                                    16   16             32   32
 *     all the rest on a Zen 5, loads and stores of
 *     tiles replaced by those of 16 vectors                     58   45             97   77
 *     the AVX512-VNNI kernel there                             160  150            300  290
 *     int8 on AMX, the operator of benchmarks/                  52                  91
 *
 * If nothing overlapped on a CPU like both, that would be 0.7 (G = 64) and 0.85 (128) of int8's speed.
 * Groups of 32 and 96 use tiles of 32 columns, twice as many products and folds: 0.35.
 */
#if defined(__x86_64__)
#include "amx.h"
#include "grouped_avx512.h"

/* Unpacked at a time: PANELS times CHUNK blocks of 32 columns, which are whole groups of 1, 2, 3 or 4
 * blocks. 24 KB: half of L1, where it stays for up to TOKEN_TILES times 16 tokens, X_BYTES of them
 * (half of a 2 MB L2). */
#define PANELS 4
#define CHUNK 12
#define TOKEN_TILES 16
#define X_BYTES (1 << 20)

/* The fewest rows of activations, all planes counted, that come here. With 16 (8 tokens of a16) those
 * figures are 127 for the rest, with 32 for the products, and 152 for AVX512-VNNI, whose time grows
 * with every row. */
#define MIN_ROWS 16

typedef struct {
    uint8_t w[PANELS][CHUNK * GP_BLOCK_BYTES(8)]; /* [block][line 0..7][row][4 k]: q - zero, or q */
    float x_sum[CHUNK][16];                       /* [group][token] */
    int32_t c[2][2][256];                         /* [parity of the group][plane][token][row] */
    float t[TOKEN_TILES][PANELS][256];            /* [token][row] */
} __attribute__((aligned(64))) workspace;

/* The columns of a chunk: from k on, groups from g on of `per` blocks, `blocks` in all, in tiles of
 * `width` columns. An odd last block of a tile of 64 is followed by anything: x is 0 there. */
typedef struct {
    int64_t k, g, blocks, per, width;
} chunk_of_columns;

/* The blocks at `from`; as many bytes after a chunk are brought into L2. */
INLINE void unpack(const uint8_t *from, int64_t blocks, int bits, int asym, uint8_t *w)
{
    const __m512i fifteen = _mm512_set1_epi8(15);
    const __m512i zero = _mm512_set1_epi8((char)(asym ? 0 : 1 << (bits - 1)));
    for (int64_t b = 0; b < blocks; b++, w += GP_BLOCK_BYTES(8)) {
        for (int j = 0; j < bits; j++, from += 64) {
            __m512i q = _mm512_loadu_si512(from);
            _mm_prefetch((const char *)from + CHUNK * GP_BLOCK_BYTES(bits), _MM_HINT_T1);
            if (bits == 4) {
                __m512i high = _mm512_and_si512(_mm512_srli_epi16(q, 4), fifteen);
                q = _mm512_and_si512(q, fifteen);
                _mm512_store_si512(w + 64 * (j + 4), _mm512_sub_epi8(high, zero));
            }
            _mm512_store_si512(w + 64 * j, _mm512_sub_epi8(q, zero));
        }
    }
}

/* C = X . W of one group, to c. A macro, for the numbers of tiles are part of an instruction. */
#define MULTIPLY(HIGH, LOW, W, c)                                                                 \
    do {                                                                                          \
        _tile_zero(HIGH);                                                                         \
        if (planes == 2) _tile_zero(LOW);                                                         \
        for (int64_t i = 0; i < tiles; i++, x += at.width, w += 16 * at.width) {                  \
            _tile_loadd(W, w, 64);                                                                \
            _tile_loadd(4, x, x_stride);                                                          \
            if (asym)                                                                             \
                _tile_dpbsud(HIGH, 4, W);                                                         \
            else                                                                                  \
                _tile_dpbssd(HIGH, 4, W);                                                         \
            if (planes == 1) continue;                                                            \
            _tile_loadd(5, x + x_stride / 2, x_stride);                                           \
            if (asym)                                                                             \
                _tile_dpbsud(LOW, 5, W);                                                          \
            else                                                                                  \
                _tile_dpbssd(LOW, 5, W);                                                          \
        }                                                                                         \
        _tile_stored(HIGH, c[0], 64);                                                             \
        if (planes == 2) _tile_stored(LOW, c[1], 64);                                             \
    } while (0)

/* t += a group's integers, scaled. Those of each plane, at most 128 * 255 * 127, are floats exactly:
 * the multiply-add rounds 254 h + l as the conversion of that integer does. */
INLINE void fold(__m512 t[16], int32_t c[2][256], const uint16_t *scales, const float *x_sum,
                 int planes, int asym)
{
    const __m512 scale = load_halves(scales);
    for (int r = 0; r < 16; r++) {
        __m512 d = _mm512_cvtepi32_ps(_mm512_load_si512(c[0] + 16 * r));
        if (planes == 2)
            d = _mm512_fmadd_ps(_mm512_set1_ps(254.0f), d,
                                _mm512_cvtepi32_ps(_mm512_load_si512(c[1] + 16 * r)));
        t[r] = _mm512_fmadd_ps(d, scale, t[r]);
        if (asym)
            t[r] = _mm512_fmadd_ps(_mm512_set1_ps(x_sum[r]), load_halves(scales + GP_PANEL_ROWS),
                                   t[r]);
    }
}

/* sums[token][row] of the tokens at x, whose rows of all planes are x_stride apart, by the panel at w,
 * over a chunk. */
INLINE void tile(workspace *s, const int8_t *x, int64_t x_stride, const uint8_t *w,
                 const uint16_t *scales, chunk_of_columns at, int planes, int asym, float *sums)
{
    const int64_t groups = gp_ceil_div(at.blocks, at.per);
    __m512 t[16];
    for (int r = 0; r < 16; r++)
        t[r] = at.k ? _mm512_load_ps(sums + 16 * r) : _mm512_setzero_ps();
    for (int64_t g = 0; g <= groups; g++) {
        if (g < groups) {
            const int64_t blocks = gp_min(at.per, at.blocks - g * at.per);
            const int64_t tiles = gp_ceil_div(blocks * GP_BLOCK, at.width);
            if (g % 2 == 0)
                MULTIPLY(0, 1, 6, s->c[0]);
            else
                MULTIPLY(2, 3, 7, s->c[1]);
        }
        if (g > 0) {
            fold(t, s->c[(g - 1) % 2], scales, s->x_sum[g - 1], planes, asym);
            scales += (1 + asym) * GP_PANEL_ROWS;
        }
    }
    for (int r = 0; r < 16; r++) _mm512_store_ps(sums + 16 * r, t[r]);
}

/* The first token of the tile that has m: the last tile overlaps the one before, which only repeats
 * some outputs. */
INLINE int64_t first_token(const gp_grouped_linear *a, int64_t m)
{
    return a->M < 16 ? 0 : gp_min(m, a->M - 16);
}

/* Panels [p, p + P) by tokens [m0, m1). */
INLINE void panels(const gp_grouped_linear *a, workspace *s, int64_t p, int64_t P, int64_t m0,
                   int64_t m1, int planes, int asym)
{
    const int bits = a->w.bits;
    const grouped_shape shape = grouped_shape_of(&a->w);
    const int64_t x_stride = planes * a->K_pad, rows = gp_min(a->M, 16);
    for (int64_t b = 0; b < shape.blocks; b += CHUNK) {
        const chunk_of_columns at = {b * GP_BLOCK, b / shape.per, gp_min(CHUNK, shape.blocks - b),
                                     shape.per, a->w.group % 64 ? 32 : 64};
        for (int64_t i = 0; i < P; i++)
            unpack(a->w.w + (p + i) * shape.panel_bytes + b * GP_BLOCK_BYTES(bits), at.blocks, bits,
                   asym, s->w[i]);
        TILE_FENCE(s->w);
        for (int64_t m = m0; m < m1; m += 16) {
            const int64_t first = first_token(a, m);
            for (int64_t g = 0; asym && g < gp_ceil_div(at.blocks, at.per); g++)
                for (int64_t r = 0; r < rows; r++)
                    s->x_sum[g][r] = (float)a->x_sum[(first + r) * shape.groups + at.g + g];
            for (int64_t i = 0; i < P; i++)
                tile(s, a->x + first * x_stride + at.k, x_stride, s->w[i],
                     grouped_scales(&a->w, shape, p + i, at.g, asym), at, planes, asym,
                     s->t[(m - m0) / 16][i]);
        }
    }
    for (int64_t m = m0; m < m1; m += 16) {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t token = first_token(a, m) + r;
            for (int64_t i = 0; i < P; i++) {
                const __m512 t = _mm512_load_ps(s->t[(m - m0) / 16][i] + 16 * r);
                store_panel(a->y, a->y_type, a->bias, a->N, p + i, token,
                            _mm512_mul_ps(t, _mm512_set1_ps(a->x_scale[token])));
            }
        }
    }
}

/* Tiles 0 to 3 are C: of the high (or only) plane and of the low one, for even and for odd groups. 4
 * and 5 are X, of either plane; 6 and 7 W, for even and for odd groups. */
INLINE tile_config tiles_of(int64_t tokens, int64_t width)
{
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? tokens : width / 4);
        config.bytes[i] = (uint16_t)(i == 4 || i == 5 ? width : 64);
    }
    return config;
}

INLINE void linear(const gp_grouped_linear *a, int64_t p0, int64_t p1, int planes, int asym)
{
    workspace s; /* 93 KB */
    const tile_config config = tiles_of(gp_min(a->M, 16), a->w.group % 64 ? 32 : 64);
    int64_t tokens = gp_min(X_BYTES / (16 * planes * a->K_pad), TOKEN_TILES) * 16;
    if (tokens == 0) tokens = 16;
    memset(s.c, 0, sizeof(s.c)); /* of fewer than 16 tokens, the rest is folded too */
    memset(s.x_sum, 0, sizeof(s.x_sum));
    TILE_FENCE(&config);
    _tile_loadconfig(&config);
    for (int64_t m = 0; m < a->M; m += tokens)
        for (int64_t p = p0; p < p1; p += PANELS)
            panels(a, &s, p, gp_min(PANELS, p1 - p), m, gp_min(m + tokens, a->M), planes, asym);
    _tile_release(); /* the threads are torch's: oneDNN uses the tiles too */
}

/* The linear of the level below serves few rows. */
extern const gp_impl gp_impl_grouped_avx512_vnni;

TARGET static void grouped_linear_amx(const gp_grouped_linear *a, int64_t p0, int64_t p1)
{
    if (a->M * a->planes < MIN_ROWS || a->w.K == 0) {
        gp_impl_grouped_avx512_vnni.grouped_linear(a, p0, p1);
        return;
    }
#define CASE(planes_, asym_)                                                                      \
    if (a->planes == planes_ && a->w.asym == asym_) linear(a, p0, p1, planes_, asym_);
    CASE(1, 0) CASE(1, 1) CASE(2, 0) CASE(2, 1)
#undef CASE
}

const gp_impl gp_impl_grouped_amx = {
    .name = "amx",
    .needs = GP_CPU_AMX,
    .grouped_linear = grouped_linear_amx,
};
#endif
