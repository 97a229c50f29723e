/* SPDX-License-Identifier: MIT
 * The search of int4_quantize_template.h for any CPU. */
#define NAME(name) name##_ref
#define TARGET
#include "int4_quantize_template.h"

const gp_impl gp_impl_int4_quantize_ref = {
    .name = "ref",
    .int4_quantize_panel = int4_quantize_panel_ref,
    .gptq_panel = gptq_panel_ref,
};
