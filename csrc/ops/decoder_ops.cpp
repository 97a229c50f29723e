/* SPDX-License-Identifier: MIT
 * Operators of fused decoder blocks: the two halves of one, and whole ones with their cache. */
#include "ops/attention.h"
#include "ops/decoder.h"

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
    if (x.M) Team::run([&] { block.qkv(x.rows, x.M, angles.rotation, q.rows, k.rows, v.rows); });
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
    if (x.M) Team::run([&] { block.out(x.rows, attention.rows, x.M, y.rows); });
    return y.rounded();
}

/* A cache whose pages hold every layer's keys and values: [n, layers, 2, kv_heads, page_size, D]. */
class Arena {
  public:
    Arena(const char *op, const Tensor &arena, const std::optional<Tensor> &scales,
          const std::optional<Tensor> &shift, const Tensor &block_table, const Tensor &lengths,
          const std::optional<Tensor> &starts, int64_t batch)
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
        check_layout(op, layer);
        if (shift) {
            STD_TORCH_CHECK(shift->scalar_type() == ScalarType::Float && shift->dim() == 3 &&
                                shift->size(0) == layers && shift->size(1) == layer.kv_heads &&
                                shift->size(2) == layer.D && shift->is_contiguous() && shift->is_cpu(),
                            op, ": shift must be a contiguous float32 [layers, kv_heads, D], got ",
                            shape_of(*shift));
            first_.shift = static_cast<const float *>(shift->data_ptr());
        }
        first_.n_pages = arena.size(0), first_.batch = batch;
        first_.block_table = static_cast<const int32_t *>(block_table.data_ptr());
        first_.table_stride = block_table.size(1);
        first_.lengths = of_sequences("lengths", lengths);
        if (starts) first_.starts = of_sequences("starts", *starts);
    }
    /* That T more tokens of each sequence have their places, and what layers of such a window see. */
    void check(int64_t T, int64_t window) const
    {
        Pages pages = first_;
        pages.window = window;
        check_pages(op_, pages, T, true);
        check_pages(op_, pages, T, false);
    }
    Pages layer(int64_t i, int64_t window) const
    {
        Pages pages = first_;
        const int64_t rows = i * 2 * pages.layer.kv_heads * pages.layer.page_size;
        pages.layer.pages = static_cast<char *>(pages.layer.pages) +
                            rows * pages.layer.D * gp_size(pages.layer.type);
        if (pages.layer.scales) pages.layer.scales += rows;
        if (pages.shift) pages.shift += i * pages.layer.kv_heads * pages.layer.D;
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

/* How far back any of them sees; 0: to the start. */
int64_t widest(const std::vector<Block> &blocks)
{
    int64_t window = 0;
    for (const Block &block : blocks) {
        if (!block.window) return 0;
        window = std::max(window, block.window);
    }
    return window;
}

Tensor decoder_step(const Tensor &x_in, std::vector<Tensor> weights, const Tensor &layout,
                    const Tensor &numbers, const std::optional<Tensor> &cosine,
                    const std::optional<Tensor> &sine, const Tensor &pages,
                    const std::optional<Tensor> &scales, const std::optional<Tensor> &shift,
                    const Tensor &block_table, const Tensor &lengths,
                    const std::optional<Tensor> &starts, int64_t norm_kind, double norm_eps)
{
    const char *op = "decoder_step";
    const Hidden x(op, x_in);
    const Angles angles(op, cosine, sine, x);
    const Arena arena(op, pages, scales, shift, block_table, lengths, starts, x.B);
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
    /* The norm of what comes has the tensors that are left, and a bias if those are two. */
    const int64_t of_norm = static_cast<int64_t>(weights.size()) - reader.taken();
    const Norm norm(reader, norm_kind, of_norm > 1, static_cast<float>(norm_eps), x.E);
    reader.end();
    arena.check(x.T, widest(blocks));
    Result y(x, {x.B, x.T, x.E});
    Team::run([&] {
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
        if (!norm) return;
        parallel(x.M, 16, 4.0 * static_cast<double>(x.E), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; m++) norm(y.rows + m * x.E, y.rows + m * x.E);
        });
    });
    return y.rounded();
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpu_poor, m)
{
    m.def("decoder_step(Tensor x, Tensor[] weights, Tensor layout, Tensor numbers, Tensor? cos, "
          "Tensor? sin, Tensor(a!) pages, Tensor(b!)? scales, Tensor? shift, Tensor block_table, "
          "Tensor lengths, Tensor? starts, int norm=0, float norm_eps=0.0) -> Tensor");
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
