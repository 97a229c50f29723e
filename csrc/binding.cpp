/* SPDX-License-Identifier: MIT
 *
 * The torch operators gpu_poor::* over libtorch's stable C++ ABI: check everything once, allocate,
 * split the work over torch's own threads, call the C kernels. Nothing throws inside a parallel
 * region. The only C++ here: torch's headers are not valid C.
 */
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gpu_poor.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor &t)
{
    std::string s = "[";
    for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
    return s + "]";
}

gp_dtype float_type(ScalarType type, const char *op, const char *argument)
{
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half,
                    op, ": ", argument, " must be float32, bfloat16 or float16");
    return type == ScalarType::Float ? GP_F32 : type == ScalarType::BFloat16 ? GP_BF16 : GP_F16;
}

Tensor dense(const Tensor &t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor new_tensor(const std::vector<int64_t> &sizes, ScalarType type)
{
    return torch::stable::empty(sizes, type);
}

std::vector<int64_t> leading(const Tensor &t)
{
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < t.dim(); i++) sizes.push_back(t.size(i));
    return sizes;
}

int64_t product(const std::vector<int64_t> &sizes)
{
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
}

/* int8 weight [..., K] and its float32 scales [...]; or, of [..., N, K], scales and offsets
 * [..., 2, N]. */
void check_weight(const char *op, const Tensor &weight, const Tensor &scale)
{
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() >= 1, op,
                    ": weight must be int8 [..., K], got shape ", shape_of(weight));
    const int64_t rows = weight.dim() - 1;
    const bool offsets = rows >= 1 && scale.dim() == rows + 1;
    bool fits = scale.scalar_type() == ScalarType::Float && (offsets || scale.dim() == rows);
    for (int64_t i = 0; fits && i < scale.dim(); i++) {
        const int64_t last = offsets && i == rows;
        fits = scale.size(i) == (offsets && i == rows - 1 ? 2 : weight.size(i - last));
    }
    STD_TORCH_CHECK(fits, op, ": scale must be float32, one per row of the weight ",
                    shape_of(weight), ", or one and an offset, got shape ", shape_of(scale));
    STD_TORCH_CHECK(weight.is_cpu() && scale.is_cpu(), op, ": all tensors must be on one device");
}

/* Threads cost a few microseconds to wake: a chunk should be worth more. `unit` keeps the chunks'
 * borders at multiples of it. */
template <class F>
void parallel(int64_t n, int64_t unit, double bytes_per_item, const F &f)
{
    constexpr double kChunkBytes = 64 * 1024;
    int64_t units = (n + unit - 1) / unit;
    int64_t grain = 1 + static_cast<int64_t>(kChunkBytes / (bytes_per_item * unit + 1));
    if (units <= grain) {
        if (n > 0) f(0, n);
        return;
    }
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
        f(begin * unit, end * unit < n ? end * unit : n);
    });
}

/* Memory for one call's temporaries, kept by the calling thread: a fresh large block each time
 * would cost a page fault per 4 KB. Parts are 64-byte aligned. */
class Scratch {
  public:
    explicit Scratch(size_t bytes)
    {
        if (buffer_.size < bytes + 64) {
            buffer_.data.reset(new char[bytes + 64]);
            buffer_.size = bytes + 64;
        }
        next_ = reinterpret_cast<char *>(
            (reinterpret_cast<uintptr_t>(buffer_.data.get()) + 63) & ~uintptr_t{63});
    }
    ~Scratch()
    {
        if (buffer_.size > kKeep) {
            buffer_.data.reset();
            buffer_.size = 0;
        }
    }
    template <class T>
    T *take(int64_t count)
    {
        T *p = reinterpret_cast<T *>(next_);
        next_ += bytes<T>(count);
        return p;
    }
    template <class T>
    static size_t bytes(int64_t count)
    {
        return (static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63};
    }

