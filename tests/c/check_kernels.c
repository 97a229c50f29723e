/* SPDX-License-Identifier: MIT
 *
 * Every implementation this CPU can run against the reference, on buffers that end at (and begin
 * after) an inaccessible page, compiled with AddressSanitizer and UBSan by `make asan`: a kernel
 * that reads or writes one byte outside its arguments crashes here. Integers and the epilogue of the
 * integer modes must be equal, bit for bit; float sums within their bound.
 */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common.h"

static int failures, checks;

#define CHECK(condition, ...)                                                                     \
    do {                                                                                          \
        checks++;                                                                                 \
        if (!(condition)) {                                                                       \
            failures++;                                                                           \
            printf("FAILED %s: ", #condition);                                                    \
            printf(__VA_ARGS__);                                                                  \
            printf("\n");                                                                         \
        }                                                                                         \
    } while (0)

/* -- buffers between inaccessible pages ------------------------------------------------------- */

typedef struct {
    char *base;
    size_t mapped;
} mapping;
static mapping mappings[64];
static int n_mappings;

/* `bytes` bytes whose end (or, at_start, beginning) touches a page that cannot be read. */
static void *guarded(size_t bytes, int at_start)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page;
    if (inner == 0) inner = page;
    char *base = mmap(NULL, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base + page, inner, PROT_READ | PROT_WRITE)) abort();
    mappings[n_mappings++] = (mapping){base, inner + 2 * page};
    return at_start ? base + page : base + page + inner - bytes;
}

static void release_all(void)
{
    while (n_mappings) {
        n_mappings--;
        munmap(mappings[n_mappings].base, mappings[n_mappings].mapped);
    }
}

static uint64_t state = 88172645463325252ull;
static uint32_t random_u32(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}
static float random_float(void) { return (float)(int32_t)random_u32() * 0x1p-30f; }

static void fill_floats(void *x, gp_dtype type, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        float f = random_float();
        if (random_u32() % 50 == 0) f *= 100; /* heavy tails */
        uint32_t u;
        memcpy(&u, &f, 4);
        if (type == GP_F32)
            ((float *)x)[i] = f;
        else if (type == GP_I8)
            ((int8_t *)x)[i] = (int8_t)random_u32();
        else if (type == GP_BF16)
            ((uint16_t *)x)[i] = (uint16_t)(u >> 16);
        else
            ((uint16_t *)x)[i] = (uint16_t)(random_u32() & 0xbfff); /* any finite half below 2 */
    }
}

static size_t size_of(gp_dtype type) { return (size_t)gp_size(type); }
static int64_t round_up(int64_t n) { return (n + GP_K_ALIGN - 1) / GP_K_ALIGN * GP_K_ALIGN; }

/* -- the checks ------------------------------------------------------------------------------- */

static const gp_impl *ref;

static void check_quantize(const gp_impl *impl, gp_dtype type, int64_t K, int planes, int special)
{
    for (int at_start = 0; at_start < 2; at_start++) {
        void *x = guarded((size_t)K * size_of(type), at_start);
        int8_t *q = guarded((size_t)(K * planes), at_start), *want = malloc((size_t)(K * planes));
        int32_t sum[2] = {0}, want_sum[2] = {0};
        fill_floats(x, type, K);
        if (special == 1) memset(x, 0, (size_t)K * size_of(type));
        if (special == 2 && type == GP_F32) ((float *)x)[K / 2] = NAN;
        if (special == 3 && type == GP_F32) ((float *)x)[K - 1] = -INFINITY;
        float scale = impl->int8_quantize_row(x, type, K, planes, q, K, sum);
        float want_scale = ref->int8_quantize_row(x, type, K, planes, want, K, want_sum);
        CHECK(memcmp(&scale, &want_scale, 4) == 0 || (isnan(scale) && isnan(want_scale)),
              "%s scale %g, reference %g, K %ld", impl->name, scale, want_scale, (long)K);
        CHECK(memcmp(q, want, (size_t)(K * planes)) == 0, "%s int8_quantize_row K %ld planes %d",
              impl->name, (long)K, planes);
        CHECK(memcmp(sum, want_sum, sizeof(int32_t) * (size_t)planes) == 0, "%s sums", impl->name);
        int16_t *fixed = guarded((size_t)K * 2, at_start), *want_fixed = malloc((size_t)K * 2);
        scale = impl->int8_quantize_weight_row(x, type, K, q, fixed);
        want_scale = ref->int8_quantize_weight_row(x, type, K, want, want_fixed);
        CHECK((memcmp(&scale, &want_scale, 4) == 0 || (isnan(scale) && isnan(want_scale))) &&
                  memcmp(q, want, (size_t)K) == 0,
              "%s int8_quantize_weight_row K %ld", impl->name, (long)K);
        free(want_fixed);
        free(want);
        release_all();
    }
}

