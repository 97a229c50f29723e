/* SPDX-License-Identifier: MIT
 *
 * The contract of every kernel: shapes, layouts, ranges. The reference C in csrc is the
 * specification; csrc/x86/ holds faster versions that agree with it bit for bit (integer modes)
 * or within a derived bound (float modes). Kernels never allocate, never start threads, never
 * fail: the caller (csrc/ops) has checked everything and splits the work.
 *
 * Letters: M rows (tokens), N out features, K in features.
 */
#ifndef GPU_POOR_H
#define GPU_POOR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { GP_F32, GP_BF16, GP_F16, GP_I8 } gp_dtype; /* GP_I8: of weights and pages only */
static inline int64_t gp_size(gp_dtype type) { return type == GP_F32 ? 4 : type == GP_I8 ? 1 : 2; }

/* Activations are stored in rows padded with zeros to this many elements, so that no kernel needs
 * a masked load of them: 64 bytes is one AVX-512 vector, one AMX tile row. */
#define GP_K_ALIGN 64
/* Longest K whose int32 accumulator cannot overflow: 255 * 127 * K < 2^31 (the unsigned operand of
 * AVX512-VNNI reaches 255). Longer rows use the reference, which accumulates in int64. */
#define GP_K_MAX 66311
/* Rows whose largest magnitude is at most this are all zero: 32384 / 1e-30 still is finite. */
#define GP_TINY 1e-30f
/* Largest |q| of an activation: a8 (1 plane) and a16 (2 planes, q = 254 h + l, |h|, |l| <= 127).
 * Not 254 * 127 + 127 = 32385, whose high plane would round to 128. */
#define GP_Q_MAX(planes) ((planes) == 1 ? 127.0f : 32384.0f)

/* A weight row is first rounded to 16 bits, 256 to a step of the plain int8 grid: |fixed| <= 127 * 256.
 * Clip i makes the steps 128 / (128 + i) as large, and saturates what no longer fits: the range is
 * 100 % to 89.5 % of the largest magnitude. */
#define GP_FIXED_MAX 32512.0f
#define GP_CLIPS 16

/* One int8 linear: y[m][n] = (t * x_scale[m]) * w_scale[n] + bias[n], where t is the float of the
 * exact integer dot product (a8), or 254 * (float)high + (float)low (a16): each operation rounded
 * once, in that order, no fused multiply-add. */
typedef struct {
    int64_t M, N, K;
    int64_t K_pad;          /* K rounded up to GP_K_ALIGN */
    int planes;             /* 1: a8, 2: a16 */
    const int8_t *x;        /* [M][planes][K_pad], |x| <= 127, zero beyond K */
    const int8_t *x_packed; /* the same in the order of int8_pack, or NULL */
    const int32_t *x_sum;   /* [M][planes], sum over k */
    const float *x_scale;   /* [M] */
    const int8_t *w;        /* [N][K], any value, any alignment */
    const float *w_scale;   /* [N] */
    const float *bias;      /* [N] or NULL */
    void *y;                /* [M][N] */
    gp_dtype y_type;
} gp_int8_linear;

/* Weight-only linear: y[m][n] = (sum_k x[m][k] * w[n][k]) * w_scale[n] + bias[n] in float32. The
 * order of the sum depends on the ISA, never on M, on the thread count or on the row's place. */
typedef struct {
    int64_t M, N, K;
    int64_t K_pad;
    const float *x;       /* [M][K_pad], zero beyond K */
    const void *w;        /* [N][K], any alignment */
    gp_dtype w_type;      /* GP_I8, GP_BF16 or GP_F16 */
    const float *w_scale; /* [N], or NULL: 1 */
    const float *bias;
    void *y;
    gp_dtype y_type;
} gp_float_linear;