  private:
    static constexpr size_t kKeep = 32u << 20;
    struct Buffer {
        std::unique_ptr<char[]> data;
        size_t size = 0;
    };
    static thread_local Buffer buffer_;
    char *next_;
};
thread_local Scratch::Buffer Scratch::buffer_;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Tensor ------------------------------------------------------------------------------------- */

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

/* Row numbers of an embedding, each within [0, N). */
class Indices {
  public:
    static Tensor checked(const char *op, const Tensor &ids)
    {
        STD_TORCH_CHECK(ids.is_cpu() && (ids.scalar_type() == ScalarType::Long ||
                                         ids.scalar_type() == ScalarType::Int),
                        op, ": indices must be int64 or int32, on the weight's device");
        return dense(ids);
    }
    Indices(const char *op, const Tensor &ids, int64_t N)
        : ids_(ids.data_ptr()), wide_(ids.scalar_type() == ScalarType::Long)
    {
        for (int64_t i = 0; i < ids.numel(); i++)
            STD_TORCH_CHECK((*this)(i) >= 0 && (*this)(i) < N, op, ": index ", (*this)(i),
                            " is out of range for ", N, " rows");
    }
    int64_t operator()(int64_t i) const
    {
        return wide_ ? static_cast<const int64_t *>(ids_)[i] : static_cast<const int32_t *>(ids_)[i];
    }

  private:
    const void *ids_;
    bool wide_;
};

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

/* Grouped -------------------------------------------------------------------------------------- */

int64_t panels_of(int64_t n) { return (n + GP_PANEL_ROWS - 1) / GP_PANEL_ROWS; }

void check_group(const char *op, int64_t group)
{
    STD_TORCH_CHECK(group >= GP_BLOCK && group <= GP_GROUP_MAX &&
                        group % GP_BLOCK == 0,
                    op, ": group must be 32, 64, 96 or 128, got ", group);
}

int64_t bits_of(const Tensor &panels) { return panels.size(2) / GP_BLOCK_BYTES(1); }

/* Panels int8 [P, B, 256 or 512], of 4 or 8 bits, and scales float16 [P, groups, 1 or 2, 16] of a weight [N, K]. */
void check_grouped_weight(const char *op, const Tensor &weight, const Tensor &scale, int64_t group,
                       int64_t N, int64_t K)
{
    check_group(op, group);
    const int64_t blocks = (K + GP_BLOCK - 1) / GP_BLOCK;
    STD_TORCH_CHECK(N >= 0 && K >= 0 && weight.scalar_type() == ScalarType::Char &&
                        weight.dim() == 3 && weight.size(0) == panels_of(N) &&
                        weight.size(1) == blocks &&
                        (weight.size(2) == GP_BLOCK_BYTES(4) || weight.size(2) == GP_BLOCK_BYTES(8)),
                    op, ": weight must be int8 [", panels_of(N), ", ", blocks,
                    ", 256 or 512] for N = ", N, ", K = ", K, ", got shape ", shape_of(weight));
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Half && scale.dim() == 4 &&
                        scale.size(0) == panels_of(N) &&
                        scale.size(1) == (K + group - 1) / group &&
                        (scale.size(2) == 1 || scale.size(2) == 2) &&
                        scale.size(3) == GP_PANEL_ROWS,
                    op, ": scale must be float16 [", panels_of(N), ", ", (K + group - 1) / group,
                    ", 1 or 2, 16] for groups of ", group, ", got shape ", shape_of(scale));
    STD_TORCH_CHECK(weight.is_cpu() && scale.is_cpu(), op, ": all tensors must be on one device");
}

gp_grouped_weight grouped_weight(const Tensor &weight, const Tensor &scale, int64_t group, int64_t K)
{
    return {K, group, static_cast<int>(bits_of(weight)), scale.size(2) == 2,
            static_cast<const uint8_t *>(weight.data_ptr()),
            static_cast<const uint16_t *>(scale.data_ptr())};
}

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