static void check_linear(const gp_impl *impl, int64_t M, int64_t N, int64_t K, int planes,
                         gp_dtype type, int packed, int with_bias)
{
    const int64_t K_pad = round_up(K), rows = M * planes, blocks = (M + 15) / 16;
    for (int at_start = 0; at_start < 2; at_start++) {
        int8_t *x = guarded((size_t)(rows * K_pad), at_start);
        int8_t *w = guarded((size_t)(N * K), at_start);
        int8_t *pack = guarded((size_t)(blocks * 16 * planes * K_pad), at_start);
        int8_t *want_pack = malloc((size_t)(blocks * 16 * planes * K_pad));
        float *x_scale = guarded((size_t)M * 4, at_start);
        float *w_scale = guarded((size_t)N * 4, at_start);
        float *bias = guarded((size_t)N * 4, at_start);
        int32_t *sum = guarded((size_t)rows * 4, at_start);
        void *y = guarded((size_t)(M * N) * size_of(type), at_start);
        void *want = malloc((size_t)(M * N) * size_of(type));
        memset(x, 0, (size_t)(rows * K_pad));
        for (int64_t r = 0; r < rows; r++) {
            sum[r] = 0;
            for (int64_t k = 0; k < K; k++) {
                x[r * K_pad + k] = (int8_t)((int)(random_u32() % 255) - 127);
                sum[r] += x[r * K_pad + k];
            }
        }
        for (int64_t i = 0; i < N * K; i++) w[i] = (int8_t)random_u32();
        fill_floats(x_scale, GP_F32, M);
        fill_floats(w_scale, GP_F32, N);
        fill_floats(bias, GP_F32, N);
        gp_int8_linear a = {M, N, K, K_pad, planes, x, NULL, sum, x_scale,
                            w, w_scale, with_bias ? bias : NULL, want, type};
        ref->int8_linear(&a, 0, N);
        a.y = y;
        memset(y, 0x5a, (size_t)(M * N) * size_of(type));
        if (packed) {
            for (int64_t b = 0; b < blocks; b++) {
                impl->int8_pack(&a, b, pack + b * 16 * planes * K_pad);
                ref->int8_pack(&a, b, want_pack + b * 16 * planes * K_pad);
            }
            CHECK(memcmp(pack, want_pack, (size_t)(blocks * 16 * planes * K_pad)) == 0,
                  "%s int8_pack M %ld K %ld", impl->name, (long)M, (long)K);
            a.x_packed = pack;
        }
        /* Two ranges, as two threads would have. */
        int64_t middle = N / 2 / 4 * 4;
        impl->int8_linear(&a, 0, middle);
        impl->int8_linear(&a, middle, N);
        CHECK(memcmp(y, want, (size_t)(M * N) * size_of(type)) == 0,
              "%s int8_linear M %ld N %ld K %ld planes %d type %d packed %d", impl->name, (long)M,
              (long)N, (long)K, planes, (int)type, packed);
        free(want);
        free(want_pack);
        release_all();
    }
}

static void check_float_linear(const gp_impl *impl, int64_t M, int64_t N, int64_t K,
                               gp_dtype w_type)
{
    const int64_t K_pad = round_up(K);
    float *x = guarded((size_t)(M * K_pad) * 4, 0), *w_scale = guarded((size_t)N * 4, 0);
    void *w = guarded((size_t)(N * K) * size_of(w_type), 0);
    float *y = guarded((size_t)(M * N) * 4, 0), *want = malloc((size_t)(M * N) * 4);
    memset(x, 0, (size_t)(M * K_pad) * 4);
    for (int64_t m = 0; m < M; m++) fill_floats(x + m * K_pad, GP_F32, K);
    fill_floats(w, w_type, N * K);
    fill_floats(w_scale, GP_F32, N);
    const int scaled = w_type == GP_I8;
    gp_float_linear a = {M, N, K, K_pad, x, w, w_type, scaled ? w_scale : NULL, NULL, want, GP_F32};
    ref->float_linear(&a, 0, N);
    a.y = y;
    impl->float_linear(&a, 0, N / 2);
    impl->float_linear(&a, N / 2, N);
    for (int64_t m = 0; m < M; m++) {
        for (int64_t n = 0; n < N; n++) {
            double size = 0;
            for (int64_t k = 0; k < K; k++)
                size += fabs((double)x[m * K_pad + k] * gp_load(w, w_type, n * K + k));
            if (scaled) size *= fabs(w_scale[n]);
            double bound = (double)(K + 2) * 0x1p-24 * size + 1e-30;
            CHECK(fabs((double)y[m * N + n] - want[m * N + n]) <= bound,
                  "%s float_linear M %ld N %ld K %ld type %d", impl->name, (long)M, (long)N, (long)K,
                  (int)w_type);
        }
    }
    free(want);
    release_all();
}