/* Grouped weights: 4 or 8 bits, quantized in groups of `group` columns (a multiple of GP_BLOCK; the last
 * group may be short):
 *     w[n][k] = scale[n][k / group] * (q - zero)                  symmetric, zero = 2^(bits - 1)
 *     w[n][k] = scale[n][k / group] * q + min[n][k / group]       asymmetric
 * q in [0, 2^bits), scale and min float16. Stored as they are run, in panels of 16 rows by blocks of 32
 * columns, each of `bits` lines of 64 bytes:
 *     w[panel][block][j = 0..7][row = 0..15][b = 0..3]    8 bits: k = 4 j + b
 *     w[panel][block][j = 0..3][row = 0..15][b = 0..3]    4 bits: low nibble k = 4 j + b, high 16 more
 *     scale[panel][group][row = 0..15]                    symmetric
 *     scale[panel][group][scale, min][row = 0..15]        asymmetric
 * so that 64 bytes (of 4 bits and'ed with 15, or shifted) are one operand of vpdpbusd whose lanes are
 * rows: no horizontal sum, and a group's scales are one multiply-add. Rows beyond N and columns beyond
 * K are padding: q is zero or 0, whichever stands for 0, and what their products give is not stored. */
#define GP_PANEL_ROWS 16
#define GP_BLOCK 32
#define GP_BLOCK_BYTES(bits) (64 * (bits)) /* of 16 rows x 32 columns */
#define GP_GROUP_MAX 128                   /* int32: 255 * 32384 * 128 < 2^31 */

typedef struct {
    int64_t K, group;
    int bits; /* 4 or 8 */
    int asym;
    const uint8_t *w;
    const uint16_t *scale;
} gp_grouped_weight;

/* One grouped linear, with u = sum over a group of x q and s = sum over it of x, exact integers of
 * x = 254 h + l (a16) or the one plane (a8):
 *     t = 0;  for each group: t = fma((float)d, scale, t)  with d = u - zero s, or, asymmetric, d = u and
 *                             then t = fma((float)s, min, t)
 *     y = t * x_scale[m] + bias[n]         each operation rounded once, in that order */
typedef struct {
    int64_t M, N;
    int64_t K_pad; /* any multiple of GP_K_ALIGN; an odd one spreads the rows over the sets of a cache */
    int planes;
    const int8_t *x;      /* [M][planes][K_pad] as for int8, 0 beyond K */
    const int32_t *x_sum; /* [M][groups]: s above */
    const float *x_scale; /* [M] */
    gp_grouped_weight w;
    const float *bias; /* [N] or NULL */
    void *y;           /* [M][N] */
    gp_dtype y_type;
} gp_grouped_linear;

/* The same with float activations, also the same bits everywhere:
 *     for each group: d = 0; for k in it, in order: d = fma(x[k], q - zero or q, d)
 *                     t = fma(d, scale, t);  asymmetric: s = x[k0] + x[k0 + 1] + ... in order from 0,
 *                                            t = fma(s, min, t)
 *     y = t + bias[n] */
typedef struct {
    int64_t M, N, K_pad;
    const float *x; /* [M][K_pad], zero beyond K */
    gp_grouped_weight w;
    const float *bias;
    void *y;
    gp_dtype y_type;
} gp_grouped_float_linear;

/* Quantize a panel: x[rows][K] with rows `stride` apart, 1 <= rows <= 16, into w and scale, padding
 * included. importance[K] weighs the squared errors; NULL: all the same. A group with a NaN or an
 * infinity gets the scale NaN. */
typedef enum { GP_ABSMAX, GP_MSE } gp_search;

typedef struct {
    const float *x;
    int64_t rows, stride, K, group;
    const float *importance;
    gp_search search;
    int bits, asym;
    uint8_t *w;
    uint16_t *scale;
} gp_grouped_quantize;

/* Round 16 rows under the Gram matrix of their inputs: csrc/gptq_template.h. Arrays [..][16] have a row
 * to each lane; rows beyond the matrix are zero. */