/* x as float32 rows of K_pad, zero beyond K; x itself where it has that form. */
const float *float_rows(const Tensor &x, gp_dtype type, int64_t M, int64_t K, int64_t K_pad,
                        Scratch &scratch)
{
    if (type == GP_F32 && K == K_pad) return static_cast<const float *>(x.data_ptr());
    float *rows = scratch.take<float>(M * K_pad);
    const char *in = static_cast<const char *>(x.data_ptr());
    const int64_t size = gp_size(type);
    parallel(M, 1, static_cast<double>(K * 4), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            gp.to_float_row(in + m * K * size, type, K, rows + m * K_pad);
            std::memset(rows + m * K_pad + K, 0, static_cast<size_t>(K_pad - K) * 4);
        }
    });
    return rows;
}

/* Bytes a thread moves or multiplies per weight row: what decides whether a second one pays. */
double row_cost(int64_t K, int64_t rows) { return static_cast<double>(K) * (1 + rows / 4); }

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

/* The integer planes of tokens, [M][planes][K_pad], then `after` for ranges of them, in multiples of
 * 16. The calling thread alone does a few tokens: cheaper than a second parallel region. */
template <class F>
void quantize_tokens(const Tensor &x, gp_dtype type, int64_t M, int64_t K, int64_t K_pad, int planes,
                     int8_t *q, float *scale, int32_t *sum, const F &after)
{
    const char *in = static_cast<const char *>(x.data_ptr());
    const int64_t size = gp_size(type);
    parallel(M, 16, static_cast<double>(K * size), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            int8_t *row = q + m * planes * K_pad;
            scale[m] = gp.int8_quantize_row(in + m * K * size, type, K, planes, row, K_pad,
                                            sum + m * planes);
            if (K < K_pad)
                for (int p = 0; p < planes; p++)
                    std::memset(row + p * K_pad + K, 0, static_cast<size_t>(K_pad - K));
        }
        after(begin, end);
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

/* The bias [N] of a linear as float32. */
struct Bias {
    const float *data = nullptr;

    Bias(const char *op, const std::optional<Tensor> &bias, int64_t N)
    {
        if (!bias) return;
        STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == N, op,
                        ": bias must be [N] with N = ", N, ", got ", shape_of(*bias));
        gp_dtype type = float_type(bias->scalar_type(), op, "bias");
        dense_ = dense(*bias);
        data = static_cast<const float *>(dense_->data_ptr());
        if (type == GP_F32) return;
        converted_.reset(new float[static_cast<size_t>(N)]);
        gp.to_float_row(data, type, N, converted_.get());
        data = converted_.get();
    }

  private:
    std::optional<Tensor> dense_;
    std::unique_ptr<float[]> converted_;
};

