/* SPDX-License-Identifier: MIT
 *
 * The stored weights as operators receive them, and the activations as kernels read them.
 */
#ifndef GPU_POOR_OPS_WEIGHTS_H
#define GPU_POOR_OPS_WEIGHTS_H

#include "ops/common.h"

namespace gpu_poor {

/* int8 weight [..., K] and its float32 scales [...]; or, of [..., N, K], scales and offsets
 * [..., 2, N]. */
inline void check_weight(const char *op, const Tensor &weight, const Tensor &scale)
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

inline int64_t panels_of(int64_t n) { return (n + GP_PANEL_ROWS - 1) / GP_PANEL_ROWS; }

inline void check_group(const char *op, int64_t group)
{
    STD_TORCH_CHECK(group >= GP_BLOCK && group <= GP_GROUP_MAX &&
                        group % GP_BLOCK == 0,
                    op, ": group must be 32, 64, 96 or 128, got ", group);
}

inline int64_t bits_of(const Tensor &panels) { return panels.size(2) / GP_BLOCK_BYTES(1); }

/* Panels int8 [P, B, 256 or 512], of 4 or 8 bits, and scales float16 [P, groups, 1 or 2, 16] of a weight [N, K]. */
inline void check_grouped_weight(const char *op, const Tensor &weight, const Tensor &scale, int64_t group,
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

inline gp_grouped_weight grouped_weight(const Tensor &weight, const Tensor &scale, int64_t group, int64_t K)
{
    return {K, group, static_cast<int>(bits_of(weight)), scale.size(2) == 2,
            static_cast<const uint8_t *>(weight.data_ptr()),
            static_cast<const uint16_t *>(scale.data_ptr())};
}

/* x as float32 rows of K_pad, zero beyond K; x itself where it has that form. */
inline const float *float_rows(const Tensor &x, gp_dtype type, int64_t M, int64_t K, int64_t K_pad,
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
inline double row_cost(int64_t K, int64_t rows) { return static_cast<double>(K) * (1 + rows / 4); }

inline void check_linear(const char *op, const Tensor &x, int64_t activation_bits)
{
    STD_TORCH_CHECK(x.is_cpu(), op, ": all tensors must be on one device");
    STD_TORCH_CHECK(activation_bits == 8 || activation_bits == 16 || activation_bits == 32, op,
                    ": activation_bits must be 8, 16 or 32, got ", activation_bits);
}

} // namespace gpu_poor

#endif
