/* SPDX-License-Identifier: MIT
 *
 * A linear whatever its weight is stored as, and the tokens that it reads. The operators of one linear
 * and the decoder's blocks, which run several on the same tokens, are made of these.
 */
#ifndef GPU_POOR_OPS_LINEAR_H
#define GPU_POOR_OPS_LINEAR_H

#include <initializer_list>

#include "ops/weights.h"

namespace gpu_poor {

/* y[M][N] = x . w^T + bias. Rows: int8, bfloat16 or float16 [N][K]; panels: grouped weights. */
struct Linear {
    int64_t N = 0, K = 0; /* N 0: there is none, and nothing is done for it */
    int planes = 0; /* of the activations: 1 (a8), 2 (a16), 0 (a32: float) */
    const void *rows = nullptr;
    gp_dtype row_type = GP_I8;
    const float *scale = nullptr, *offset = nullptr; /* of rows: [N] each, or none */
    gp_grouped_weight panels = {};
    bool grouped = false;
    const float *bias = nullptr;        /* [N] */
    const float *input_scale = nullptr; /* [K]: what the tokens are multiplied by first */

    /* Output rows are computed in multiples of it, from one of them on. */
    int64_t unit() const { return grouped ? GP_PANEL_ROWS : planes ? 32 : 4; }
    /* Bytes that M tokens move or multiply for an output row. */
    double cost(int64_t M) const
    {
        return row_cost(K, M * (planes ? planes : 4)) * (grouped ? panels.bits / 8.0 : 1);
    }
};

/* planes of the activation_bits of an operator. */
inline int planes_of(int64_t activation_bits)
{
    return activation_bits == 8 ? 1 : activation_bits == 16 ? 2 : 0;
}

inline Linear int8_rows(const Tensor &w, const Tensor &scale, const float *bias, int64_t activation_bits)
{
    Linear a;
    a.N = w.size(0), a.K = w.size(1), a.planes = planes_of(activation_bits), a.bias = bias;
    a.rows = w.data_ptr(), a.scale = static_cast<const float *>(scale.data_ptr());
    a.offset = scale.dim() == 2 ? a.scale + a.N : nullptr;
    return a;
}

inline Linear half_rows(const Tensor &w, gp_dtype type, const float *bias)
{
    Linear a;
    a.N = w.size(0), a.K = w.size(1), a.bias = bias, a.rows = w.data_ptr(), a.row_type = type;
    return a;
}

inline Linear grouped_panels(const Tensor &w, const Tensor &scale, int64_t group, int64_t N, int64_t K,
                             const float *bias, int64_t activation_bits)
{
    Linear a;
    a.N = N, a.K = K, a.planes = planes_of(activation_bits), a.bias = bias, a.grouped = true;
    a.panels = grouped_weight(w, scale, group, K);
    return a;
}

/* Tokens x[M][K], which outlive it, in each form that one of the readers needs, once. */
class Inputs {
  public:
    Inputs(const void *x, gp_dtype type, int64_t M, int64_t K,
           std::initializer_list<const Linear *> readers);
    /* Tokens [begin, end), begin a multiple of 16; where the form is x itself, nothing. */
    void prepare(int64_t begin, int64_t end) const;
    /* All of them, in a parallel region if they are many. */
    void prepare() const
    {
        parallel(M_, 16, static_cast<double>(K_ * gp_size(type_)),
                 [&](int64_t begin, int64_t end) { prepare(begin, end); });
    }
    /* Output rows [n0, n1) of a reader: y[M][N] of a type. t[M][N] is for the products of a weight with
     * offsets, where y is not float32. */
    void run(const Linear &linear, void *y, gp_dtype type, int64_t n0, int64_t n1, float *t) const;

  private:
    struct Form {
        int planes;
        int64_t group, groups; /* 0 without */
        int64_t K_pad;
        const float *input_scale;
        const float *rows; /* [M][K_pad]; x itself if `in_place` */
        bool in_place, pack;
        int8_t *q;           /* [M][planes][K_pad] */
        float *scale;        /* [M] */
        int32_t *sum;        /* [M][planes] */
        int32_t *group_sums; /* [M][groups] */
        int8_t *packed;
    };
    static constexpr int kForms = 3;

    static bool fits(const Form &form, const Linear &linear)
    {
        return form.planes == linear.planes && form.input_scale == linear.input_scale &&
               form.group == (linear.planes && linear.grouped ? linear.panels.group : 0);
    }
    const Form &form(const Linear &linear) const
    {
        int i = 0;
        while (!fits(forms_[i], linear)) i++;
        return forms_[i];
    }
    size_t bytes(const Form &form) const;
    void prepare(const Form &form, int64_t begin, int64_t end) const;
    float token_sum(const Form &form, int64_t m) const;
    gp_int8_linear integers(const Form &form) const
    {
        return {M_, 0, K_, form.K_pad, form.planes, form.q, form.packed, form.sum, form.scale, nullptr,
                nullptr, nullptr, nullptr, GP_F32};
    }

    const char *x_;
    gp_dtype type_;
    int64_t M_, K_;
    Form forms_[kForms];
    int n_forms_ = 0;
    std::optional<Scratch> scratch_;
};

/* y = linear(x) in parallel, of x's type. */
void apply(const Linear &linear, const void *x, gp_dtype type, int64_t M, void *y);

/* Several linears in one parallel region: outputs float32 [M][N]. */
struct Job {
    const Linear *linear;
    const Inputs *inputs;
    float *y;
};
void apply(std::initializer_list<Job> jobs, int64_t M);

} // namespace gpu_poor

#endif
