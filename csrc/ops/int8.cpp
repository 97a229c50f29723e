/* SPDX-License-Identifier: MIT
 * Operators of int8 weights: quantize, dequantize, gather. */
#include "ops/weights.h"

namespace {

using namespace gpu_poor;

std::tuple<Tensor, Tensor> int8_quantize(const Tensor &weight)
{
    STD_TORCH_CHECK(weight.dim() >= 1, "int8_quantize: weight must be [..., K], got a scalar");
    gp_dtype type = float_type(weight.scalar_type(), "int8_quantize", "weight");
    Tensor w = dense(weight);
    std::vector<int64_t> rows = leading(w), all = rows;
    const int64_t K = w.size(-1), n = product(rows);
    all.push_back(K);
    Tensor q = new_tensor(all, ScalarType::Char), scale = new_tensor(rows, ScalarType::Float);
    const char *in = static_cast<const char *>(w.data_ptr());
    int8_t *out = static_cast<int8_t *>(q.data_ptr());
    float *scales = static_cast<float *>(scale.data_ptr());
    const int64_t size = gp_size(type);
    std::atomic<bool> out_of_memory{false};
    parallel(n, 1, static_cast<double>(K * size), [&](int64_t begin, int64_t end) {
        std::unique_ptr<int16_t[]> fixed(new (std::nothrow) int16_t[static_cast<size_t>(K)]);
        if (!fixed) {
            out_of_memory = true;
            return;
        }
        for (int64_t i = begin; i < end; i++)
            scales[i] = gp.int8_quantize_weight_row(in + i * K * size, type, K, out + i * K,
                                                    fixed.get());
    });
    STD_TORCH_CHECK(!out_of_memory, "int8_quantize: out of memory for rows of ", K, " columns");
    return {q, scale};
}

/* Rows index(i) of a weight, counted through its matrices, as floats. */
template <class F>
void int8_rows(const Tensor &weight, const Tensor &scale, int64_t n, gp_dtype type, void *y,
               const F &index)
{
    const bool offsets = scale.dim() == weight.dim();
    const int64_t K = weight.size(-1), size = gp_size(type), N = offsets ? scale.size(-1) : 1;
    const int8_t *q = static_cast<const int8_t *>(weight.data_ptr());
    const float *scales = static_cast<const float *>(scale.data_ptr());
    char *out = static_cast<char *>(y);
    parallel(n, 1, static_cast<double>(K * size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t row = index(i), at = offsets ? row / N * 2 * N + row % N : row;
            gp.int8_dequantize_row(q + row * K, scales[at], offsets ? scales[at + N] : 0, K,
                                   out + i * K * size, type);
        }
    });
}

Tensor int8_dequantize(const Tensor &weight, const Tensor &scale, ScalarType dtype)
{
    check_weight("int8_dequantize", weight, scale);
    gp_dtype type = float_type(dtype, "int8_dequantize", "dtype");
    Tensor w = dense(weight), s = dense(scale);
    std::vector<int64_t> sizes = leading(w);
    const int64_t K = w.size(-1), n = product(sizes);
    sizes.push_back(K);
    Tensor y = new_tensor(sizes, dtype);
    int8_rows(w, s, n, type, y.data_ptr(), [](int64_t i) { return i; });
    return y;
}

Tensor int8_embedding(const Tensor &indices, const Tensor &weight, const Tensor &scale,
                      ScalarType dtype)
{
    check_weight("int8_embedding", weight, scale);
    STD_TORCH_CHECK(weight.dim() == 2, "int8_embedding: weight must be int8 [N, K], got shape ",
                    shape_of(weight));
    gp_dtype type = float_type(dtype, "int8_embedding", "dtype");
    Tensor ids = Indices::checked("int8_embedding", indices), w = dense(weight), s = dense(scale);
    const int64_t N = w.size(0), K = w.size(1), n = ids.numel();
    const Indices index("int8_embedding", ids, N);
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < ids.dim(); i++) sizes.push_back(ids.size(i));
    sizes.push_back(K);
    Tensor y = new_tensor(sizes, dtype);
    int8_rows(w, s, n, type, y.data_ptr(), index);
    return y;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpu_poor, m)
{
    m.def("int8_quantize(Tensor weight) -> (Tensor, Tensor)");
    m.def("int8_dequantize(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor");
    m.def("int8_embedding(Tensor indices, Tensor weight, Tensor scale, ScalarType dtype)"
          " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpu_poor, CPU, m)
{
    m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
    m.impl("int8_dequantize", TORCH_BOX(&int8_dequantize));
    m.impl("int8_embedding", TORCH_BOX(&int8_embedding));
}
