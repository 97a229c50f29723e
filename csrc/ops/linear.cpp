/* SPDX-License-Identifier: MIT
 * Linear operators of weights stored by rows: int8, bfloat16, float16. */
#include "ops/weights.h"

namespace {

using namespace gpu_poor;

/* What an offset for each weight row adds to an int8 linear: y[m][n] += u[m] * offset[n], u being the
 * sum of the token's x. The linear itself leaves float32, in y or in scratch, for one rounding. */
class Offsets {
  public:
    template <class A>
    Offsets(const float *offset, A &a, Scratch &scratch)
        : offset_(offset), y_(a.y), type_(a.y_type), M_(a.M), N_(a.N)
    {
        if (!offset_) return;
        if (type_ != GP_F32) a.y = scratch.take<float>(M_ * N_);
        a.y_type = GP_F32;
        t_ = static_cast<const float *>(a.y);
    }
    static size_t bytes(const float *offset, int64_t count, gp_dtype type)
    {
        return offset && type != GP_F32 ? Scratch::bytes<float>(count) : 0;
    }
    template <class F>
    void add(const F &u) const
    {
        if (!offset_) return;
        char *y = static_cast<char *>(y_);
        parallel(M_, 1, 8.0 * static_cast<double>(N_), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; m++)
                gp.add_offsets(t_ + m * N_, u(m), offset_, N_, y + m * N_ * gp_size(type_), type_);
        });
    }

  private:
    const float *offset_, *t_ = nullptr;
    void *y_;
    gp_dtype type_;
    int64_t M_, N_;
};

void float_linear(const Tensor &x, gp_dtype type, gp_float_linear a, const float *offset)
{
    Scratch scratch(Scratch::bytes<float>(a.M * a.K_pad) +
                    Offsets::bytes(offset, a.M * a.N, a.y_type));
    a.x = float_rows(x, type, a.M, a.K, a.K_pad, scratch);
    const Offsets offsets(offset, a, scratch);
    parallel(a.N, 4, row_cost(a.K, 4 * a.M),
             [&](int64_t begin, int64_t end) { gp.float_linear(&a, begin, end); });
    offsets.add([&](int64_t m) {
        double sum = 0;
        for (int64_t k = 0; k < a.K; k++) sum += a.x[m * a.K_pad + k];
        return static_cast<float>(sum);
    });
}

void integer_linear(const Tensor &x, gp_dtype type, gp_int8_linear a, const float *offset)
{
    const int64_t rows = a.M * a.planes, blocks = (a.M + 15) / 16;
    const bool pack = gp.pack_min_rows && rows >= gp.pack_min_rows && a.N >= 16;
    const int64_t packed_bytes = pack ? blocks * 16 * a.planes * a.K_pad : 0;
    Scratch scratch(Scratch::bytes<int8_t>(rows * a.K_pad) + Scratch::bytes<float>(a.M) +
                    Scratch::bytes<int32_t>(rows) + Scratch::bytes<int8_t>(packed_bytes) +
                    Offsets::bytes(offset, a.M * a.N, a.y_type));
    int8_t *q = scratch.take<int8_t>(rows * a.K_pad);
    float *scale = scratch.take<float>(a.M);
    int32_t *sum = scratch.take<int32_t>(rows);
    int8_t *packed = scratch.take<int8_t>(packed_bytes);
    a.x = q, a.x_scale = scale, a.x_sum = sum, a.x_packed = pack ? packed : nullptr;
    const Offsets offsets(offset, a, scratch);
    quantize_tokens(x, type, a.M, a.K, a.K_pad, a.planes, q, scale, sum,
                    [&](int64_t begin, int64_t end) {
                        if (pack)
                            for (int64_t b = begin / 16; b < (end + 15) / 16; b++)
                                gp.int8_pack(&a, b, packed + b * 16 * a.planes * a.K_pad);
                    });
    parallel(a.N, 32, row_cost(a.K, rows),
             [&](int64_t begin, int64_t end) { gp.int8_linear(&a, begin, end); });
    offsets.add([&](int64_t m) { /* as the products: each plane a float, 254 h + l */
        const float high = static_cast<float>(sum[m * a.planes]);
        if (a.planes == 1) return high * scale[m];
        return (254.0f * high + static_cast<float>(sum[m * a.planes + 1])) * scale[m];
    });
}

