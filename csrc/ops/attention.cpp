/* SPDX-License-Identifier: MIT
 * Operators of the cache in pages: append, attention, gather. */
#include "ops/attention.h"

#include <cmath>

#include "../attention.h"
#include "ops/weights.h"

namespace gpu_poor {

/* Only the pages themselves may lie apart. */
static bool dense_pages(const Tensor &t)
{
    int64_t stride = 1;
    for (int64_t i = t.dim() - 1; i > 0; i--) {
        if (t.size(i) != 1 && t.stride(i) != stride) return false;
        stride *= t.size(i);
    }
    return t.size(0) <= 1 || t.stride(0) >= stride;
}

void check_layout(const char *op, const gp_pages &layer)
{
    STD_TORCH_CHECK(layer.type != GP_I8 || (layer.page_size % GP_SLOTS == 0 && layer.D % 4 == 0), op,
                    ": int8 pages need a page_size that is a multiple of ", GP_SLOTS,
                    " and a head_dim that is one of 4, got ", layer.page_size, " and ", layer.D);
}

static gp_pages layer_of(const char *op, const Tensor &pages, const std::optional<Tensor> &scales)
{
    STD_TORCH_CHECK(pages.dim() == 5 && pages.size(1) == 2 && pages.is_cpu(), op,
                    ": pages must be [n, 2, kv_heads, page_size, D], got ", shape_of(pages));
    const bool int8 = pages.scalar_type() == ScalarType::Char;
    const int64_t heads = pages.size(2), size = pages.size(3), D = pages.size(4);
    STD_TORCH_CHECK(heads >= 1 && size >= 1 && D >= 1 && D <= GP_HEAD_DIM_MAX, op,
                    ": head_dim must be 1 to ", GP_HEAD_DIM_MAX, ", and no size 0, got ",
                    shape_of(pages));
    STD_TORCH_CHECK(dense_pages(pages), op, ": each page must be contiguous, got strides that aren't");
    bool fits = int8 == scales.has_value();
    if (fits && scales) {
        fits = scales->scalar_type() == ScalarType::Half && scales->dim() == 4 &&
               dense_pages(*scales) && scales->is_cpu();
        for (int64_t i = 0; fits && i < 4; i++) fits = scales->size(i) == pages.size(i);
    }
    STD_TORCH_CHECK(fits, op, ": int8 pages need float16 scales [n, 2, kv_heads, page_size], others none");
    gp_dtype type = int8 ? GP_I8 : float_type(pages.scalar_type(), op, "pages");
    const gp_pages layer = {type, heads, D, size, pages.data_ptr(), pages.stride(0),
                            scales ? static_cast<uint16_t *>(scales->data_ptr()) : nullptr,
                            scales ? scales->stride(0) : 0};
    check_layout(op, layer);
    return layer;
}

static const int32_t *integers(const char *op, const char *name, const Tensor &t, int64_t dim, int64_t batch)
{
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == dim && t.size(0) == batch &&
                        t.is_contiguous() && t.is_cpu(),
                    op, ": ", name, " must be a contiguous int32 ", dim == 1 ? "[B]" : "[B, max_pages]",
                    " with B = ", batch, ", got ", shape_of(t));
    return static_cast<const int32_t *>(t.data_ptr());
}

Pages pages_of(const char *op, const Tensor &pages, const std::optional<Tensor> &scales,
               const Tensor &block_table, int64_t batch)
{
    Pages p = {};
    p.layer = layer_of(op, pages, scales);
    p.n_pages = pages.size(0);
    p.batch = batch;
    p.block_table = integers(op, "block_table", block_table, 2, batch);
    p.table_stride = block_table.size(1);
    return p;
}