void check_linear(const char *op, const Tensor &x, int64_t activation_bits)
{
    STD_TORCH_CHECK(x.is_cpu(), op, ": all tensors must be on one device");
    STD_TORCH_CHECK(activation_bits == 8 || activation_bits == 16 || activation_bits == 32, op,
                    ": activation_bits must be 8, 16 or 32, got ", activation_bits);
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

void grouped_integer_linear(const Tensor &x, gp_dtype type, gp_grouped_linear a)
{
    const int64_t K = a.w.K, rows = a.M * a.planes, groups = (K + a.w.group - 1) / a.w.group;
    Scratch scratch(Scratch::bytes<int8_t>(rows * a.K_pad) + Scratch::bytes<float>(a.M) +
                    Scratch::bytes<int32_t>(rows) + Scratch::bytes<int32_t>(a.M * groups));
    int8_t *q = scratch.take<int8_t>(rows * a.K_pad);
    float *scale = scratch.take<float>(a.M);
    int32_t *sum = scratch.take<int32_t>(rows), *group_sums = scratch.take<int32_t>(a.M * groups);
    a.x = q, a.x_scale = scale, a.x_sum = group_sums;
    quantize_tokens(x, type, a.M, K, a.K_pad, a.planes, q, scale, sum,
                    [&](int64_t begin, int64_t end) {
                        for (int64_t m = begin; m < end; m++)
                            gp.grouped_sum_groups(q + m * a.planes * a.K_pad, K, a.K_pad, a.planes,
                                               a.w.group, group_sums + m * groups);
                    });
    parallel(panels_of(a.N), 1, 2.0 * a.w.bits * row_cost(K, rows),
             [&](int64_t begin, int64_t end) { gp.grouped_linear(&a, begin, end); });
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
    const int64_t M = product(sizes), K_pad = round_up(K, GP_K_ALIGN);
    sizes.push_back(N);
    Tensor y = new_tensor(sizes, x.scalar_type());
    const Bias b(op, bias, N);
    if (M == 0 || N == 0) return y;
    const gp_grouped_weight panels = grouped_weight(w, s, group, K);
    if (activation_bits == 32) {
        Scratch scratch(Scratch::bytes<float>(M * K_pad));
        const float *rows = float_rows(x, type, M, K, K_pad, scratch);
        const gp_grouped_float_linear a = {M, N, K_pad, rows, panels, b.data, y.data_ptr(), type};
        parallel(panels_of(N), 1, 2.0 * panels.bits * row_cost(K, 4 * M),
                 [&](int64_t begin, int64_t end) { gp.grouped_float_linear(&a, begin, end); });
    } else {
        /* Not 4096 bytes from row to row: a tile of 16 or 32 would fall into the same few sets of L1. */
        const int64_t stride = K_pad | GP_K_ALIGN;
        grouped_integer_linear(x, type, {M, N, stride, activation_bits == 8 ? 1 : 2, nullptr, nullptr,
                                      nullptr, panels, b.data, y.data_ptr(), type});
    }
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

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_stats(const Tensor &x_in)
{
    STD_TORCH_CHECK(x_in.dim() >= 1, "channel_stats: x must be [..., K], got a scalar");
    STD_TORCH_CHECK(x_in.is_cpu(), "channel_stats: x must be on the CPU");
    gp_dtype type = float_type(x_in.scalar_type(), "channel_stats", "x");
    Tensor x = dense(x_in);
    const int64_t K = x.size(-1), M = product(leading(x));
    Tensor out[4];
    for (Tensor &t : out) t = new_tensor({K}, ScalarType::Float);
    float *absmax = static_cast<float *>(out[0].data_ptr());
    float *min = static_cast<float *>(out[1].data_ptr());
    float *max = static_cast<float *>(out[2].data_ptr());
    float *mean_square = static_cast<float *>(out[3].data_ptr());
    if (M == 0) {
        for (float *p : {absmax, min, max, mean_square}) std::fill(p, p + K, 0.0f);
        return {out[0], out[1], out[2], out[3]};
    }
    Scratch scratch(Scratch::bytes<float>(M * K) + Scratch::bytes<double>(K));
    const float *rows = float_rows(x, type, M, K, K, scratch);
    double *sum_square = scratch.take<double>(K);
    parallel(K, 16, static_cast<double>(4 * M), [&](int64_t begin, int64_t end) {
        gp.channel_stats(rows, M, K, begin, end, absmax, min, max, sum_square);
        for (int64_t k = begin; k < end; k++)
            mean_square[k] = static_cast<float>(sum_square[k] / static_cast<double>(M));
    });
    return {out[0], out[1], out[2], out[3]};
}

void gram_(const Tensor &acc, const Tensor &x_in)
{
    STD_TORCH_CHECK(x_in.dim() >= 1, "gram_: x must be [..., K], got a scalar");
    gp_dtype type = float_type(x_in.scalar_type(), "gram_", "x");
    Tensor x = dense(x_in);
    const int64_t K = x.size(-1), M = product(leading(x));
    STD_TORCH_CHECK(acc.scalar_type() == ScalarType::Float && acc.dim() == 2 &&
                        acc.size(0) == K && acc.size(1) == K && acc.is_contiguous() &&
                        acc.is_cpu() && x.is_cpu(),
                    "gram_: acc must be a contiguous float32 [K, K] with K = ", K, ", got ",
                    shape_of(acc));
    if (M == 0 || K == 0) return;
    Scratch scratch(Scratch::bytes<float>(M * K));
    const float *rows = float_rows(x, type, M, K, K, scratch);
    float *out = static_cast<float *>(acc.data_ptr());
    /* Row i has K - i columns to compute. Each item takes a strip from the top and its mirror from
     * the bottom, which together are as much work as any other pair. */
    constexpr int64_t kStrip = 48; /* a multiple of every implementation's rows per tile */
    const int64_t strips = (K + kStrip - 1) / kStrip;
    /* So many tokens at a time stay in the caches. 4096 tokens of 5632 columns on two Zen 5 cores: 0.92 s
     * in chunks of 1024, 1.54 s all at once, 1.25 s in chunks of 256 (acc is read for each). */
    constexpr int64_t kTokens = 1024;
    for (int64_t m0 = 0; m0 < M; m0 += kTokens) {
        const int64_t m = std::min(kTokens, M - m0);
        auto strip = [&](int64_t i) {
            int64_t end = (i + 1) * kStrip;
            gp.gram(rows + m0 * K, m, K, i * kStrip, end < K ? end : K, out);
        };
        parallel((strips + 1) / 2, 1, static_cast<double>(kStrip * K * m / 8),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; i++) {
                         strip(i);
                         if (strips - 1 - i != i) strip(strips - 1 - i);
                     }
                 });
    }
}

