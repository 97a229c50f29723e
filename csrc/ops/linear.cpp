/* SPDX-License-Identifier: MIT
 * Linears: the body of every one, and the operators of weights stored by rows: int8, bfloat16, float16. */
#include "ops/linear.h"

namespace gpu_poor {

Inputs::Inputs(const void *x, gp_dtype type, int64_t M, int64_t K,
               std::initializer_list<const Linear *> readers)
    : x_(static_cast<const char *>(x)), type_(type), M_(M), K_(K)
{
    size_t total = 0;
    for (const Linear *linear : readers) {
        if (linear->N == 0) continue;
        int i = 0;
        while (i < n_forms_ && !fits(forms_[i], *linear)) i++;
        if (i == n_forms_) {
            STD_TORCH_CHECK(i < kForms, "linears that read the same tokens in ", kForms + 1, " forms");
            Form &form = forms_[n_forms_++];
            form = {};
            form.planes = linear->planes;
            form.group = linear->planes && linear->grouped ? linear->panels.group : 0;
            form.groups = form.group ? (K + form.group - 1) / form.group : 0;
            form.input_scale = linear->input_scale;
            form.K_pad = round_up(K, GP_K_ALIGN);
            form.in_place = !form.planes && type == GP_F32 && K == form.K_pad && !form.input_scale;
            /* Not 4096 bytes from row to row: a tile of 16 or 32 would fall into the same few sets of L1. */
            if (form.group) form.K_pad |= GP_K_ALIGN;
        }
        /* int8_linear is faster on packed tokens if they are many; a grouped one has no use for them. */
        forms_[i].pack |= linear->planes && !linear->grouped && linear->N >= 16 && gp.pack_min_rows &&
                          M * linear->planes >= gp.pack_min_rows;
    }
    for (int i = 0; i < n_forms_; i++) total += bytes(forms_[i]);
    scratch_.emplace(total);
    for (int i = 0; i < n_forms_; i++) {
        Form &form = forms_[i];
        if (!form.planes) {
            form.rows = form.in_place ? static_cast<const float *>(x) : scratch_->take<float>(M * form.K_pad);
            continue;
        }
        form.q = scratch_->take<int8_t>(M * form.planes * form.K_pad);
        form.scale = scratch_->take<float>(M);
        form.sum = scratch_->take<int32_t>(M * form.planes);
        form.group_sums = scratch_->take<int32_t>(M * form.groups);
        if (form.pack) form.packed = scratch_->take<int8_t>(round_up(M, 16) * form.planes * form.K_pad);
    }
}

size_t Inputs::bytes(const Form &form) const
{
    if (!form.planes) return form.in_place ? 0 : Scratch::bytes<float>(M_ * form.K_pad);
    return Scratch::bytes<int8_t>(M_ * form.planes * form.K_pad) + Scratch::bytes<float>(M_) +
           Scratch::bytes<int32_t>(M_ * form.planes) + Scratch::bytes<int32_t>(M_ * form.groups) +
           (form.pack ? Scratch::bytes<int8_t>(round_up(M_, 16) * form.planes * form.K_pad) : 0);
}

void Inputs::prepare(int64_t begin, int64_t end) const
{
    for (int i = 0; i < n_forms_; i++) prepare(forms_[i], begin, end);
}

void Inputs::prepare(const Form &form, int64_t begin, int64_t end) const
{
    if (form.in_place) return;
    const int64_t row_bytes = K_ * gp_size(type_), K_pad = form.K_pad;
    const size_t tail = static_cast<size_t>(K_pad - K_);
    const Temporary<float> scaled(form.input_scale && form.planes ? K_ : 0);
    for (int64_t m = begin; m < end; m++) {
        const char *x = x_ + m * row_bytes;
        gp_dtype type = type_;
        float *floats = form.planes ? scaled.get() : const_cast<float *>(form.rows) + m * K_pad;
        if (!form.planes || form.input_scale) gp.to_float_row(x, type, K_, floats);
        if (form.input_scale) {
            for (int64_t k = 0; k < K_; k++) floats[k] *= form.input_scale[k];
            x = reinterpret_cast<const char *>(floats), type = GP_F32;
        }
        if (!form.planes) {
            std::memset(floats + K_, 0, tail * 4);
            continue;
        }
        int8_t *row = form.q + m * form.planes * form.K_pad;
        form.scale[m] = gp.int8_quantize_row(x, type, K_, form.planes, row, K_pad,
                                             form.sum + m * form.planes);
        for (int p = 0; tail && p < form.planes; p++) std::memset(row + p * K_pad + K_, 0, tail);
        if (form.groups)
            gp.grouped_sum_groups(row, K_, K_pad, form.planes, form.group,
                                  form.group_sums + m * form.groups);
    }
    if (!form.pack) return;
    const gp_int8_linear a = integers(form);
    for (int64_t b = begin / 16; b < (end + 15) / 16; b++)
        gp.int8_pack(&a, b, form.packed + b * 16 * form.planes * form.K_pad);
}

/* The sum of a token's x, as its products are: each plane a float, 254 h + l. */
float Inputs::token_sum(const Form &form, int64_t m) const
{
    if (!form.planes) {
        double sum = 0;
        for (int64_t k = 0; k < K_; k++) sum += form.rows[m * form.K_pad + k];
        return static_cast<float>(sum);
    }
    const float high = static_cast<float>(form.sum[m * form.planes]);
    if (form.planes == 1) return high * form.scale[m];
    return (254.0f * high + static_cast<float>(form.sum[m * form.planes + 1])) * form.scale[m];
}

void Inputs::run(const Linear &linear, void *y, gp_dtype type, int64_t n0, int64_t n1, float *t) const
{
    const Form &form = this->form(linear);
    const int64_t N = linear.N, p0 = n0 / GP_PANEL_ROWS, p1 = panels_of(n1);
    void *out = linear.offset && type != GP_F32 ? t : y;
    const gp_dtype out_type = linear.offset ? GP_F32 : type;
    if (linear.grouped && form.planes) {
        const gp_grouped_linear a = {M_, N, form.K_pad, form.planes, form.q, form.group_sums, form.scale,
                                     linear.panels, linear.bias, out, out_type};
        gp.grouped_linear(&a, p0, p1);
    } else if (linear.grouped) {
        const gp_grouped_float_linear a = {M_, N, form.K_pad, form.rows, linear.panels, linear.bias, out,
                                           out_type};
        gp.grouped_float_linear(&a, p0, p1);
    } else if (form.planes) {
        gp_int8_linear a = integers(form);
        a.N = N, a.w = static_cast<const int8_t *>(linear.rows), a.w_scale = linear.scale;
        a.bias = linear.bias, a.y = out, a.y_type = out_type;
        if (N < 16) a.x_packed = nullptr;
        gp.int8_linear(&a, n0, n1);
    } else {
        const gp_float_linear a = {M_, N, K_, form.K_pad, form.rows, linear.rows, linear.row_type,
                                   linear.scale, linear.bias, out, out_type};
        gp.float_linear(&a, n0, n1);
    }
    if (!linear.offset) return;
    for (int64_t m = 0; m < M_; m++)
        gp.add_offsets(static_cast<const float *>(out) + m * N + n0, token_sum(form, m),
                       linear.offset + n0, n1 - n0, static_cast<char *>(y) + (m * N + n0) * gp_size(type),
                       type);
}

void apply(const Linear &linear, const void *x, gp_dtype type, int64_t M, void *y)
{
    if (M == 0 || linear.N == 0) return;
    const Inputs inputs(x, type, M, linear.K, {&linear});
    inputs.prepare();
    const Temporary<float> t(linear.offset && type != GP_F32 ? M * linear.N : 0);
    parallel(linear.N, linear.unit(), linear.cost(M),
             [&](int64_t begin, int64_t end) { inputs.run(linear, y, type, begin, end, t); });
}

void apply(std::initializer_list<Job> jobs, int64_t M)
{
    const auto units = [](const Job &job) {
        return round_up(job.linear->N, job.linear->unit()) / job.linear->unit();
    };
    int64_t total = 0;
    double cost = 0;
    for (const Job &job : jobs) {
        total += units(job);
        cost += static_cast<double>(job.linear->N) * job.linear->cost(M);
    }
    parallel(total, 1, cost / static_cast<double>(total), [&](int64_t begin, int64_t end) {
        for (const Job &job : jobs) { /* begin and end are of this one's units */
            const int64_t n = units(job), unit = job.linear->unit();
            const int64_t n0 = std::max<int64_t>(begin, 0) * unit, n1 = std::min(end * unit, job.linear->N);
            if (n0 < n1) job.inputs->run(*job.linear, job.y, GP_F32, n0, n1, nullptr);
            begin -= n, end -= n;
        }
    });
}

} // namespace gpu_poor

