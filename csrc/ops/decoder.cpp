/* SPDX-License-Identifier: MIT
 * Fused decoder blocks: everything of a block but attention, few parallel regions, each token's
 * activations quantized once for all linears that read them. */
#include "ops/decoder.h"

#include "ops/attention.h"

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

Norm::Norm(Reader &reader, int64_t i, float eps, int64_t size) : size_(size), eps_(eps)
{
    const int64_t at = kNorms + i * kNormColumns;
    kind_ = reader.column(at + kNormKind);
    STD_TORCH_CHECK(kind_ >= 0 && kind_ <= 2, reader.op, ": unknown kind of norm ", kind_);
    if (!kind_) return;
    weight_ = Floats(reader.op, "weight of a norm", reader.next("norm"), size);
    if (reader.column(at + kNormBias))
        bias_ = Floats(reader.op, "bias of a norm", reader.next("norm"), size);
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
    STD_TORCH_CHECK(H > 0 && G > 0 && D > 0 && H % G == 0 && window >= 0 && qkv_ >= 0 && qkv_ <= 2 && (qkv_ != 2 || G == H) && gated_ >= 0 &&
                        gated_ <= 2 && activation_ >= GP_SILU && activation_ <= GP_RELU,
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
    for_tokens(M, inner_, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            const float *g = gate + m * gate_.linear.N;
            const float *u = gated_ == 1 ? up + m * inner_ : gated_ == 2 ? g + inner_ : nullptr;
            gp.activate_row(activation_, g, u, inner_, inner + m * inner_);
        }
        inputs.prepare(begin, end);
    });
    apply({{&down_.linear, &inputs, y}}, M);
    for_tokens(M, E, [&](int64_t begin, int64_t end) {
        add(projected + begin * E, (end - begin) * E, y + begin * E);
    });
}

} // namespace gpu_poor

namespace {

using namespace gpu_poor;

/* Hidden states [B, T, E] of any float type as rows of float32. */
struct Hidden {
    Hidden(const char *op, const Tensor &x)
        : tensor(dense(x)), type(float_type(x.scalar_type(), op, "x")),
          B(x.dim() == 3 ? x.size(0) : 0), T(x.dim() == 3 ? x.size(1) : 0),
          E(x.dim() == 3 ? x.size(2) : 0), M(B * T),
          scratch(type == GP_F32 ? 0 : Scratch::bytes<float>(M * E))
    {
        STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && E > 0, op, ": x must be [B, T, hidden], got ",
                        shape_of(x));
        rows = float_rows(tensor, type, M, E, E, scratch);
    }
    Tensor tensor;
    gp_dtype type;
    int64_t B, T, E, M;
    Scratch scratch;
    const float *rows;
};

/* A result of the hidden states' type, computed as float32. */
struct Result {
    Result(const Hidden &like, const std::vector<int64_t> &sizes)
        : tensor(new_tensor(sizes, like.tensor.scalar_type())), type(like.type),
          scratch(type == GP_F32 ? 0 : Scratch::bytes<float>(tensor.numel()))
    {
        rows = type == GP_F32 ? static_cast<float *>(tensor.data_ptr())
                              : scratch.take<float>(tensor.numel());
    }
    const Tensor &rounded()
    {
        if (type != GP_F32) gp.page_store_row(rows, tensor.numel(), type, tensor.data_ptr());
        return tensor;
    }
    Tensor tensor;
    gp_dtype type;
    Scratch scratch;
    float *rows;
};

/* cos and sin [1 or B, T, rotary], or none. */
class Angles {
  public:
    Angles(const char *op, const std::optional<Tensor> &cosine, const std::optional<Tensor> &sine,
           const Hidden &x)
    {
        STD_TORCH_CHECK(cosine.has_value() == sine.has_value(), op, ": cos without sin");
        if (!cosine) return;
        const Tensor &c = *cosine, &s = *sine;
        STD_TORCH_CHECK(c.is_cpu() && c.dim() == 3 && (c.size(0) == 1 || c.size(0) == x.B) &&
                            c.size(1) == x.T && shape_of(c) == shape_of(s) && s.is_cpu() &&
                            c.scalar_type() == s.scalar_type(),
                        op, ": cos and sin must be [1 or B, T, rotary] with B = ", x.B, ", T = ", x.T,
                        ", got ", shape_of(c), " and ", shape_of(s));
        const gp_dtype type = float_type(c.scalar_type(), op, "cos");
        rotation.dims = c.size(2), rotation.rows = c.size(0) * c.size(1);
        cosine_ = dense(c), sine_ = dense(s);
        const int64_t n = c.numel();
        scratch_.emplace(type == GP_F32 ? 0 : 2 * Scratch::bytes<float>(n));
        rotation.cosine = float_rows(*cosine_, type, 1, n, n, *scratch_);
        rotation.sine = float_rows(*sine_, type, 1, n, n, *scratch_);
    }
    void check(const char *op, const Block &block) const
    {
        STD_TORCH_CHECK(rotation.dims <= block.D && rotation.dims % 2 == 0, op, ": cos has ",
                        rotation.dims, " dimensions, a head ", block.D);
    }
    Rotation rotation;