/* Finite halves of either sign. */
static void fill_halves(uint16_t *h, int64_t n)
{
    for (int64_t i = 0; i < n; i++) h[i] = (uint16_t)(random_u32() & 0xbfff);
}

/* Every kernel of grouped weights [N, K]; all of them give the reference's bits. */
static void check_grouped(const gp_impl *impl, int64_t M, int64_t N, int64_t K, int bits,
                          int64_t group, int planes, int asym, int with_bias)
{
    /* Any multiple of the alignment will do. */
    const int64_t K_pad = round_up(K) + N % 2 * GP_K_ALIGN, P = (N + 15) / 16, B = (K + 31) / 32;
    const int64_t groups = (K + group - 1) / group, rows = M * planes;
    for (int at_start = 0; at_start < 2; at_start++) {
        uint8_t *w = guarded((size_t)(P * B * GP_BLOCK_BYTES(bits)), at_start);
        uint16_t *scale = guarded((size_t)(P * groups * (1 + asym) * 16) * 2, at_start);
        int8_t *x = guarded((size_t)(rows * K_pad), at_start);
        int32_t *sum = guarded((size_t)(M * groups) * 4, at_start);
        int32_t *want_sum = malloc((size_t)(M * groups) * 4);
        float *x_scale = guarded((size_t)M * 4, at_start), *bias = guarded((size_t)N * 4, at_start);
        float *y = guarded((size_t)(M * N) * 4, at_start), *want = malloc((size_t)(M * N) * 4);
        float *xf = guarded((size_t)(M * K_pad) * 4, at_start);
        for (int64_t i = 0; i < P * B * GP_BLOCK_BYTES(bits); i++) w[i] = (uint8_t)random_u32();
        fill_halves(scale, P * groups * (1 + asym) * 16);
        memset(x, 0, (size_t)(rows * K_pad));
        memset(xf, 0, (size_t)(M * K_pad) * 4);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = 0; k < K; k++) x[r * K_pad + k] = (int8_t)((int)(random_u32() % 255) - 127);
        for (int64_t m = 0; m < M; m++) {
            fill_floats(xf + m * K_pad, GP_F32, K);
            const int8_t *row = x + m * planes * K_pad;
            impl->grouped_sum_groups(row, K, K_pad, planes, group, sum + m * groups);
            ref->grouped_sum_groups(row, K, K_pad, planes, group, want_sum + m * groups);
        }
        CHECK(memcmp(sum, want_sum, (size_t)(M * groups) * 4) == 0, "%s grouped_sum_groups K %ld",
              impl->name, (long)K);
        fill_floats(x_scale, GP_F32, M);
        fill_floats(bias, GP_F32, N);
        gp_grouped_weight weight = {K, group, bits, asym, w, scale};
        gp_grouped_linear a = {M, N, K_pad, planes, x, sum, x_scale, weight,
                            with_bias ? bias : NULL, want, GP_F32};
        ref->grouped_linear(&a, 0, P);
        a.y = y;
        impl->grouped_linear(&a, 0, P / 2);
        impl->grouped_linear(&a, P / 2, P);
        CHECK(memcmp(y, want, (size_t)(M * N) * 4) == 0,
              "%s grouped_linear M %ld N %ld K %ld bits %d group %ld planes %d asym %d", impl->name,
              (long)M, (long)N, (long)K, bits, (long)group, planes, asym);
        gp_grouped_float_linear f = {M, N, K_pad, xf, weight, with_bias ? bias : NULL, want, GP_F32};
        ref->grouped_float_linear(&f, 0, P);
        f.y = y;
        impl->grouped_float_linear(&f, 0, P / 2);
        impl->grouped_float_linear(&f, P / 2, P);
        CHECK(memcmp(y, want, (size_t)(M * N) * 4) == 0,
              "%s grouped_float_linear M %ld N %ld K %ld bits %d group %ld asym %d", impl->name,
              (long)M, (long)N, (long)K, bits, (long)group, asym);
        float *row = guarded((size_t)K * 4, at_start), *want_row = malloc((size_t)K * 4);
        for (int64_t n = 0; n < N; n++) {
            impl->grouped_dequantize_row(&weight, n, row, GP_F32);
            ref->grouped_dequantize_row(&weight, n, want_row, GP_F32);
            CHECK(memcmp(row, want_row, (size_t)K * 4) == 0, "%s grouped_dequantize_row", impl->name);
        }
        free(want_row);
        free(want_sum);
        free(want);
        release_all();
    }
}