/* Levels int16 [N, K] and float32 [N, groups, 1 or 2] of a weight float32 [N, K]. */
std::tuple<Tensor, Tensor> gptq(const Tensor &weight, const Tensor &gram, const Tensor &factor,
                                int64_t group, int64_t low, int64_t high, bool asymmetric,
                                bool half_scales, int64_t sweeps)
{
    const char *op = "gptq";
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 2 &&
                        weight.is_cpu(),
                    op, ": weight must be float32 [N, K], got shape ", shape_of(weight));
    const int64_t N = weight.size(0), K = weight.size(1);
    for (const Tensor *matrix : {&gram, &factor})
        STD_TORCH_CHECK(matrix->scalar_type() == ScalarType::Float && matrix->dim() == 2 &&
                            matrix->size(0) == K && matrix->size(1) == K && matrix->is_cpu(),
                        op, ": gram and factor must be float32 [K, K] with K = ", K, ", got shape ",
                        shape_of(*matrix));
    STD_TORCH_CHECK(low <= 0 && low < high && high - low <= 255, op,
                    ": levels must be at most 256 and hold 0, got ", low, " to ", high);
    STD_TORCH_CHECK(group >= 1 && (!half_scales || group <= GP_GROUP_MAX), op,
                    ": group must be >= 1, and <= ", GP_GROUP_MAX, " with half_scales, got ", group);
    STD_TORCH_CHECK(!half_scales || high - low == 15 || high - low == 255, op,
                    ": with half_scales there are 16 or 256 levels, got ", low, " to ", high);
    STD_TORCH_CHECK(sweeps >= 0, op, ": sweeps must be >= 0, got ", sweeps);
    Tensor w = dense(weight), h = dense(gram), u = dense(factor);
    const int64_t groups = (K + group - 1) / group, parts = 1 + asymmetric;
    Tensor q = new_tensor({N, K}, ScalarType::Short);
    Tensor scale = new_tensor({N, groups, parts}, ScalarType::Float);
    if (K == 0) return {q, scale};
    const float *in = static_cast<const float *>(w.data_ptr());
    int16_t *out = static_cast<int16_t *>(q.data_ptr());
    float *scales = static_cast<float *>(scale.data_ptr());
    std::atomic<bool> out_of_memory{false};
    parallel(panels_of(N), 1, static_cast<double>(64 * K * K), [&](int64_t begin, int64_t end) {
        const size_t lanes = 16, rows = static_cast<size_t>(4 * K + 2 * groups);
        std::unique_ptr<float[]> memory(new (std::nothrow) float[rows * lanes]);
        if (!memory) {
            out_of_memory = true;
            return;
        }
        float *panel = memory.get(), *levels = panel + K * 16, *scratch = levels + K * 16;
        float *grids = scratch + 2 * K * 16;
        gp_gptq a = {K, group, static_cast<int>(low), static_cast<int>(high), asymmetric,
                     half_scales, static_cast<int>(sweeps),
                     static_cast<const float *>(h.data_ptr()),
                     static_cast<const float *>(u.data_ptr()), panel, levels, grids, scratch};
        for (int64_t p = begin; p < end; p++) {
            const int64_t n0 = 16 * p, n = std::min<int64_t>(16, N - n0);
            for (int64_t k = 0; k < K; k++)
                for (int64_t r = 0; r < 16; r++)
                    panel[k * 16 + r] = r < n ? in[(n0 + r) * K + k] : 0.0f;
            gp.gptq_panel(&a);
            for (int64_t r = 0; r < n; r++) {
                for (int64_t k = 0; k < K; k++)
                    out[(n0 + r) * K + k] = static_cast<int16_t>(levels[k * 16 + r]);
                for (int64_t g = 0; g < groups; g++)
                    for (int64_t i = 0; i < parts; i++)
                        scales[((n0 + r) * groups + g) * parts + i] = grids[(2 * g + i) * 16 + r];
            }
        }
    });
    STD_TORCH_CHECK(!out_of_memory, op, ": out of memory for rows of ", K, " columns");
    return {q, scale};
}

} // namespace

