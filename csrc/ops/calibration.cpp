/* SPDX-License-Identifier: MIT
 * Operators of calibration: statistics of channels, Gram matrices, GPTQ. */
#include "ops/weights.h"

namespace {

using namespace gpu_poor;

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
    /* So many tokens at a time stay in the caches. */
    constexpr int64_t kTokens = 1024, kWidth = GP_GRAM_WIDTH;
    const bool pairs = type == GP_BF16 && gp.fast_pairs;
    const int64_t panels = (K + kWidth - 1) / kWidth, size = gp_size(type);
    Scratch scratch(Scratch::bytes<float>(panels * kWidth * std::min(M, kTokens)));
    float *packed = scratch.take<float>(panels * kWidth * std::min(M, kTokens));
    float *out = static_cast<float *>(acc.data_ptr());
    for (int64_t m0 = 0; m0 < M; m0 += kTokens) {
        const int64_t m = std::min(kTokens, M - m0), steps = pairs ? (m + 1) / 2 : m;
        const char *in = static_cast<const char *>(x.data_ptr()) + m0 * K * size;
        parallel(panels, 1, static_cast<double>(kWidth * m * 4), [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; p++) {
                const int64_t columns = std::min(kWidth, K - p * kWidth);
                const char *from = in + p * kWidth * size;
                float *to = packed + p * steps * kWidth;
                if (columns < kWidth || pairs)
                    std::memset(to, 0, static_cast<size_t>(steps * kWidth) * 4);
                for (int64_t i = 0; i < m; i++, from += K * size) {
                    if (!pairs) {
                        gp.to_float_row(from, type, columns, to + i * kWidth);
                        continue;
                    }
                    const uint16_t *row = reinterpret_cast<const uint16_t *>(from);
                    uint16_t *y = reinterpret_cast<uint16_t *>(to + i / 2 * kWidth) + i % 2;
                    for (int64_t c = 0; c < columns; c++) y[2 * c] = row[c];
                }
            }
        });
        const auto strip = [&](int64_t p) {
            if (pairs)
                gp.gram_pairs(reinterpret_cast<uint16_t *>(packed), m, K, p, p + 1, out);
            else
                gp.gram(packed, m, K, p, p + 1, out);
        };
        /* The first panel of rows meets all panels, the last one only itself: each item takes one from
         * the top and its mirror from the bottom, which together are as much work as any other two. */
        parallel((panels + 1) / 2, 1, static_cast<double>(kWidth * K * m / 8),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; i++) {
                         strip(i);
                         if (panels - 1 - i != i) strip(panels - 1 - i);
                     }
                 });
    }
    parallel(panels, 1, static_cast<double>(kWidth * K * 4), [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++)
            for (int64_t j = 0; j < p * kWidth; j++)
                for (int64_t i = p * kWidth; i < std::min((p + 1) * kWidth, K); i++)
                    out[i * K + j] = out[j * K + i];
    });
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

STABLE_TORCH_LIBRARY_FRAGMENT(gpu_poor, m)
{
    m.def("channel_stats(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("gram_(Tensor(a!) acc, Tensor x) -> ()");
    m.def("gptq(Tensor weight, Tensor gram, Tensor factor, int group, int low, int high, "
          "bool asymmetric, bool half_scales, int sweeps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gpu_poor, CPU, m)
{
    m.impl("channel_stats", TORCH_BOX(&channel_stats));
    m.impl("gram_", TORCH_BOX(&gram_));
    m.impl("gptq", TORCH_BOX(&gptq));
}