Tensor int8_linear(const Tensor &x_in, const Tensor &weight, const Tensor &scale,
                   const std::optional<Tensor> &bias, int64_t activation_bits)
{
    check_weight("int8_linear", weight, scale);
    STD_TORCH_CHECK(weight.dim() == 2 && x_in.dim() >= 1 && x_in.size(-1) == weight.size(1),
                    "int8_linear: x ", shape_of(x_in), " does not end in K of weight [N, K] ",
                    shape_of(weight));
    check_linear("int8_linear", x_in, activation_bits);
    gp_dtype type = float_type(x_in.scalar_type(), "int8_linear", "x");
    const int64_t N = weight.size(0), K = weight.size(1);
    Tensor x = dense(x_in), w = dense(weight), s = dense(scale);
    std::vector<int64_t> sizes = leading(x);
    const int64_t M = product(sizes);
    sizes.push_back(N);
    Tensor y = new_tensor(sizes, x.scalar_type());

    const Bias b("int8_linear", bias, N);
    if (M == 0 || N == 0) return y;

    const int64_t K_pad = round_up(K, GP_K_ALIGN);
    const int8_t *q = static_cast<const int8_t *>(w.data_ptr());
    const float *w_scale = static_cast<const float *>(s.data_ptr());
    const float *offset = s.dim() == 2 ? w_scale + N : nullptr;
    if (activation_bits == 32)
        float_linear(x, type,
                     {M, N, K, K_pad, nullptr, q, GP_I8, w_scale, b.data, y.data_ptr(), type},
                     offset);
    else
        integer_linear(x, type,
                       {M, N, K, K_pad, activation_bits == 8 ? 1 : 2, nullptr, nullptr, nullptr,
                        nullptr, q, w_scale, b.data, y.data_ptr(), type},
                       offset);
    return y;
}

/* 16-bit weights [N, K]: float activations in every mode. */
Tensor half_linear(const Tensor &x_in, const Tensor &weight, const std::optional<Tensor> &bias)
{
    const char *op = "half_linear";
    const gp_dtype w_type = float_type(weight.scalar_type(), op, "weight");
    STD_TORCH_CHECK(w_type != GP_F32 && weight.dim() == 2, op,
                    ": weight must be bfloat16 or float16 [N, K], got shape ", shape_of(weight));
    STD_TORCH_CHECK(x_in.dim() >= 1 && x_in.size(-1) == weight.size(1), op, ": x ", shape_of(x_in),
                    " does not end in K of weight [N, K] ", shape_of(weight));
    STD_TORCH_CHECK(x_in.is_cpu() && weight.is_cpu(), op, ": all tensors must be on one device");
    const gp_dtype type = float_type(x_in.scalar_type(), op, "x");
    const int64_t N = weight.size(0), K = weight.size(1);
    Tensor x = dense(x_in), w = dense(weight);
    std::vector<int64_t> sizes = leading(x);
    const int64_t M = product(sizes);
    sizes.push_back(N);
    Tensor y = new_tensor(sizes, x.scalar_type());
    const Bias b(op, bias, N);
    if (M == 0 || N == 0) return y;
    float_linear(x, type, {M, N, K, round_up(K, GP_K_ALIGN), nullptr, w.data_ptr(), w_type, nullptr,
                           b.data, y.data_ptr(), type},
                 nullptr);
    return y;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpu_poor, m)
{
    m.def("int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, "
          "int activation_bits) -> Tensor");
    m.def("half_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpu_poor, CPU, m)
{
    m.impl("int8_linear", TORCH_BOX(&int8_linear));
    m.impl("half_linear", TORCH_BOX(&half_linear));
}