void check_pages(const char *op, const Pages &pages, int64_t T, bool appends)
{
    const int64_t size = pages.layer.page_size;
    for (int64_t b = 0; b < pages.batch; b++) {
        const int64_t length = pages.lengths[b], end = length + T;
        STD_TORCH_CHECK(length >= 0 && end <= pages.table_stride * size, op, ": sequence ", b, " has ",
                        length, " + ", T, " tokens, its block table room for ",
                        pages.table_stride * size);
        STD_TORCH_CHECK(pages.start(b) >= 0 && pages.start(b) <= end, op, ": sequence ", b, " of ",
                        end, " tokens can't start at ", pages.start(b));
        const int64_t begin = appends ? length : pages.visible_from(b, length);
        for (int64_t i = begin / size; i * size < end; i++) {
            const int32_t page = pages.block_table[b * pages.table_stride + i];
            STD_TORCH_CHECK(page >= 0 && page < pages.n_pages, op, ": sequence ", b, " has page ",
                            page, " of ", pages.n_pages);
        }
    }
}

void append(const Pages &pages, const float *k, const float *v, int64_t stride, int64_t T)
{
    const gp_pages &layer = pages.layer;
    const int64_t heads = layer.kv_heads, D = layer.D, size = gp_size(layer.type);
    parallel(pages.batch * T * 2, 1, static_cast<double>(heads * D * 4),
             [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; i++) {
                     const int64_t token = i / 2, b = token / T, slot = pages.lengths[b] + token % T;
                     const int part = i % 2;
                     const float *x = (part ? v : k) + token * stride;
                     const float *shift = part ? nullptr : pages.shift;
                     float centered[GP_HEAD_DIM_MAX];
                     for (int64_t g = 0; g < heads; g++) {
                         const gp_place at = gp_slot(&layer, pages.table(b), part, g, slot);
                         const float *row = x + g * D;
                         if (shift) {
                             for (int64_t d = 0; d < D; d++) centered[d] = row[d] - shift[g * D + d];
                             row = centered;
                         }
                         if (layer.type == GP_I8) {
                             int8_t q[GP_HEAD_DIM_MAX];
                             layer.scales[at.scale] = gp.page_store_row(row, D, GP_I8, q);
                             for (int64_t d = 0; d < D; d++) gp_set_byte(&layer, part, at, d, q[d]);
                         } else {
                             gp.page_store_row(row, D, layer.type,
                                               static_cast<char *>(layer.pages) + at.row * size);
                         }
                     }
                 }
             });
}

/* Up to so many tokens are few, and a block is at least so many rows: what a chunk's keys and values are read
 * for once, from the second cache. */
constexpr int64_t kFewTokens = 8, kBlockRows = 64;

Attention::Range Attention::chunks(const Pages &pages, int64_t b, int64_t first, int64_t n)
{
    const int64_t start = pages.start(b), slot = pages.lengths[b] + first;
    const int64_t begin = pages.visible_from(b, slot), end = slot + n;
    if (end <= begin) return {0, 0};
    return {(begin - start) / GP_CHUNK, (end - start + GP_CHUNK - 1) / GP_CHUNK};
}

size_t Attention::bytes(const Pages &pages, int64_t T, int64_t heads)
{
    if (T > kFewTokens) return 0;
    const int64_t kv_heads = pages.layer.kv_heads;
    int64_t chunks_of_all = 0;
    for (int64_t b = 0; b < pages.batch; b++) chunks_of_all += chunks(pages, b, 0, T).size();
    return Scratch::bytes<int64_t>(pages.batch + 1) +
           Scratch::bytes<std::atomic<int64_t>>(pages.batch * kv_heads) +
           Scratch::bytes<float>(chunks_of_all * T * heads * GP_PARTIAL(pages.layer.D));
}

Attention::Attention(const Pages &pages, const float *q, int64_t q_stride, int64_t T, int64_t heads,
                     float softmax_scale, float *out, int64_t out_stride, Scratch &scratch)
    : pages_(pages), q_(q), out_(out), q_stride_(q_stride), out_stride_(out_stride), T_(T),
      rows_(heads / pages.layer.kv_heads), scale_(softmax_scale * static_cast<float>(M_LOG2E)),
      block_(std::max<int64_t>(1, kBlockRows / rows_)), blocks_((T + block_ - 1) / block_)
{
    if (T > kFewTokens) return;
    const int64_t kv_heads = pages.layer.kv_heads;
    first_ = scratch.take<int64_t>(pages.batch + 1);
    left_ = scratch.take<std::atomic<int64_t>>(pages.batch * kv_heads);
    first_[0] = 0;
    for (int64_t b = 0; b < pages.batch; b++) {
        const int64_t n = chunks(b, 0, T).size();
        first_[b + 1] = first_[b] + kv_heads * n;
        for (int64_t g = 0; g < kv_heads; g++) {
            new (left_ + b * kv_heads + g) std::atomic<int64_t>(n);
            if (n == 0) block(b, g, 0, T); /* nothing is visible: zeros */
        }
    }
    partial_ = scratch.take<float>(tasks() * T * row_floats());
}

