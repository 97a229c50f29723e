/* SPDX-License-Identifier: MIT
 * Every implementation, slowest instruction set first; adding one is one file and one line here.
 * Several families of kernels may have a line each for the same instruction set. */
GP_IMPL(int8_ref)
GP_IMPL(grouped_ref)
GP_IMPL(grouped_quantize_ref)
GP_IMPL(stats_ref)
GP_IMPL(decoder_ref)
GP_IMPL(attention_ref)
#if defined(__x86_64__)
GP_IMPL(int8_avx2)
GP_IMPL(grouped_avx2)
GP_IMPL(grouped_quantize_avx2)
GP_IMPL(stats_avx2)
GP_IMPL(decoder_avx2)
GP_IMPL(attention_avx2)
GP_IMPL(int8_avx512_vnni)
GP_IMPL(grouped_avx512_vnni)
GP_IMPL(grouped_quantize_avx512)
GP_IMPL(stats_avx512)
GP_IMPL(decoder_avx512)
GP_IMPL(attention_avx512)
GP_IMPL(int8_amx)
#endif