  private:
    std::optional<Tensor> cosine_, sine_;
    std::optional<Scratch> scratch_;
};

Block only_block(const char *op, const std::vector<Tensor> &weights, const Tensor &layout,
                 const Tensor &numbers, int64_t hidden)
{
    Reader reader(op, weights, layout, numbers);
    STD_TORCH_CHECK(reader.blocks() == 1, op, ": layout must describe one block, not ", reader.blocks());
    Block block = reader.read(hidden);
    reader.end();
    return block;
}

std::tuple<Tensor, Tensor, Tensor> decoder_qkv(const Tensor &x_in, std::vector<Tensor> weights,
                                               const Tensor &layout, const Tensor &numbers,
                                               const std::optional<Tensor> &cosine,
                                               const std::optional<Tensor> &sine, int64_t heads,
                                               int64_t kv_heads, int64_t head_dim)
{
    const char *op = "decoder_qkv";
    const Hidden x(op, x_in);
    const Block block = only_block(op, weights, layout, numbers, x.E);
    const Angles angles(op, cosine, sine, x);
    angles.check(op, block);
    STD_TORCH_CHECK(heads == block.H && kv_heads == block.G && head_dim == block.D, op, ": layout says ",
                    block.H, " and ", block.G, " heads of ", block.D, ", not ", heads, " and ", kv_heads,
                    " of ", head_dim);
    Result q(x, {x.B, x.T, block.H, block.D}), k(x, {x.B, x.T, block.G, block.D}),
        v(x, {x.B, x.T, block.G, block.D});
    if (x.M) block.qkv(x.rows, x.M, angles.rotation, q.rows, k.rows, v.rows);
    return {q.rounded(), k.rounded(), v.rounded()};
}

Tensor decoder_out(const Tensor &x_in, const Tensor &attention_in, std::vector<Tensor> weights,
                   const Tensor &layout, const Tensor &numbers)
{
    const char *op = "decoder_out";
    const Hidden x(op, x_in), attention(op, attention_in);
    const Block block = only_block(op, weights, layout, numbers, x.E);
    STD_TORCH_CHECK(attention.B == x.B && attention.T == x.T && attention.E == block.H * block.D, op,
                    ": attention must be [B, T, ", block.H * block.D, "], got ", shape_of(attention_in));
    Result y(x, {x.B, x.T, x.E});
    if (x.M) block.out(x.rows, attention.rows, x.M, y.rows);
    return y.rounded();
}

/* A cache whose pages hold every layer's keys and values: [n, layers, 2, kv_heads, page_size, D]. */
class Arena {
  public:
    Arena(const char *op, const Tensor &arena, const std::optional<Tensor> &scales,
          const Tensor &block_table, const Tensor &lengths, const std::optional<Tensor> &starts,
          int64_t batch)
        : op_(op)
    {
        STD_TORCH_CHECK(arena.dim() == 6 && arena.size(2) == 2 && arena.is_contiguous() && arena.is_cpu() &&
                            arena.numel() > 0 && arena.size(5) <= GP_HEAD_DIM_MAX,
                        op, ": arena must be a contiguous [n, layers, 2, kv_heads, page_size, D], got ",
                        shape_of(arena));
        const bool int8 = arena.scalar_type() == ScalarType::Char;
        bool fits = int8 == scales.has_value();
        if (fits && scales) {
            fits = scales->scalar_type() == ScalarType::Half && scales->dim() == 5 &&
                   scales->is_contiguous() && scales->is_cpu();
            for (int64_t i = 0; fits && i < 5; i++) fits = scales->size(i) == arena.size(i);
        }
        STD_TORCH_CHECK(fits, op, ": an int8 arena needs float16 scales of its first five sizes, others none");
        STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 2 &&
                            block_table.size(0) == batch && block_table.is_contiguous() && block_table.is_cpu(),
                        op, ": block_table must be a contiguous int32 [B, max_pages] with B = ", batch,
                        ", got ", shape_of(block_table));
        layers = arena.size(1);
        gp_pages &layer = first_.layer;
        layer.type = int8 ? GP_I8 : float_type(arena.scalar_type(), op, "arena");
        layer.kv_heads = arena.size(3), layer.page_size = arena.size(4), layer.D = arena.size(5);
        layer.pages = arena.data_ptr(), layer.page_stride = arena.stride(0);
        layer.scales = scales ? static_cast<uint16_t *>(scales->data_ptr()) : nullptr;
        layer.scale_stride = scales ? scales->stride(0) : 0;
        first_.n_pages = arena.size(0), first_.batch = batch;
        first_.block_table = static_cast<const int32_t *>(block_table.data_ptr());
        first_.table_stride = block_table.size(1);
        first_.lengths = of_sequences("lengths", lengths);
        if (starts) first_.starts = of_sequences("starts", *starts);
    }
    /* That T more tokens of each sequence have their places. */
    void check(int64_t T) const
    {
        check_pages(op_, first_, T, true);
        check_pages(op_, first_, T, false);
    }
    Pages layer(int64_t i, int64_t window) const
    {
        Pages pages = first_;
        const int64_t rows = i * 2 * pages.layer.kv_heads * pages.layer.page_size;
        pages.layer.pages = static_cast<char *>(pages.layer.pages) +
                            rows * pages.layer.D * gp_size(pages.layer.type);
        if (pages.layer.scales) pages.layer.scales += rows;
        pages.window = window;
        return pages;
    }
    int64_t layers;

  private:
    const int32_t *of_sequences(const char *name, const Tensor &t) const
    {
        STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.size(0) == first_.batch &&
                            t.is_contiguous() && t.is_cpu(),
                        op_, ": ", name, " must be a contiguous int32 [B] with B = ", first_.batch, ", got ",
                        shape_of(t));
        return static_cast<const int32_t *>(t.data_ptr());
    }
    const char *op_;
    Pages first_ = {};
};

