/* SPDX-License-Identifier: MIT
 * The rows of decoder_template.h for any CPU. */
#define NAME(name) name##_ref
#define TARGET
#include "decoder_template.h"

const gp_impl gp_impl_decoder_ref = {
    .name = "ref",
    .rms_norm_row = rms_norm_row_ref,
    .layer_norm_row = layer_norm_row_ref,
    .rotary_row = rotary_row_ref,
    .activate_row = activate_row_ref,
};
