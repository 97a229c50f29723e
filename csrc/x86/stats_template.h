/* SPDX-License-Identifier: MIT
 * Included by stats.c once per ISA, with NAME, TARGET, LANES, ROWS, VECS and the vec_* operations
 * defined; undefines them. */
/* The reference's loops: they vectorize across the channels as they are, given the target. */
TARGET static void NAME(channel_stats)(const float *x, int64_t M, int64_t K, int64_t k0,
                                       int64_t k1, float *absmax, float *restrict min,
                                       float *restrict max, double *restrict sum_square)
{
    for (int64_t k = k0; k < k1; k++) {
        min[k] = max[k] = x[k];
        sum_square[k] = 0;
    }
    for (int64_t m = 0; m < M; m++) {
        const float *row = x + m * K;
        for (int64_t k = k0; k < k1; k++) {
            float v = row[k], low = min[k], high = max[k];
            int nan = v != v;
            min[k] = (v < low) | nan ? v : low;
            max[k] = (v > high) | nan ? v : high;
            sum_square[k] += (double)v * v;
        }
    }
    for (int64_t k = k0; k < k1; k++) {
        float low = fabsf(min[k]), high = fabsf(max[k]);
        absmax[k] = high > low || high != high ? high : low;
    }
}

/* ROWS channels i times VECS vectors of channels j, over all M rows, in registers. */
GP_INLINE TARGET void NAME(gram_tile)(const float *x, int64_t M, int64_t K, int64_t i, int64_t j,
                                      float *tile)
{
    vec acc[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++) acc[r][v] = vec_zero();
    for (int64_t m = 0; m < M; m++) {
        const float *row = x + m * K;
        vec b[VECS];
        for (int v = 0; v < VECS; v++) b[v] = vec_load(row + j + v * LANES);
        for (int r = 0; r < ROWS; r++) {
            vec a = vec_set1(row[i + r]);
            for (int v = 0; v < VECS; v++) acc[r][v] = vec_fma(a, b[v], acc[r][v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++)
            vec_store(tile + r * VECS * LANES + v * LANES, acc[r][v]);
}

/* Only j >= i is computed; that half is what makes this competitive with a full matrix product. */
TARGET static void NAME(gram)(const float *x, int64_t M, int64_t K, int64_t i0, int64_t i1,
                              float *acc)
{
    enum { WIDTH = VECS * LANES };
    float tile[ROWS * WIDTH];
    for (int64_t i = i0; i < i1; i += ROWS) {
        int64_t rows = gp_min(ROWS, i1 - i);
        for (int64_t j = i / WIDTH * WIDTH; j < K; j += WIDTH) {
            int64_t columns = gp_min(WIDTH, K - j);
            if (rows == ROWS && columns == WIDTH) {
                NAME(gram_tile)(x, M, K, i, j, tile);
            } else { /* the edges: K modulo the tile */
                for (int64_t e = 0; e < ROWS * WIDTH; e++) tile[e] = 0;
                for (int64_t m = 0; m < M; m++)
                    for (int64_t r = 0; r < rows; r++)
                        for (int64_t c = 0; c < columns; c++)
                            tile[r * WIDTH + c] += x[m * K + i + r] * x[m * K + j + c];
            }
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t c = 0; c < columns; c++) {
                    if (j + c < i + r) continue;
                    acc[(i + r) * K + j + c] += tile[r * WIDTH + c];
                    if (j + c > i + r) acc[(j + c) * K + i + r] += tile[r * WIDTH + c];
                }
            }
        }
    }
}

#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef VECS
#undef vec
#undef vec_load
#undef vec_store
#undef vec_set1
#undef vec_zero
#undef vec_fma