typedef struct {
    int64_t K, group;    /* any group; with half_scales <= GP_GROUP_MAX */
    int low, high, asym; /* levels are [low, high]; d = scale * q + min */
    int half_scales;     /* scales and minima are stored as float16, and searched for */
    int sweeps;          /* of coordinate descent after GPTQ */
    const float *gram;   /* H [K][K], positive definite */
    const float *factor; /* U [K][K], upper triangular: U^T U = H^-1 */
    float *w;            /* [K][16], destroyed */
    float *q;            /* [K][16], out: levels */
    float *grids;        /* [groups][2][16], out: scale, minimum; NaN where w is not finite */
    float *scratch;      /* [2 K][16] */
} gp_gptq;

/* What a decoder block's feed-forward network applies: GP_GELU is exact (erf). */
typedef enum { GP_SILU, GP_GELU, GP_GELU_TANH, GP_RELU } gp_activation;

/* Keys and values of one layer, in pages of page_size tokens; slot s of a sequence lies in page
 * table[s / page_size], of which a head's tokens lie together:
 *     pages[page][k, v][kv_head][slot % page_size][D]      float32, bfloat16, float16
 *     scales[page][k, v][kv_head][slot % page_size]        float16, of int8 pages; value = q * scale
 * Of int8 pages a head's part, as large, has the order in which the kernels multiply it, with the slots of a
 * page in tiles of GP_SLOTS, and of elements or slots in fours:
 *     keys[slot / 16][d / 4][slot % 16][d % 4]             q + 128, unsigned
 *     values[slot / 4][d][slot % 4]                        q + 128, unsigned
 * so that a register of keys has 16 tokens beside each other, whose scores it leaves without a sum across
 * lanes, and one of values 4 tokens of each element; +128 because vpdpbusd wants one factor unsigned. There
 * page_size is a multiple of GP_SLOTS, D of 4. */
#define GP_SLOTS 16
#define GP_HEAD_DIM_MAX 512
#define GP_CHUNK 256 /* slots that one call of attend_chunk takes */
#define GP_PARTIAL(D) ((D) + 2)

typedef struct {
    gp_dtype type;
    int64_t kv_heads, D, page_size;
    void *pages;
    int64_t page_stride; /* elements from a page to the next: other layers' may lie between */
    uint16_t *scales;    /* NULL of float pages */
    int64_t scale_stride;
} gp_pages;

/* Slots [begin, end). */
typedef struct {
    int64_t begin, end;
} gp_span;

/* Attention of some tokens' query heads, which share kv_head, over what each token sees of a chunk: slots
 * [from, from + GP_CHUNK). What it leaves of each row, one query head of one token, attend_merge joins with
 * the other chunks':
 *     partial[row][0 .. D - 1] = sum over t of w[t] v[t]
 *     partial[row][D]          = m = max of s[t]
 *     partial[row][D + 1]      = sum of p[t]
 * and 0, -infinity, 0 of a token that sees nothing. csrc/attention.c fixes the order of every sum of floats,
 * and int8 rows are summed as integers, so all instruction sets give the same bits, and a token gets the same
 * whichever others come with it. */
typedef struct {
    const gp_pages *pages;
    const int32_t *table;
    int64_t kv_head, tokens, heads;
    const float *q;   /* [tokens][heads][D] */
    int64_t q_stride; /* from token to token */
    float scale;      /* of the softmax, times log2 e */
    int64_t from;
    const gp_span *seen; /* [tokens], within the chunk: neither begins nor ends fall */
    int64_t limit;       /* slots of the sequence: what may be fetched ahead */
    float *partial;      /* [tokens][heads][GP_PARTIAL(D)] */
} gp_attend;

/* x[M][K] of a Gram matrix comes in panels of so many columns, so that what a tile reads lies together:
 * packed[panel][m][column] floats, or packed[panel][m / 2][column][m % 2] bfloat16; 0 beyond M and K. */
#define GP_GRAM_WIDTH 48