static void check_grouped_quantize(const gp_impl *impl, int64_t rows, int64_t K, int bits,
                                   int64_t group, int asym)
{
    const size_t bytes = (size_t)((K + 31) / 32 * GP_BLOCK_BYTES(bits));
    const size_t halves = (size_t)((K + group - 1) / group * (1 + asym) * 16);
    for (int search = GP_ABSMAX; search <= GP_MSE; search++) {
        float *x = guarded((size_t)(rows * K) * 4, search), *h = guarded((size_t)K * 4, search);
        uint8_t *w = guarded(bytes, search), *want = malloc(bytes);
        uint16_t *scale = guarded(2 * halves, search), *want_scale = malloc(2 * halves);
        fill_floats(x, GP_F32, rows * K);
        for (int64_t k = 0; k < K; k++) h[k] = fabsf(random_float());
        if (K > 40) x[K / 2] = NAN, x[K - 1] = INFINITY;
        gp_grouped_quantize a = {x, rows, K, K, group, K % 2 ? h : NULL, (gp_search)search, bits,
                                 asym, want, want_scale};
        ref->grouped_quantize_panel(&a);
        a.w = w, a.scale = scale;
        impl->grouped_quantize_panel(&a);
        CHECK(memcmp(w, want, bytes) == 0 && memcmp(scale, want_scale, 2 * halves) == 0,
              "%s grouped_quantize_panel rows %ld K %ld bits %d group %ld asym %d search %d",
              impl->name, (long)rows, (long)K, bits, (long)group, asym, search);
        free(want);
        free(want_scale);
        release_all();
    }
}

static void check_gptq(const gp_impl *impl, int64_t K, int bits, int64_t group, int asym)
{
    const size_t lanes = 16 * sizeof(float), groups = (size_t)((K + group - 1) / group);
    const int low = asym ? 0 : -(1 << (bits - 1));
    for (int at_start = 0; at_start < 2; at_start++) {
        float *gram = guarded((size_t)(K * K) * 4, at_start);
        float *factor = guarded((size_t)(K * K) * 4, at_start);
        float *w = guarded((size_t)K * lanes, at_start), *q = guarded((size_t)K * lanes, at_start);
        float *grids = guarded(2 * groups * lanes, at_start);
        float *scratch = guarded(2 * (size_t)K * lanes, at_start);
        float *start = malloc((size_t)K * lanes), *want = malloc((size_t)K * lanes);
        float *want_grids = malloc(2 * groups * lanes);
        fill_floats(start, GP_F32, K * 16);
        for (int64_t i = 0; i < K; i++) {
            for (int64_t j = 0; j < K; j++) {
                const float v = 0.1f * random_float() / (float)K;
                gram[i * K + j] = gram[j * K + i] = i == j ? 1 + fabsf(v) : v;
                factor[i * K + j] = i == j ? 1 + fabsf(v) : i < j ? v : 0;
            }
        }
        gp_gptq a = {K, group, low, low + (1 << bits) - 1, asym, group <= GP_GROUP_MAX, 2,
                     gram, factor, w, want, want_grids, scratch};
        memcpy(w, start, (size_t)K * lanes);
        ref->gptq_panel(&a);
        memcpy(w, start, (size_t)K * lanes);
        a.q = q, a.grids = grids;
        impl->gptq_panel(&a);
        CHECK(memcmp(q, want, (size_t)K * lanes) == 0 &&
                  memcmp(grids, want_grids, 2 * groups * lanes) == 0,
              "%s gptq_panel K %ld bits %d group %ld asym %d", impl->name, (long)K, bits,
              (long)group, asym);
        free(start);
        free(want);
        free(want_grids);
        release_all();
    }
}

static void check_rows(const gp_impl *impl, int64_t K, gp_dtype type)
{
    for (int at_start = 0; at_start < 2; at_start++) {
        int8_t *q = guarded((size_t)K, at_start);
        for (int64_t k = 0; k < K; k++) q[k] = (int8_t)random_u32();
        void *y = guarded((size_t)K * size_of(type), at_start);
        void *want = malloc((size_t)K * 4);
        for (int offset = 0; offset < 2; offset++) {
            impl->int8_dequantize_row(q, 0.37f, 0.3f * (float)offset, K, y, type);
            ref->int8_dequantize_row(q, 0.37f, 0.3f * (float)offset, K, want, type);
            CHECK(memcmp(y, want, (size_t)K * size_of(type)) == 0, "%s int8_dequantize_row K %ld",
                  impl->name, (long)K);
        }
        float *f = guarded((size_t)K * 4, at_start), *t = guarded((size_t)K * 4, at_start);
        fill_floats(f, GP_F32, K);
        fill_floats(t, GP_F32, K);
        impl->add_offsets(t, 0.7f, f, K, y, type);
        ref->add_offsets(t, 0.7f, f, K, want, type);
        CHECK(memcmp(y, want, (size_t)K * size_of(type)) == 0, "%s add_offsets", impl->name);
        impl->to_float_row(y, type, K, f);
        ref->to_float_row(y, type, K, want);
        CHECK(memcmp(f, want, (size_t)K * 4) == 0, "%s to_float_row K %ld", impl->name, (long)K);
        free(want);
        release_all();
    }
}