int64_t Attention::tasks() const
{
    return T_ > kFewTokens ? pages_.batch * pages_.layer.kv_heads * blocks_ : first_[pages_.batch];
}

double Attention::bytes_per_task() const
{
    const gp_pages &layer = pages_.layer;
    if (tasks() == 0) return 0;
    double slots = 0;
    for (int64_t b = 0; b < pages_.batch; b++) {
        const int64_t length = pages_.lengths[b];
        slots += static_cast<double>(length + T_ - pages_.visible_from(b, length));
    }
    return slots * static_cast<double>(layer.kv_heads * 2 * layer.D * gp_size(layer.type) * T_) /
           static_cast<double>(tasks());
}

void Attention::run(int64_t task) const
{
    const int64_t kv_heads = pages_.layer.kv_heads;
    if (T_ > kFewTokens) {
        /* Late tokens see more: the blocks of a head alternate from its two ends, so that any half of the
         * tasks is half of the work. */
        const int64_t i = task % blocks_, first = (i % 2 ? blocks_ - 1 - i / 2 : i / 2) * block_;
        return block(task / blocks_ / kv_heads, task / blocks_ % kv_heads, first, std::min(block_, T_ - first));
    }
    const int64_t b = std::upper_bound(first_, first_ + pages_.batch + 1, task) - first_ - 1;
    const Range range = chunks(b, 0, T_);
    const int64_t n = range.size(), g = (task - first_[b]) / n, size = T_ * row_floats();
    chunk(b, g, 0, T_, range.begin + (task - first_[b]) % n, partial_ + task * size);
    if (left_[b * kv_heads + g].fetch_sub(1) != 1) return;
    float *partial = partial_ + (first_[b] + g * n) * size;
    for (int64_t i = 1; i < n; i++)
        gp.attend_merge(partial, partial + i * size, T_ * rows_, pages_.layer.D);
    finish(b, g, 0, T_, partial);
}

void Attention::block(int64_t b, int64_t g, int64_t first, int64_t n) const
{
    const Range range = chunks(b, first, n);
    const Temporary<float> partial(n * row_floats()), more(n * row_floats());
    /* Without a chunk the first one is empty. */
    chunk(b, g, first, n, range.begin, partial);
    for (int64_t i = range.begin + 1; i < range.end; i++) {
        chunk(b, g, first, n, i, more);
        gp.attend_merge(partial, more, n * rows_, pages_.layer.D);
    }
    finish(b, g, first, n, partial);
}

void Attention::chunk(int64_t b, int64_t g, int64_t first, int64_t n, int64_t chunk, float *partial) const
{
    const int64_t from = pages_.start(b) + chunk * GP_CHUNK, to = from + GP_CHUNK;
    const Temporary<gp_span> seen(n);
    for (int64_t t = 0; t < n; t++) {
        const int64_t slot = pages_.lengths[b] + first + t;
        const int64_t end = std::clamp(slot + 1, from, to);
        seen[t] = {std::min(std::max(from, pages_.visible_from(b, slot)), end), end};
    }
    const gp_attend a = {&pages_.layer, pages_.table(b), g, n, rows_,
                         q_ + (b * T_ + first) * q_stride_ + g * rows_ * pages_.layer.D, q_stride_, scale_,
                         from, seen, pages_.lengths[b] + T_, partial};
    gp.attend_chunk(&a);
}

void Attention::finish(int64_t b, int64_t g, int64_t first, int64_t n, const float *partial) const
{
    const int64_t D = pages_.layer.D;
    for (int64_t t = 0; t < n; t++)
        gp.attend_finish(partial + t * row_floats(), rows_, D,
                         out_ + (b * T_ + first + t) * out_stride_ + g * rows_ * D);
}

