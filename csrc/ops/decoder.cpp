/* SPDX-License-Identifier: MIT
 * Fused decoder blocks: everything of a block but attention, few parallel regions, each token's
 * activations quantized once for all linears that read them. */
#include "ops/decoder.h"

namespace gpu_poor {

/* -- reading ----------------------------------------------------------------------------------- */

Reader::Reader(const char *op_, const std::vector<Tensor> &tensors, const Tensor &layout,
               const Tensor &numbers)
    : op(op_), tensors_(tensors), blocks_(layout.dim() == 2 ? layout.size(0) : 0)
{
    STD_TORCH_CHECK(layout.dim() == 2 && layout.size(1) == kColumns && layout.is_contiguous() &&
                        layout.scalar_type() == ScalarType::Long && layout.is_cpu(),
                    op, ": layout must be a contiguous int64 [blocks, ", static_cast<int64_t>(kColumns),
                    "], got ", shape_of(layout));
    STD_TORCH_CHECK(numbers.dim() == 2 && numbers.size(0) == blocks_ && numbers.size(1) == kNumbers &&
                        numbers.is_contiguous() && numbers.scalar_type() == ScalarType::Float &&
                        numbers.is_cpu(),
                    op, ": numbers must be a contiguous float32 [blocks, ",
                    static_cast<int64_t>(kNumbers), "], got ", shape_of(numbers));
    layout_ = static_cast<const int64_t *>(layout.data_ptr());
    numbers_ = static_cast<const float *>(numbers.data_ptr());
}

const Tensor &Reader::next(const char *what)
{
    STD_TORCH_CHECK(taken_ < tensors_.size(), op, ": ", tensors_.size(),
                    " tensors, and none left for the ", what, " of block ", block_);
    return tensors_[taken_++];
}

Block Reader::read(int64_t hidden)
{
    STD_TORCH_CHECK(block_ < blocks_, op, ": no block ", block_, " in layout");
    Block block(*this, hidden);
    block_++;
    return block;
}

void Reader::end() const
{
    STD_TORCH_CHECK(taken_ == tensors_.size(), op, ": ", tensors_.size(), " tensors, layout describes ",
                    taken_);
}

Norm::Norm(Reader &reader, int64_t i, float eps, int64_t size)
    : Norm(reader, reader.column(kNorms + i * kNormColumns + kNormKind),
           reader.column(kNorms + i * kNormColumns + kNormBias) != 0, eps, size)
{
}

Norm::Norm(Reader &reader, int64_t kind, bool bias, float eps, int64_t size)
    : kind_(kind), size_(size), eps_(eps)
{
    STD_TORCH_CHECK(kind_ >= 0 && kind_ <= 2, reader.op, ": unknown kind of norm ", kind_);
    if (!kind_) return;
    weight_ = Floats(reader.op, "weight of a norm", reader.next("norm"), size);
    if (bias) bias_ = Floats(reader.op, "bias of a norm", reader.next("norm"), size);
}

Block::Weight::Weight(Reader &reader, int64_t i, int64_t K)
{
    const int64_t at = kLinears + i * kLinearColumns, N = reader.column(at + kLinearN);
    const int64_t group = reader.column(at + kLinearGroup), bits = reader.column(at + kLinearBits);
    const char *op = reader.op;
    if (N == 0) return;
    const Tensor &w = reader.next("linear");
    check_linear(op, w, bits);
    STD_TORCH_CHECK(w.is_contiguous(), op, ": weights must be contiguous");
    const bool half = w.scalar_type() != ScalarType::Char;
    const Tensor *scale = half ? nullptr : &reader.next("scale");
    if (reader.column(at + kLinearBias)) bias = Floats(op, "bias", reader.next("bias"), N);
    if (reader.column(at + kLinearInput))
        input_scale = Floats(op, "input scale", reader.next("input scale"), K);
    if (scale) STD_TORCH_CHECK(scale->is_contiguous(), op, ": scales must be contiguous");
    if (group) {
        STD_TORCH_CHECK(scale, op, ": a grouped weight is int8");
        check_grouped_weight(op, w, *scale, group, N, K);
        linear = grouped_panels(w, *scale, group, N, K, bias.data, bits);
        linear.input_scale = input_scale.data;
        return;
    }
    STD_TORCH_CHECK(w.dim() == 2 && w.size(0) == N && w.size(1) == K, op, ": weight must be [", N, ", ",
                    K, "], got ", shape_of(w));
    if (half) {
        const gp_dtype type = float_type(w.scalar_type(), op, "weight");
        STD_TORCH_CHECK(type != GP_F32, op, ": a float32 weight is not for fused blocks");
        linear = half_rows(w, type, bias.data);
    } else {
        check_weight(op, w, *scale);
        linear = int8_rows(w, *scale, bias.data, bits);
    }
    linear.input_scale = input_scale.data;
}

/* How many columns the linear in slot i has. */
static int64_t outputs(const Reader &reader, int64_t i)
{
    return reader.column(kLinears + i * kLinearColumns + kLinearN);
}

Block::Block(Reader &reader, int64_t hidden)
    : E(hidden), H(reader.column(kHeads)), G(reader.column(kKvHeads)), D(reader.column(kHeadDim)),
      window(reader.column(kWindow)), softmax_scale(reader.number(kSoftmaxScale)),
      qkv_(reader.column(kQkv)),
      gated_(reader.column(kGated)), parallel_(reader.column(kParallel)),
      inner_(outputs(reader, 4) / (gated_ == 2 ? 2 : 1)),
      activation_(static_cast<gp_activation>(reader.column(kActivation))),
      attention_norm_(reader, 0, reader.number(kAttentionEps), E),
      network_norm_(reader, 1, reader.number(kNetworkEps), E),
      q_norm_(reader, 2, reader.number(kHeadEps), D), k_norm_(reader, 3, reader.number(kHeadEps), D),
      q_(reader, 0, E), k_(reader, 1, E), v_(reader, 2, E), o_(reader, 3, H * D), gate_(reader, 4, E),
      up_(reader, 5, E), down_(reader, 6, inner_)
{
    const char *op = reader.op;
    const bool one = qkv_ != 0;
    STD_TORCH_CHECK(H > 0 && G > 0 && D > 0 && H % G == 0 && window >= 0 && qkv_ >= 0 &&
                        qkv_ <= 2 && (qkv_ != 2 || G == H) && gated_ >= 0 && gated_ <= 2 &&
                        activation_ >= GP_SILU && activation_ <= GP_RELU,
                    op, ": layout does not describe a block");
    STD_TORCH_CHECK(attention_norm_ && (network_norm_ || parallel_) && o_.linear.N == E &&
                        down_.linear.N == E && q_.linear.N == (one ? H + 2 * G : H) * D &&
                        k_.linear.N == (one ? 0 : G * D) && v_.linear.N == (one ? 0 : G * D) && inner_ > 0 &&
                        gate_.linear.N == inner_ * (gated_ == 2 ? 2 : 1) &&
                        up_.linear.N == (gated_ == 1 ? inner_ : 0),
                    op, ": linears do not fit: hidden size ", E, ", ", H, " and ", G, " heads of ", D);
}

/* -- running ----------------------------------------------------------------------------------- */

/* f(token) for all of them, and then what is to be prepared of a range; alone if they are few. */
template <class F>
static void for_tokens(int64_t M, int64_t floats_per_token, const F &f)
{
    parallel(M, 16, 4.0 * static_cast<double>(floats_per_token), f);
}

/* Token m of what one linear made of q, k and v. */
void Block::split(const float *from, int64_t m, float *q, float *k, float *v) const
{
    const size_t head = static_cast<size_t>(D) * sizeof(float);
    from += m * (H + 2 * G) * D, q += m * H * D, k += m * G * D, v += m * G * D;
    if (qkv_ == 1) {
        std::memcpy(q, from, static_cast<size_t>(H) * head);
        std::memcpy(k, from + H * D, static_cast<size_t>(G) * head);
        std::memcpy(v, from + (H + G) * D, static_cast<size_t>(G) * head);
        return;
    }
    for (int64_t h = 0; h < H; h++, from += 3 * D) {
        std::memcpy(q + h * D, from, head);
        std::memcpy(k + h * D, from + D, head);
        std::memcpy(v + h * D, from + 2 * D, head);
    }
}

void Block::finish_heads(int64_t m, const Rotation &rotation, float *q, float *k) const
{
    const float *cosine = rotation.cosine + m % rotation.rows * rotation.dims;
    const float *sine = rotation.sine + m % rotation.rows * rotation.dims;
    const auto finish = [&](const Norm &norm, float *heads, int64_t n) {
        for (int64_t h = 0; h < n; h++, heads += D) {
            if (norm) norm(heads, heads);
            if (rotation.dims) gp.rotary_row(heads, cosine, sine, rotation.dims);
        }
    };
    finish(q_norm_, q + m * H * D, H);
    finish(k_norm_, k + m * G * D, G);
}

void Block::qkv(const float *x, int64_t M, const Rotation &rotation, float *q, float *k, float *v) const
{
    const Temporary<float> normed(M * E), all(qkv_ ? M * q_.linear.N : 0);
    const Inputs inputs(normed, GP_F32, M, E, {&q_.linear, &k_.linear, &v_.linear});
    for_tokens(M, E, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) attention_norm_(x + m * E, normed + m * E);
        inputs.prepare(begin, end);
    });
    apply({{&q_.linear, &inputs, qkv_ ? all.get() : q},
           {&k_.linear, &inputs, k},
           {&v_.linear, &inputs, v}}, M);
    if (!qkv_ && !rotation.dims && !q_norm_ && !k_norm_) return;
    for_tokens(M, (H + 2 * G) * D, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            if (qkv_) split(all, m, q, k, v);
            finish_heads(m, rotation, q, k);
        }
    });
}

