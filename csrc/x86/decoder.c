/* SPDX-License-Identifier: MIT
 * The rows of decoder_template.h, compiled for AVX2 and AVX-512. */
#if defined(__x86_64__)
#define NAME(name) name##_avx2
#define TARGET GP_TARGET("avx2")
#include "../decoder_template.h"

#define NAME(name) name##_avx512
#define TARGET GP_TARGET("avx2,avx512f,avx512bw,avx512vl,avx512dq")
#include "../decoder_template.h"

const gp_impl gp_impl_decoder_avx2 = {
    .name = "avx2",
    .needs = GP_CPU_AVX2,
    .rms_norm_row = rms_norm_row_avx2,
    .layer_norm_row = layer_norm_row_avx2,
    .rotary_row = rotary_row_avx2,
    .activate_row = activate_row_avx2,
};

const gp_impl gp_impl_decoder_avx512 = {
    .name = "avx512_vnni",
    .needs = GP_CPU_AVX512_VNNI,
    .rms_norm_row = rms_norm_row_avx512,
    .layer_norm_row = layer_norm_row_avx512,
    .rotary_row = rotary_row_avx512,
    .activate_row = activate_row_avx512,
};
#endif