STABLE_TORCH_LIBRARY(gpu_poor, m)
{
    m.def("int8_quantize(Tensor weight) -> (Tensor, Tensor)");
    m.def("int8_dequantize(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor");
    m.def("int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, "
          "int activation_bits) -> Tensor");
    m.def("int8_embedding(Tensor indices, Tensor weight, Tensor scale, ScalarType dtype)"
          " -> Tensor");
    m.def("half_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
    m.def("grouped_quantize(Tensor weight, int group, bool asymmetric, bool search, "
          "Tensor? importance, int bits) -> (Tensor, Tensor)");
    m.def("grouped_dequantize(Tensor weight, Tensor scale, int group, int n, int k, ScalarType dtype)"
          " -> Tensor");
    m.def("grouped_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int group, int n, "
          "int activation_bits) -> Tensor");
    m.def("grouped_embedding(Tensor indices, Tensor weight, Tensor scale, int group, int n, int k, "
          "ScalarType dtype) -> Tensor");
    m.def("channel_stats(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("gram_(Tensor(a!) acc, Tensor x) -> ()");
    m.def("gptq(Tensor weight, Tensor gram, Tensor factor, int group, int low, int high, "
          "bool asymmetric, bool half_scales, int sweeps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gpu_poor, CPU, m)
{
    m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
    m.impl("int8_dequantize", TORCH_BOX(&int8_dequantize));
    m.impl("int8_linear", TORCH_BOX(&int8_linear));
    m.impl("int8_embedding", TORCH_BOX(&int8_embedding));
    m.impl("half_linear", TORCH_BOX(&half_linear));
    m.impl("grouped_quantize", TORCH_BOX(&grouped_quantize));
    m.impl("grouped_dequantize", TORCH_BOX(&grouped_dequantize));
    m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
    m.impl("grouped_embedding", TORCH_BOX(&grouped_embedding));
    m.impl("channel_stats", TORCH_BOX(&channel_stats));
    m.impl("gram_", TORCH_BOX(&gram_));
    m.impl("gptq", TORCH_BOX(&gptq));
}