static void add(const float *x, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

void Block::out(const float *x, const float *attention, int64_t M, float *y) const
{
    const Temporary<float> projected(M * E), normed(M * E);
    {
        const Inputs inputs(attention, GP_F32, M, H * D, {&o_.linear});
        inputs.prepare();
        apply({{&o_.linear, &inputs, projected}}, M);
    }
    const Temporary<float> gate(M * gate_.linear.N), up(M * up_.linear.N);
    {
        const Inputs inputs(normed, GP_F32, M, E, {&gate_.linear, &up_.linear});
        for_tokens(M, E, [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; m++) {
                float *sum = projected + m * E;
                const Norm &norm = network_norm_ ? network_norm_ : attention_norm_;
                if (parallel_) norm(x + m * E, normed + m * E);
                add(x + m * E, E, sum);
                if (!parallel_) norm(sum, normed + m * E);
            }
            inputs.prepare(begin, end);
        });
        apply({{&gate_.linear, &inputs, gate}, {&up_.linear, &inputs, up}}, M);
    }
    const Temporary<float> inner(M * inner_);
    const Inputs inputs(inner, GP_F32, M, inner_, {&down_.linear});
    /* By columns, because one token has many: a gelu takes as long as 32 bytes of weights. */
    constexpr int64_t kColumns = 512;
    const int64_t parts = (inner_ + kColumns - 1) / kColumns;
    parallel(M * parts, 1, 32.0 * kColumns, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t m = i / parts, n = i % parts * kColumns;
            const float *g = gate + m * gate_.linear.N + n;
            const float *u = gated_ == 1 ? up + m * inner_ + n : gated_ == 2 ? g + inner_ : nullptr;
            gp.activate_row(activation_, g, u, std::min(kColumns, inner_ - n), inner + m * inner_ + n);
        }
    });
    inputs.prepare();
    apply({{&down_.linear, &inputs, y}}, M);
    for_tokens(M, E, [&](int64_t begin, int64_t end) {
        add(projected + begin * E, (end - begin) * E, y + begin * E);
    });
}

} // namespace gpu_poor