Tensor decoder_step(const Tensor &x_in, std::vector<Tensor> weights, const Tensor &layout,
                    const Tensor &numbers, const std::optional<Tensor> &cosine,
                    const std::optional<Tensor> &sine, const Tensor &pages,
                    const std::optional<Tensor> &scales, const Tensor &block_table,
                    const Tensor &lengths, const std::optional<Tensor> &starts)
{
    const char *op = "decoder_step";
    const Hidden x(op, x_in);
    const Angles angles(op, cosine, sine, x);
    const Arena arena(op, pages, scales, block_table, lengths, starts, x.B);
    Reader reader(op, weights, layout, numbers);
    STD_TORCH_CHECK(arena.layers == reader.blocks(), op, ": an arena of ", arena.layers, " layers for ",
                    reader.blocks(), " blocks");
    std::vector<Block> blocks;
    blocks.reserve(static_cast<size_t>(arena.layers));
    for (int64_t i = 0; i < arena.layers; i++) { /* all of it before anything is stored */
        const Block &block = blocks.emplace_back(reader.read(x.E));
        angles.check(op, block);
        STD_TORCH_CHECK(pages.size(3) == block.G && pages.size(5) == block.D, op, ": pages of ",
                        pages.size(3), " heads of ", pages.size(5), " for a block of ", block.G, " of ",
                        block.D);
    }
    reader.end();
    arena.check(x.T);
    Result y(x, {x.B, x.T, x.E});
    for (int64_t i = 0; x.M && i < arena.layers; i++) {
        const Block &block = blocks[static_cast<size_t>(i)];
        const Pages cache = arena.layer(i, block.window);
        const int64_t width = block.H * block.D, kv_width = block.G * block.D;
        const float *in = i ? y.rows : x.rows;
        const Temporary<float> attention(x.M * width), q(x.M * width), k(x.M * kv_width),
            v(x.M * kv_width);
        block.qkv(in, x.M, angles.rotation, q, k, v);
        append(cache, k, v, kv_width, x.T);
        {
            Scratch scratch(Attention::bytes(cache, x.T, block.H));
            attend(Attention(cache, q, width, x.T, block.H, block.softmax_scale, attention, width, scratch));
        }
        block.out(in, attention, x.M, y.rows);
    }
    return y.rounded();
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpu_poor, m)
{
    m.def("decoder_step(Tensor x, Tensor[] weights, Tensor layout, Tensor numbers, Tensor? cos, "
          "Tensor? sin, Tensor(a!) pages, Tensor(b!)? scales, Tensor block_table, Tensor lengths, "
          "Tensor? starts) -> Tensor");
    m.def("decoder_qkv(Tensor x, Tensor[] weights, Tensor layout, Tensor numbers, Tensor? cos, "
          "Tensor? sin, int heads, int kv_heads, int head_dim) -> (Tensor, Tensor, Tensor)");
    m.def("decoder_out(Tensor x, Tensor attention, Tensor[] weights, Tensor layout, Tensor numbers)"
          " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpu_poor, CPU, m)
{
    m.impl("decoder_step", TORCH_BOX(&decoder_step));
    m.impl("decoder_qkv", TORCH_BOX(&decoder_qkv));
    m.impl("decoder_out", TORCH_BOX(&decoder_out));
}