/* One line per kernel: X(name, return type, parameters). */
#define GP_KERNELS(X)                                                                             \
    /* Symmetric absmax quantization of one row x[K] into `planes` planes, plane p at             \
     * q + p * stride; sum[p] = sum of plane p. inverse = q_max / absmax; q = rint(x * inverse),  \
     * to even; a16: h = rint(q / 254), l = q - 254 h. Returns the scale absmax / q_max; 0 and    \
     * zeros when absmax <= GP_TINY; NaN and zeros when x holds a NaN or an infinity. */          \
    X(int8_quantize_row, float,                                                                   \
      (const void *x, gp_dtype type, int64_t K, int planes, int8_t *q, int64_t stride,            \
       int32_t *sum))                                                                             \
    /* One row of a weight, symmetric, with the scale of least squared error among GP_CLIPS; see   \
     * csrc/int8.c. fixed is scratch for K elements. Scale 0, or NaN, and zeros as above. */       \
    X(int8_quantize_weight_row, float,                                                            \
      (const void *x, gp_dtype type, int64_t K, int8_t *q, int16_t *fixed))                       \
    /* Columns [n0, n1) of the linear. */                                                         \
    X(int8_linear, void, (const gp_int8_linear *a, int64_t n0, int64_t n1))                       \
    /* Rows [16 b, 16 b + 16) of x, per plane, as AMX tiles: packed[b][plane][K_pad/64][16 quads  \
     * of k][16 rows][4 k]; rows at and beyond M are zero. */                                     \
    X(int8_pack, void, (const gp_int8_linear *a, int64_t b, int8_t *packed))                      \
    X(float_linear, void, (const gp_float_linear *a, int64_t n0, int64_t n1))                     \
    /* y[k] = fma(q[k], scale, offset), rounded to type. */                                       \
    X(int8_dequantize_row, void,                                                                  \
      (const int8_t *q, float scale, float offset, int64_t K, void *y, gp_dtype type))            \
    /* y[n] = t[n] + u * offset[n], two roundings and that to type: what offsets of the N weight   \
     * rows add to a token's t, if u is the sum of its x. y may be t. */                           \
    X(add_offsets, void,                                                                          \
      (const float *t, float u, const float *offset, int64_t N, void *y, gp_dtype type))          \
    /* y[k] = x[k] as float32. */                                                                 \
    X(to_float_row, void, (const void *x, gp_dtype type, int64_t K, float *y))                    \
    /* sum[g] = sum of 254 h + l (2 planes, K_pad apart), or of the plane, over each group of K. */   \
    X(grouped_sum_groups, void,                                                                      \
      (const int8_t *x, int64_t K, int64_t K_pad, int planes, int64_t group, int32_t *sum))       \
    /* Panels [p0, p1), 16 columns of y each, of the linear with a grouped weight. */             \
    X(grouped_linear, void, (const gp_grouped_linear *a, int64_t p0, int64_t p1))                       \
    X(grouped_float_linear, void, (const gp_grouped_float_linear *a, int64_t p0, int64_t p1))           \
    /* Row n as float: fma(q - zero or q, scale, 0 or min), rounded to type. */                      \
    X(grouped_dequantize_row, void,                                                                  \
      (const gp_grouped_weight *w, int64_t n, void *y, gp_dtype type))                               \
    X(grouped_quantize_panel, void, (const gp_grouped_quantize *a))                                     \
    X(gptq_panel, void, (const gp_gptq *a))                                                       \
    /* y[k] = x[k] r weight[k], r = 1 / sqrt(mean of x^2 + eps). y may be x, here and below; in all    \
     * four a row's bits are the same everywhere. K >= 1. */                                         \
    X(rms_norm_row, void, (const float *x, const float *weight, float eps, int64_t K, float *y))     \
    /* y[k] = (x[k] - mean) r weight[k] + bias[k], r = 1 / sqrt(variance + eps); bias or NULL. */     \
    X(layer_norm_row, void,                                                                          \
      (const float *x, const float *weight, const float *bias, float eps, int64_t K, float *y))      \
    /* Rotary embedding of x[n], n even, halves together: x[i] cosine[i] - x[n/2 + i] sine[i] and      \
     * x[n/2 + i] cosine[n/2 + i] + x[i] sine[n/2 + i]. */                                           \
    X(rotary_row, void, (float *x, const float *cosine, const float *sine, int64_t n))               \
    /* y[i] = f(x[i]) up[i], or f(x[i]) without up. |error of f| <= 3e-7 |x| (and 1e-37). */         \
    X(activate_row, void,                                                                            \
      (gp_activation kind, const float *x, const float *up, int64_t n, float *y))                    \
    /* Columns [k0, k1) of x[M][K]: largest magnitude, smallest, largest, sum of squares.         \
     * NaN propagates. M >= 1. */                                                                 \
    X(channel_stats, void,                                                                        \
      (const float *x, int64_t M, int64_t K, int64_t k0, int64_t k1, float *absmax, float *min,   \
       float *max, double *sum_square))                                                           \
    /* acc[K][K] += x^T x for the rows of panels [p0, p1) and the columns of all panels from there   \
     * on: the upper triangle, and all of the squares on the diagonal. */                         \
    X(gram, void,                                                                                 \
      (const float *packed, int64_t M, int64_t K, int64_t p0, int64_t p1, float *acc))            \
    /* The same of bfloat16 pairs; products are exact, sums of two may round subnormals to 0. */    \
    X(gram_pairs, void,                                                                           \
      (const uint16_t *packed, int64_t M, int64_t K, int64_t p0, int64_t p1, float *acc))                 \
    /* One head's key or value x[D] as pages hold it. Returns the scale of int8 as float16, of the  \
     * least squared error among 16: csrc/attention.c. 0 and zeros where absmax / 127 rounds to 0,  \
     * NaN or infinity and zeros where that is what it is. */                                       \
    X(page_store_row, uint16_t, (const float *x, int64_t D, gp_dtype type, void *y))              \
    X(attend_chunk, void, (const gp_attend *a))                                                   \
    /* partial[rows][GP_PARTIAL(D)] as if it had seen what `more` saw as well. */                \
    X(attend_merge, void, (float *partial, const float *more, int64_t rows, int64_t D))           \
    /* out[rows][D]; zeros where nothing was seen. */                                             \
    X(attend_finish, void, (const float *partial, int64_t rows, int64_t D, float *out))

