/* SPDX-License-Identifier: MIT
 * The search of grouped_quantize_template.h, compiled for AVX2 and AVX-512. */
#if defined(__x86_64__)
#define NAME(name) name##_avx2
#define TARGET GP_TARGET("avx2")
#include "../grouped_quantize_template.h"

#define NAME(name) name##_avx512
#define TARGET GP_TARGET("avx2,avx512f,avx512bw,avx512vl,avx512dq")
#include "../grouped_quantize_template.h"

const gp_impl gp_impl_grouped_quantize_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .grouped_quantize_panel = grouped_quantize_panel_avx2,
    .gptq_panel = gptq_panel_avx2,
};

const gp_impl gp_impl_grouped_quantize_avx512 = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .grouped_quantize_panel = grouped_quantize_panel_avx512,
    .gptq_panel = gptq_panel_avx512,
};
#endif