void attend(const Attention &attention)
{
    parallel(attention.tasks(), 1, attention.bytes_per_task(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) attention.run(i);
    });
}

} // namespace gpu_poor

namespace {

using namespace gpu_poor;

void check_heads(const char *op, const char *name, const Tensor &x, const gp_pages &layer, bool grouped)
{
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(3) == layer.D &&
                        (grouped ? x.size(2) % layer.kv_heads == 0 && x.size(2) > 0
                                 : x.size(2) == layer.kv_heads),
                    op, ": ", name, " must be [B, T, heads, D] with D = ", layer.D, " and ",
                    grouped ? "a multiple of " : "", layer.kv_heads, " heads, got ", shape_of(x));
}

const float *shift_of(const char *op, const Tensor &shift, const gp_pages &layer)
{
    STD_TORCH_CHECK(shift.scalar_type() == ScalarType::Float && shift.dim() == 2 &&
                        shift.size(0) == layer.kv_heads && shift.size(1) == layer.D &&
                        shift.is_contiguous() && shift.is_cpu(),
                    op, ": shift must be a contiguous float32 [kv_heads, D] = [", layer.kv_heads, ", ",
                    layer.D, "], got ", shape_of(shift));
    return static_cast<const float *>(shift.data_ptr());
}

void paged_append(const Tensor &pages, const std::optional<Tensor> &scales, const Tensor &k_in,
                  const Tensor &v_in, const Tensor &block_table, const Tensor &lengths,
                  const std::optional<Tensor> &shift)
{
    const char *op = "paged_append";
    Pages p = pages_of(op, pages, scales, block_table, k_in.dim() ? k_in.size(0) : 0);
    check_heads(op, "k", k_in, p.layer, false);
    check_heads(op, "v", v_in, p.layer, false);
    STD_TORCH_CHECK(v_in.size(0) == k_in.size(0) && v_in.size(1) == k_in.size(1), op,
                    ": k and v differ: ", shape_of(k_in), ", ", shape_of(v_in));
    p.lengths = integers(op, "lengths", lengths, 1, p.batch);
    if (shift) p.shift = shift_of(op, *shift, p.layer);
    gp_dtype k_type = float_type(k_in.scalar_type(), op, "k");
    gp_dtype v_type = float_type(v_in.scalar_type(), op, "v");
    const int64_t T = k_in.size(1), stride = p.layer.kv_heads * p.layer.D;
    if (p.batch * T == 0) return;
    check_pages(op, p, T, true);
    Tensor k = dense(k_in), v = dense(v_in);
    Scratch scratch(2 * Scratch::bytes<float>(p.batch * T * stride));
    const float *keys = float_rows(k, k_type, p.batch * T, stride, stride, scratch);
    const float *values = float_rows(v, v_type, p.batch * T, stride, stride, scratch);
    append(p, keys, values, stride, T);
}

Tensor paged_attention(const Tensor &q_in, const Tensor &pages, const std::optional<Tensor> &scales,
                       const Tensor &block_table, const Tensor &lengths_after,
                       const std::optional<Tensor> &starts, double softmax_scale, int64_t window)
{
    const char *op = "paged_attention";
    Pages p = pages_of(op, pages, scales, block_table, q_in.dim() ? q_in.size(0) : 0);
    check_heads(op, "q", q_in, p.layer, true);
    STD_TORCH_CHECK(window >= 0, op, ": window must be >= 0, got ", window);
    gp_dtype type = float_type(q_in.scalar_type(), op, "q");
    const int64_t T = q_in.size(1), H = q_in.size(2), D = p.layer.D, stride = H * D;
    const int32_t *after = integers(op, "lengths", lengths_after, 1, p.batch);
    if (starts) p.starts = integers(op, "starts", *starts, 1, p.batch);
    p.window = window;
    Tensor y = new_tensor({p.batch, T, H, D}, q_in.scalar_type());
    if (p.batch * T == 0) return y;
    std::vector<int32_t> lengths(after, after + p.batch);
    for (int32_t &n : lengths) n -= static_cast<int32_t>(T);
    p.lengths = lengths.data();
    check_pages(op, p, T, false);
    Tensor q = dense(q_in);
    const int64_t M = p.batch * T;
    Scratch scratch(2 * Scratch::bytes<float>(M * stride) + Attention::bytes(p, T, H));
    const float *rows = float_rows(q, type, M, stride, stride, scratch);
    float *out = type == GP_F32 ? static_cast<float *>(y.data_ptr()) : scratch.take<float>(M * stride);
    attend(Attention(p, rows, stride, T, H, static_cast<float>(softmax_scale), out, stride, scratch));
    if (type != GP_F32) gp.page_store_row(out, M * stride, type, y.data_ptr());
    return y;
}