typedef struct {
    const char *name; /* the ISA: ref, avx2, avx512_vnni, amx */
    unsigned needs;   /* GP_CPU_* bits */
    /* int8_linear is faster on packed activations from this many rows of all planes on; 0: never */
    int64_t pack_min_rows;
    int fast_pairs; /* gram_pairs is faster than gram on bfloat16 made float */
#define GP_FIELD(name, type, args) type(*name) args;
    GP_KERNELS(GP_FIELD)
#undef GP_FIELD
} gp_impl;

enum { GP_CPU_AVX2 = 1, GP_CPU_AVX512_VNNI = 2, GP_CPU_AVX512_BF16 = 4, GP_CPU_AMX = 8 };

/* What this CPU and its kernel offer; AMX also needs the permission of the operating system, asked
 * for here, once, and possibly refused. */
unsigned gp_cpu_features(void);

/* The table in use. Filled by gp_set_isa; `name` is that of the fastest implementation merged. */
extern gp_impl gp;
/* Number of instruction sets this CPU can run, and the name of the i-th, slowest first. */
int gp_available(void);
const char *gp_available_isa(int i);
/* Merge the implementations up to the one named; NULL: all. Returns 0, or -1 for an unknown name
 * or one this CPU can't run. Not for use while kernels run. */
int gp_set_isa(const char *name);
/* For each kernel, in the order of GP_KERNELS: its name and the implementation that serves it. */
int gp_kernel(int i, const char **kernel, const char **impl);

#ifdef __cplusplus
}
#endif
#endif
