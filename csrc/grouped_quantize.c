/* SPDX-License-Identifier: MIT
 * The search of grouped_quantize_template.h for any CPU. */
#define NAME(name) name##_ref
#define TARGET
#include "grouped_quantize_template.h"

const gp_impl gp_impl_grouped_quantize_ref = {
    .name = "ref",
    .grouped_quantize_panel = grouped_quantize_panel_ref,
    .gptq_panel = gptq_panel_ref,
};