static void check_stats(const gp_impl *impl, int64_t M, int64_t K)
{
    float *x = guarded((size_t)(M * K) * 4, 0);
    fill_floats(x, GP_F32, M * K);
    float *got[3], *want = malloc((size_t)K * 12);
    for (int i = 0; i < 3; i++) got[i] = guarded((size_t)K * 4, 0);
    double *squares = guarded((size_t)K * 8, 0), *want_squares = malloc((size_t)K * 8);
    impl->channel_stats(x, M, K, 0, K / 2, got[0], got[1], got[2], squares);
    impl->channel_stats(x, M, K, K / 2, K, got[0], got[1], got[2], squares);
    ref->channel_stats(x, M, K, 0, K, want, want + K, want + 2 * K, want_squares);
    for (int i = 0; i < 3; i++)
        CHECK(memcmp(got[i], want + i * K, (size_t)K * 4) == 0, "%s channel_stats", impl->name);
    for (int64_t k = 0; k < K; k++)
        CHECK(fabs(squares[k] - want_squares[k]) <= 1e-12 * want_squares[k] * (double)M,
              "%s sum of squares", impl->name);

    float *acc = guarded((size_t)(K * K) * 4, 0), *want_acc = malloc((size_t)(K * K) * 4);
    const int64_t W = GP_GRAM_WIDTH, panels = gp_ceil_div(K, W), pairs = (M + 1) / 2;
    float *packed = guarded((size_t)(panels * M * W) * 4, 0);
    uint16_t *paired = guarded((size_t)(panels * pairs * W) * 4, 0);
    memset(packed, 0, (size_t)(panels * M * W) * 4);
    memset(paired, 0, (size_t)(panels * pairs * W) * 4);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) {
            packed[(k / W * M + m) * W + k % W] = x[m * K + k];
            paired[((k / W * pairs + m / 2) * W + k % W) * 2 + m % 2] = gp_float_to_bf16(x[m * K + k]);
        }
    for (int two = 0; two < 2; two++) {
        memset(acc, 0, (size_t)(K * K) * 4);
        memset(want_acc, 0, (size_t)(K * K) * 4);
        for (int64_t p = 0; p < panels; p++)
            if (two)
                impl->gram_pairs(paired, M, K, p, p + 1, acc);
            else
                impl->gram(packed, M, K, p, p + 1, acc);
        if (two)
            ref->gram_pairs(paired, M, K, 0, panels, want_acc);
        else
            ref->gram(packed, M, K, 0, panels, want_acc);
        for (int64_t i = 0; i < K * K; i++) {
            double bound = (double)(M + 2) * 0x1p-24 * (1 + two * 0x1p-7) *
                           sqrt(want_squares[i / K] * want_squares[i % K]) + 1e-30;
            CHECK(fabs((double)acc[i] - want_acc[i]) <= bound, "%s gram%s M %ld K %ld", impl->name,
                  two ? "_pairs" : "", (long)M, (long)K);
        }
    }
    free(want);
    free(want_squares);
    free(want_acc);
    release_all();
}

/* -- what a decoder block does between its linears --------------------------------------------- */

