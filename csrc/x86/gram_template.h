/* SPDX-License-Identifier: MIT
 * The Gram matrix of packed panels, for floats or bfloat16 pairs. Included with defined: NAME, TARGET,
 * LANES, ROWS, VECS, vec, vec_load, vec_store; ELEMENT: a column's part of a step, of which M rows have
 * STEPS(M); element_load, element_set1, element_fma. Undefines the last five and ROWS, VECS. */

/* y[ROWS][VECS * LANES] += a^T b over all steps, in registers. */
GP_INLINE TARGET void NAME(tile)(const ELEMENT *a, const ELEMENT *b, int64_t steps, float *y,
                                 int64_t stride)
{
    vec acc[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++) acc[r][v] = vec_load(y + r * stride + v * LANES);
    for (int64_t s = 0; s < steps; s++, a += GP_GRAM_WIDTH, b += GP_GRAM_WIDTH)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++)
                acc[r][v] = element_fma(element_set1(a[r]), element_load(b + v * LANES), acc[r][v]);
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++) vec_store(y + r * stride + v * LANES, acc[r][v]);
}

TARGET static void NAME(squares)(const ELEMENT *packed, int64_t M, int64_t K, int64_t p0, int64_t p1,
                                 float *acc)
{
    enum { WIDTH = GP_GRAM_WIDTH };
    const int64_t steps = STEPS(M);
    float edge[WIDTH * WIDTH];
    for (int64_t p = p0; p < p1; p++) {
        for (int64_t r = p; r * WIDTH < K; r++) {
            const ELEMENT *a = packed + p * steps * WIDTH, *b = packed + r * steps * WIDTH;
            const int64_t rows = gp_min(WIDTH, K - p * WIDTH), columns = gp_min(WIDTH, K - r * WIDTH);
            const int whole = rows == WIDTH && columns == WIDTH;
            float *at = acc + p * WIDTH * K + r * WIDTH, *y = whole ? at : edge;
            const int64_t stride = whole ? K : WIDTH;
            for (int64_t i = 0; !whole && i < WIDTH; i++)
                for (int64_t j = 0; j < WIDTH; j++)
                    edge[i * WIDTH + j] = i < rows && j < columns ? at[i * K + j] : 0;
            for (int64_t i = 0; i < WIDTH; i += ROWS)
                for (int64_t j = 0; j < WIDTH; j += VECS * LANES)
                    NAME(tile)(a + i, b + j, steps, y + i * stride + j, stride);
            for (int64_t i = 0; !whole && i < rows; i++)
                memcpy(at + i * K, edge + i * WIDTH, (size_t)columns * 4);
        }
    }
}

#undef ROWS
#undef VECS
#undef ELEMENT
#undef STEPS
#undef element_load
#undef element_set1
#undef element_fma