std::tuple<Tensor, Tensor> paged_gather(const Tensor &pages, const std::optional<Tensor> &scales,
                                        const Tensor &block_table, int64_t length, ScalarType dtype,
                                        int64_t first)
{
    const char *op = "paged_gather";
    Pages p = pages_of(op, pages, scales, block_table, block_table.dim() ? block_table.size(0) : 0);
    gp_dtype type = float_type(dtype, op, "dtype");
    const gp_pages &layer = p.layer;
    const int64_t heads = layer.kv_heads, D = layer.D;
    STD_TORCH_CHECK(0 <= first && first <= length, op, ": slots ", first, " to ", length,
                    " can't be gathered");
    std::vector<int32_t> lengths(static_cast<size_t>(p.batch), static_cast<int32_t>(first));
    p.lengths = lengths.data();
    check_pages(op, p, length - first, true);
    Tensor out[2];
    for (Tensor &t : out) t = new_tensor({p.batch, heads, length, D}, dtype);
    const int64_t out_bytes = D * gp_size(type);
    parallel(2 * p.batch * heads * length, layer.page_size, static_cast<double>(out_bytes),
             [&](int64_t begin, int64_t end) {
        float row[GP_HEAD_DIM_MAX];
        for (int64_t i = begin; i < end; i++) {
            const int64_t slot = i % length, g = i / length % heads, b = i / length / heads % p.batch;
            const int part = static_cast<int>(i / length / heads / p.batch);
            char *y = static_cast<char *>(out[part].data_ptr()) +
                      ((b * heads + g) * length + slot) * out_bytes;
            if (slot < first) {
                std::memset(y, 0, static_cast<size_t>(out_bytes));
                continue;
            }
            const gp_place at = gp_slot(&layer, p.table(b), part, g, slot);
            const char *in = static_cast<const char *>(layer.pages) + at.row * gp_size(layer.type);
            if (layer.type == GP_I8) {
                int8_t q[GP_HEAD_DIM_MAX];
                for (int64_t d = 0; d < D; d++)
                    q[d] = static_cast<int8_t>(gp_get_byte(&layer, part, at, d));
                gp.int8_dequantize_row(q, gp_f16_to_float(layer.scales[at.scale]), 0, D, y, type);
            } else if (layer.type == type) {
                std::memcpy(y, in, static_cast<size_t>(out_bytes));
            } else {
                gp.to_float_row(in, layer.type, D, row);
                gp.page_store_row(row, D, type, y);
            }
        }
    });
    return {out[0], out[1]};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpu_poor, m)
{
    m.def("paged_append(Tensor(a!) pages, Tensor(b!)? scales, Tensor k, Tensor v, "
          "Tensor block_table, Tensor lengths, Tensor? shift) -> ()");
    m.def("paged_attention(Tensor q, Tensor pages, Tensor? scales, Tensor block_table, "
          "Tensor lengths, Tensor? starts, float softmax_scale, int window) -> Tensor");
    m.def("paged_gather(Tensor pages, Tensor? scales, Tensor block_table, int length, "
          "ScalarType dtype, int first) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gpu_poor, CPU, m)
{
    m.impl("paged_append", TORCH_BOX(&paged_append));
    m.impl("paged_attention", TORCH_BOX(&paged_attention));
    m.impl("paged_gather", TORCH_BOX(&paged_gather));
}