namespace {

using namespace gpu_poor;

Tensor int8_linear(const Tensor &x_in, const Tensor &weight, const Tensor &scale,
                   const std::optional<Tensor> &bias, int64_t activation_bits)
{
    check_weight("int8_linear", weight, scale);
    STD_TORCH_CHECK(weight.dim() == 2 && x_in.dim() >= 1 && x_in.size(-1) == weight.size(1),
                    "int8_linear: x ", shape_of(x_in), " does not end in K of weight [N, K] ",
                    shape_of(weight));
    check_linear("int8_linear", x_in, activation_bits);
    gp_dtype type = float_type(x_in.scalar_type(), "int8_linear", "x");
    Tensor x = dense(x_in), w = dense(weight), s = dense(scale);
    std::vector<int64_t> sizes = leading(x);
    const int64_t M = product(sizes);
    sizes.push_back(weight.size(0));
    Tensor y = new_tensor(sizes, x.scalar_type());
    const Floats b = bias_of("int8_linear", bias, weight.size(0));
    apply(int8_rows(w, s, b.data, activation_bits), x.data_ptr(), type, M, y.data_ptr());
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
    Tensor x = dense(x_in), w = dense(weight);
    std::vector<int64_t> sizes = leading(x);
    const int64_t M = product(sizes);
    sizes.push_back(weight.size(0));
    Tensor y = new_tensor(sizes, x.scalar_type());
    const Floats b = bias_of(op, bias, weight.size(0));
    apply(half_rows(w, w_type, b.data), x.data_ptr(), type, M, y.data_ptr());
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
