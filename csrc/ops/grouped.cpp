/* SPDX-License-Identifier: MIT
 * Operators of grouped weights: quantize, dequantize, gather, linear. */
#include "ops/linear.h"

namespace {

using namespace gpu_poor;

std::tuple<Tensor, Tensor> grouped_quantize(const Tensor &weight, int64_t group, bool asymmetric,
                                         bool search, const std::optional<Tensor> &importance,
                                         int64_t bits)
{
    const char *op = "grouped_quantize";
    check_group(op, group);
    STD_TORCH_CHECK(bits == 4 || bits == 8, op, ": bits must be 4 or 8, got ", bits);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.is_cpu(), op, ": weight must be [N, K], got shape ",
                    shape_of(weight));
    gp_dtype type = float_type(weight.scalar_type(), op, "weight");
    const int64_t N = weight.size(0), K = weight.size(1), P = panels_of(N);
    const float *h = nullptr;
    std::optional<Tensor> dense_importance;
    if (importance) {
        STD_TORCH_CHECK(importance->scalar_type() == ScalarType::Float && importance->is_cpu() &&
                            importance->dim() == 1 && importance->size(0) == K,
                        op, ": importance must be float32 [K] with K = ", K, ", got shape ",
                        shape_of(*importance));
        dense_importance = dense(*importance);
        h = static_cast<const float *>(dense_importance->data_ptr());
    }
    Tensor w = dense(weight);
    const int64_t blocks = (K + GP_BLOCK - 1) / GP_BLOCK;
    const int64_t panel_bytes = blocks * GP_BLOCK_BYTES(bits);
    Tensor q = new_tensor({P, blocks, GP_BLOCK_BYTES(bits)}, ScalarType::Char);
    Tensor scale = new_tensor({P, (K + group - 1) / group, 1 + asymmetric, GP_PANEL_ROWS},
                              ScalarType::Half);
    const char *in = static_cast<const char *>(w.data_ptr());
    uint8_t *out = static_cast<uint8_t *>(q.data_ptr());
    uint16_t *scales = static_cast<uint16_t *>(scale.data_ptr());
    const int64_t size = gp_size(type), per_panel = P ? scale.numel() / P : 0;
    std::atomic<bool> out_of_memory{false};
    parallel(P, 1, static_cast<double>(100 * K), [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> rows(new (std::nothrow)
                                          float[static_cast<size_t>(GP_PANEL_ROWS * K)]);
        if (!rows) {
            out_of_memory = true;
            return;
        }
        for (int64_t p = begin; p < end; p++) {
            const int64_t n = std::min<int64_t>(GP_PANEL_ROWS, N - p * GP_PANEL_ROWS);
            const char *from = in + p * GP_PANEL_ROWS * K * size;
            const float *x = reinterpret_cast<const float *>(from);
            if (type != GP_F32) {
                for (int64_t r = 0; r < n; r++)
                    gp.to_float_row(from + r * K * size, type, K, rows.get() + r * K);
                x = rows.get();
            }
            gp_grouped_quantize a = {x, n, K, K, group, h, search ? GP_MSE : GP_ABSMAX,
                                     static_cast<int>(bits), asymmetric, out + p * panel_bytes,
                                     scales + p * per_panel};
            gp.grouped_quantize_panel(&a);
        }
    });
    STD_TORCH_CHECK(!out_of_memory, op, ": out of memory for rows of ", K, " columns");
    return {q, scale};
}

/* Rows index(i) of a weight, as floats. */
template <class F>
void grouped_rows(const gp_grouped_weight &w, int64_t n, gp_dtype type, void *y, const F &index)
{
    const int64_t size = gp_size(type);
    char *out = static_cast<char *>(y);
    parallel(n, 1, static_cast<double>(w.K * size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            gp.grouped_dequantize_row(&w, index(i), out + i * w.K * size, type);
    });
}

Tensor grouped_dequantize(const Tensor &weight, const Tensor &scale, int64_t group, int64_t N,
                       int64_t K, ScalarType dtype)
{
    check_grouped_weight("grouped_dequantize", weight, scale, group, N, K);
    gp_dtype type = float_type(dtype, "grouped_dequantize", "dtype");
    Tensor w = dense(weight), s = dense(scale), y = new_tensor({N, K}, dtype);
    grouped_rows(grouped_weight(w, s, group, K), N, type, y.data_ptr(), [](int64_t i) { return i; });
    return y;
}

Tensor grouped_linear(const Tensor &x_in, const Tensor &weight, const Tensor &scale,
                   const std::optional<Tensor> &bias, int64_t group, int64_t N,
                   int64_t activation_bits)
{
    const char *op = "grouped_linear";
    STD_TORCH_CHECK(x_in.dim() >= 1, op, ": x must be [..., K], got a scalar");
    const int64_t K = x_in.size(-1);
    check_grouped_weight(op, weight, scale, group, N, K);
    check_linear(op, x_in, activation_bits);
    gp_dtype type = float_type(x_in.scalar_type(), op, "x");
    Tensor x = dense(x_in), w = dense(weight), s = dense(scale);
    std::vector<int64_t> sizes = leading(x);
    const int64_t M = product(sizes);
    sizes.push_back(N);
    Tensor y = new_tensor(sizes, x.scalar_type());
    const Floats b = bias_of(op, bias, N);
    apply(grouped_panels(w, s, group, N, K, b.data, activation_bits), x.data_ptr(), type, M,
          y.data_ptr());
    return y;
}

Tensor grouped_embedding(const Tensor &indices, const Tensor &weight, const Tensor &scale,
                      int64_t group, int64_t N, int64_t K, ScalarType dtype)
{
    check_grouped_weight("grouped_embedding", weight, scale, group, N, K);
    gp_dtype type = float_type(dtype, "grouped_embedding", "dtype");
    Tensor ids = Indices::checked("grouped_embedding", indices), w = dense(weight), s = dense(scale);
    const Indices index("grouped_embedding", ids, N);
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < ids.dim(); i++) sizes.push_back(ids.size(i));
    sizes.push_back(K);
    Tensor y = new_tensor(sizes, dtype);
    grouped_rows(grouped_weight(w, s, group, K), ids.numel(), type, y.data_ptr(), index);
    return y;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpu_poor, m)
{
    m.def("grouped_quantize(Tensor weight, int group, bool asymmetric, bool search, "
          "Tensor? importance, int bits) -> (Tensor, Tensor)");
    m.def("grouped_dequantize(Tensor weight, Tensor scale, int group, int n, int k, ScalarType dtype)"
          " -> Tensor");
    m.def("grouped_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int group, int n, "
          "int activation_bits) -> Tensor");
    m.def("grouped_embedding(Tensor indices, Tensor weight, Tensor scale, int group, int n, int k, "
          "ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpu_poor, CPU, m)
{
    m.impl("grouped_quantize", TORCH_BOX(&grouped_quantize));
    m.impl("grouped_dequantize", TORCH_BOX(&grouped_dequantize));
    m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
    m.impl("grouped_embedding", TORCH_BOX(&grouped_embedding));
}