static double activation(gp_activation kind, double x)
{
    if (kind == GP_RELU) return x < 0 ? 0 : x;
    if (kind == GP_SILU) return x / (1 + exp(-x));
    if (kind == GP_GELU) return 0.5 * x * erfc(-x / sqrt(2));
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

/* Against double precision within the header's bound, and the reference bit for bit. */
static void check_activations(const gp_impl *impl, int64_t n, float reach)
{
    float *x = guarded((size_t)n * 4, 0), *up = guarded((size_t)n * 4, 0), *y = guarded((size_t)n * 4, 0);
    float *want = malloc((size_t)n * 4);
    fill_floats(x, GP_F32, n);
    fill_floats(up, GP_F32, n);
    for (int64_t i = 0; i < n; i++) x[i] *= reach; /* of 2 at most */
    for (int kind = GP_SILU; kind <= GP_RELU; kind++) {
        impl->activate_row((gp_activation)kind, x, NULL, n, y);
        for (int64_t i = 0; i < n; i++) {
            double exact = activation((gp_activation)kind, x[i]);
            CHECK(fabs(y[i] - exact) <= 3e-7 * fabs((double)x[i]) + 1e-37, "%s activation %d of %g: %g, not %g",
                  impl->name, kind, x[i], y[i], exact);
        }
        impl->activate_row((gp_activation)kind, x, up, n, y);
        ref->activate_row((gp_activation)kind, x, up, n, want);
        CHECK(memcmp(y, want, (size_t)n * 4) == 0, "%s activate_row %d", impl->name, kind);
    }
    free(want);
    release_all();
}

static void check_decoder_rows(const gp_impl *impl, int64_t K)
{
    float *x = guarded((size_t)K * 4, 0), *w = guarded((size_t)K * 4, 0), *b = guarded((size_t)K * 4, 0);
    float *y = guarded((size_t)K * 4, 0), *want = malloc((size_t)K * 4);
    fill_floats(x, GP_F32, K);
    fill_floats(w, GP_F32, K);
    fill_floats(b, GP_F32, K);
    double mean = 0, square = 0, variance = 0;
    for (int64_t k = 0; k < K; k++) mean += x[k] / (double)K, square += (double)x[k] * x[k] / (double)K;
    for (int64_t k = 0; k < K; k++) variance += (x[k] - mean) * (x[k] - mean) / (double)K;
    /* Sums of K terms in 16 lanes, and a few roundings. */
    const double eps = 1e-3, error = (8 + (double)K / 16) * 0x1p-23;

    impl->rms_norm_row(x, w, (float)eps, K, y);
    ref->rms_norm_row(x, w, (float)eps, K, want);
    CHECK(memcmp(y, want, (size_t)K * 4) == 0, "%s rms_norm_row K %ld", impl->name, (long)K);
    for (int64_t k = 0; k < K; k++) {
        double exact = x[k] / sqrt(square + eps) * w[k];
        CHECK(fabs(y[k] - exact) <= error * fabs(exact), "%s rms_norm_row K %ld: %g, not %g", impl->name,
              (long)K, y[k], exact);
    }
    for (int bias = 0; bias < 2; bias++) {
        impl->layer_norm_row(x, w, bias ? b : NULL, (float)eps, K, y);
        ref->layer_norm_row(x, w, bias ? b : NULL, (float)eps, K, want);
        CHECK(memcmp(y, want, (size_t)K * 4) == 0, "%s layer_norm_row K %ld", impl->name, (long)K);
        for (int64_t k = 0; k < K; k++) {
            double exact = (x[k] - mean) / sqrt(variance + eps) * w[k] + (bias ? b[k] : 0);
            double size = (fabs(x[k]) + sqrt(square)) / sqrt(variance + eps) * fabs(w[k]) + fabs(b[k]);
            CHECK(fabs(y[k] - exact) <= error * size, "%s layer_norm_row K %ld: %g, not %g", impl->name,
                  (long)K, y[k], exact);
        }
    }
    if (K % 2 == 0) {
        memcpy(y, x, (size_t)K * 4);
        memcpy(want, x, (size_t)K * 4);
        impl->rotary_row(y, w, b, K);
        ref->rotary_row(want, w, b, K);
        CHECK(memcmp(y, want, (size_t)K * 4) == 0, "%s rotary_row K %ld", impl->name, (long)K);
        for (int64_t k = 0; k < K; k++) {
            double other = k < K / 2 ? -(double)x[k + K / 2] : x[k - K / 2];
            double exact = (double)x[k] * w[k] + other * b[k];
            double size = fabs((double)x[k] * w[k]) + fabs(other * b[k]);
            CHECK(fabs(y[k] - exact) <= 0x1p-22 * size, "%s rotary_row K %ld: %g, not %g", impl->name,
                  (long)K, y[k], exact);
        }
    }
    free(want);
    release_all();
}

/* Bit for bit, but that a NaN may be any. */
static int same_floats(const float *x, const float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (memcmp(x + i, y + i, 4) && !(isnan(x[i]) && isnan(y[i]))) return 0;
    return 1;
}

/* Attention over pages, and what fills them; all instruction sets give the reference's bits. The pages lie in
 * any order; only those of the sequence are there to be read. */
static void check_attention(const gp_impl *impl, gp_dtype type, int64_t rows, int64_t D,
                            int64_t page_size, int64_t begin, int64_t end, int special)
{
    enum { HEADS = 2, HEAD = 1 };
    const int64_t n_pages = (end + page_size - 1) / page_size, size = GP_PARTIAL(D);
    const int64_t page = 2 * HEADS * page_size;
    for (int at_start = 0; at_start < 2; at_start++) {
        void *data = guarded((size_t)(n_pages * page * D) * size_of(type), at_start);
        uint16_t *scales = guarded((size_t)(n_pages * page) * 2, at_start);
        int32_t *table = guarded((size_t)n_pages * 4, at_start);
        float *q = guarded((size_t)(rows * D) * 4, at_start);
        float *y = guarded((size_t)(rows * size) * 4, at_start);
        float *want = malloc((size_t)(rows * size) * 4);
        fill_floats(data, type, n_pages * page * D);
        fill_halves(scales, n_pages * page);
        for (int64_t i = 0; i < n_pages * page; i++) scales[i] &= 0x3fff; /* none is negative */
        for (int64_t slot = 0; slot < n_pages * page_size; slot++) /* stale, where nothing is to be seen */
            for (int row = 0; row < 2 * HEADS && (slot < begin || slot >= end); row++)
                scales[(n_pages - 1 - slot / page_size) * page + row * page_size + slot % page_size] = 0x7e00;
        fill_floats(q, GP_F32, rows * D);
        if (special == 1) q[0] = NAN, q[rows * D - 1] = INFINITY;
        if (special == 2) memset(q, 0, (size_t)D * 4), q[rows * D - 1] = 1e-35f;
        uint16_t *first = scales + (n_pages - 1 - begin / page_size) * page + HEAD * page_size + begin % page_size;
        if (special == 3) first[0] = 0, first[HEADS * page_size] = 0;
        if (special == 4) first[(int)rows % 2 * HEADS * page_size] = 0x7e00; /* a NaN: of a key, or a value */
        if (special == 5) { /* the largest sums: bytes of -128 */
            memset(data, 0, (size_t)(n_pages * page * D) * size_of(type));
            for (int64_t i = 0; i < rows * D; i++) q[i] = 1;
        }
        for (int64_t i = 0; i < n_pages; i++) table[i] = (int32_t)(n_pages - 1 - i);
        gp_pages pages = {type, HEADS, D, page_size, data, page * D, type == GP_I8 ? scales : NULL, page};
        /* One token's heads, and as many tokens: each sees one slot more, and two a slot less of the first ones
         * as well; the first sees nothing if there are few. */
        const int64_t from = gp_max(0, gp_max(end - GP_CHUNK, begin - 5));
        gp_span *seen = guarded((size_t)rows * sizeof(gp_span), at_start);
        for (int apart = 0; apart < 2; apart++) {
            for (int64_t t = 0; t < rows; t++) {
                seen[t].end = apart ? gp_max(begin, end - (rows - 1 - t)) : end;
                seen[t].begin = gp_min(begin + (apart && at_start ? t / 2 : 0), seen[t].end);
            }
            gp_attend a = {&pages, table, HEAD, apart ? rows : 1, apart ? 1 : rows, q, D, 0.1f, from, seen, end, want};
            ref->attend_chunk(&a);
            a.partial = y;
            impl->attend_chunk(&a);
            CHECK(same_floats(y, want, rows * size),
                  "%s attend_chunk type %d rows %ld D %ld pages of %ld, slots %ld to %ld, special %d, apart %d",
                  impl->name, (int)type, (long)rows, (long)D, (long)page_size, (long)begin, (long)end, special, apart);
        }
        float *out = guarded((size_t)(rows * D) * 4, at_start), *want_out = malloc((size_t)(rows * D) * 4);
        for (int64_t n = 0; n < rows; n++) {
            impl->attend_merge(y, y + n * size, rows - n, D);
            ref->attend_merge(want, want + n * size, rows - n, D);
            CHECK(same_floats(y, want, rows * size), "%s attend_merge D %ld", impl->name, (long)D);
        }
        impl->attend_finish(y, rows, D, out);
        ref->attend_finish(want, rows, D, want_out);
        CHECK(same_floats(out, want_out, rows * D), "%s attend_finish D %ld", impl->name, (long)D);
        char *row = guarded((size_t)D * size_of(type), at_start);
        char *want_row = malloc((size_t)D * size_of(type));
        fill_floats(q, GP_F32, rows * D);
        for (int i = 0; i < 4; i++) {
            if (i == 1) memset(q, 0, (size_t)D * 4);
            if (i == 2) q[D - 1] = type == GP_I8 ? NAN : 3e38f;
            if (i == 3) q[0] = -INFINITY;
            const uint16_t scale = impl->page_store_row(q, D, type, row);
            CHECK(scale == ref->page_store_row(q, D, type, want_row) &&
                      memcmp(row, want_row, (size_t)D * size_of(type)) == 0,
                  "%s page_store_row type %d D %ld special %d", impl->name, (int)type, (long)D, i);
        }
        free(want_row);
        free(want_out);
        free(want);
        release_all();
    }
}

/* Every instruction set of this CPU, or the one named. */
int main(int argc, char **argv)
{
    static const int64_t sizes[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200};
    static const int64_t tokens[] = {1, 2, 3, 5, 15, 16, 17, 33, 40};
    static const int64_t outs[] = {1, 3, 16, 17, 33, 70};
    const int n_sizes = sizeof(sizes) / sizeof(*sizes);
    if (gp_set_isa(gp_available_isa(0))) return 1;
    const gp_impl reference = gp;
    ref = &reference;
    for (int i = 0; i < gp_available(); i++) {
        if (argc > 1 && strcmp(argv[1], gp_available_isa(i))) continue;
        if (gp_set_isa(gp_available_isa(i))) return 1;
        const gp_impl table = gp; /* what this cap runs, inherited kernels included */
        for (int s = 0; s < n_sizes; s++) {
            int64_t K = sizes[s];
            for (int type = GP_F32; type <= GP_F16; type++) {
                for (int planes = 1; planes <= 2; planes++)
                    for (int special = 0; special < 4; special++)
                        check_quantize(&table, (gp_dtype)type, K, planes, special);
                check_rows(&table, K, (gp_dtype)type);
            }
            check_decoder_rows(&table, K);
            check_activations(&table, K, 1);
            check_activations(&table, K, 60);
            for (int i = 0; i < 4; i++) {
                check_grouped_quantize(&table, 1 + s % 16, K, i < 2 ? 4 : 8, 32 * (1 + s % 4), i % 2);
                check_gptq(&table, K, i < 2 ? 4 : 8, 32 * (1 + s % 5), i % 2);
            }
            for (int t = 0; t < (int)(sizeof(tokens) / sizeof(*tokens)); t++) {
                for (int o = 0; o < (int)(sizeof(outs) / sizeof(*outs)); o++) {
                    int odd = (s + t + o) % 3;
                    for (int planes = 1; planes <= 2; planes++)
                        check_linear(&table, tokens[t], outs[o], K, planes, (gp_dtype)odd,
                                     (t + o) % 2, s % 2);
                }
                for (int i = 0; i < 4; i++)
                    check_grouped(&table, tokens[t], outs[(s + t) % 6] * (1 + t), K, i < 2 ? 4 : 8,
                                  32 * (1 + (s + t) % 4), 1 + (s + i) % 2, i % 2, t % 2);
                for (int type = GP_BF16; type <= GP_I8; type++)
                    check_float_linear(&table, tokens[t], outs[t % 6], K, (gp_dtype)type);
                check_stats(&table, tokens[t], K);
            }
        }
        for (int type = GP_F32; type <= GP_I8; type++) {
            static const int64_t dims[] = {1, 8, 16, 17, 40, 64, 80, 128, 200, GP_HEAD_DIM_MAX};
            for (int d = 0; d < 10; d++)
                for (int64_t rows = 1; rows <= 7; rows++) {
                    static const int64_t sizes_of_pages[] = {1, 16, 48, 64, 256};
                    const int bytes = type == GP_I8;
                    const int64_t page_size = gp_max(sizes_of_pages[(d + rows) % 5], bytes ? GP_SLOTS : 1);
                    const int64_t D = bytes ? gp_ceil_div(dims[d], 4) * 4 : dims[d];
                    const int64_t n = 1 + (37 * rows + 29 * d) % GP_CHUNK, begin = (11 * rows) % 70;
                    const int special = bytes ? (int)(d + 2 * rows) % 6 : 0;
                    check_attention(&table, (gp_dtype)type, rows, D, page_size, begin, begin + n, special);
                }
        }
        /* Wide enough for every loop of the packed linear: panels, chunks of K, blocks of tokens. */
        for (int planes = 1; planes <= 2; planes++)
            for (int type = GP_F32; type <= GP_F16; type++)
                check_linear(&table, 130, 300, 1100, planes, (gp_dtype)type, 1, 1);
        /* And of the grouped linear: chunks of columns, panels together, blocks of tokens. */
        for (int i = 0; i < 32; i++)
            check_grouped(&table, 20 + i % 3 * 25, 150, 800 + i, i < 16 ? 4 : 8, 32 * (1 + i % 4),
                          1 + i / 4 % 2, i / 8 % 2, 1);
        check_grouped(&table, 270, 40, 70, 4, 64, 2, 1, 1);
        printf("%s: %d checks, %d failed\n", table.name, checks, failures);
    }
    if (checks == 0) printf("%s: this CPU lacks what it needs, nothing was checked\n", argv[1]);
    if (gp_set_isa("no such thing") != -1) failures++;
    printf("%d passed, %d failed\n", checks - failures, failures);
    return failures != 0;
}
