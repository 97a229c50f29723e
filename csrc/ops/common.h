/* SPDX-License-Identifier: MIT
 *
 * What every operator gpu_poor::* needs to check its arguments once, allocate, and split its work over
 * torch's own threads, over libtorch's stable C++ ABI. The only C++ here: torch's headers are not valid C.
 */
#ifndef GPU_POOR_OPS_COMMON_H
#define GPU_POOR_OPS_COMMON_H

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
#include "ops/team.h"

namespace gpu_poor {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor &t)
{
    std::string s = "[";
    for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
    return s + "]";
}

inline gp_dtype float_type(ScalarType type, const char *op, const char *argument)
{
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half,
                    op, ": ", argument, " must be float32, bfloat16 or float16");
    return type == ScalarType::Float ? GP_F32 : type == ScalarType::BFloat16 ? GP_BF16 : GP_F16;
}

inline Tensor dense(const Tensor &t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor new_tensor(const std::vector<int64_t> &sizes, ScalarType type)
{
    return torch::stable::empty(sizes, type);
}

inline std::vector<int64_t> leading(const Tensor &t)
{
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < t.dim(); i++) sizes.push_back(t.size(i));
    return sizes;
}

inline int64_t product(const std::vector<int64_t> &sizes)
{
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
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
    const auto run = [&](int64_t begin, int64_t end) {
        f(begin * unit, end * unit < n ? end * unit : n);
    };
    Team::run([&] { Team::loop(units, grain, run); });
}

/* Memory for one call's temporaries, kept by the calling thread: a fresh large block each time
 * would cost a page fault per 4 KB. Parts are 64-byte aligned. Nests: what is made last goes first. */
class Scratch {
  public:
    explicit Scratch(size_t bytes)
    {
        if (depth_ == buffers_.size()) buffers_.emplace_back();
        Buffer &buffer = buffers_[depth_];
        if (buffer.size < bytes + 64) {
            buffer.size = 0;
            buffer.data.reset(new char[bytes + 64]);
            buffer.size = bytes + 64;
        }
        depth_++;
        next_ = reinterpret_cast<char *>(
            (reinterpret_cast<uintptr_t>(buffer.data.get()) + 63) & ~uintptr_t{63});
    }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    ~Scratch()
    {
        Buffer &buffer = buffers_[--depth_];
        if (buffer.size > kKeep) {
            buffer.data.reset();
            buffer.size = 0;
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
    static thread_local std::vector<Buffer> buffers_; /* by depth */
    static thread_local size_t depth_;
    char *next_;
};
inline thread_local std::vector<Scratch::Buffer> Scratch::buffers_;
inline thread_local size_t Scratch::depth_ = 0;

/* An array in scratch memory. */
template <class T>
class Temporary {
  public:
    explicit Temporary(int64_t count)
        : scratch_(Scratch::bytes<T>(count)), data_(scratch_.take<T>(count))
    {
    }
    T *get() const { return data_; }
    operator T *() const { return data_; }

  private:
    Scratch scratch_;
    T *data_;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

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

/* A vector [N], the bias of a linear or another, as float32; nullptr if there is none. */
struct Floats {
    const float *data = nullptr;

    Floats() = default;
    Floats(const char *op, const char *name, const Tensor &t, int64_t N)
    {
        STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == N, op, ": ", name,
                        " must be [N] with N = ", N, ", got ", shape_of(t));
        gp_dtype type = float_type(t.scalar_type(), op, name);
        dense_ = dense(t);
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

inline Floats bias_of(const char *op, const std::optional<Tensor> &bias, int64_t N)
{
    return bias ? Floats(op, "bias", *bias, N) : Floats();
}

} // namespace gpu_poor

#endif
