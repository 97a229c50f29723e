/* SPDX-License-Identifier: MIT
 * Every implementation, slowest first; adding one is one file and one line here. */
GP_IMPL(ref)
#if defined(__x86_64__)
GP_IMPL(avx2)
GP_IMPL(avx512_vnni)
GP_IMPL(amx)
#endif
