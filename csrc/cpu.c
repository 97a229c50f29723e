/* SPDX-License-Identifier: MIT
 * What the CPU, the operating system and the container allow. */
#define _GNU_SOURCE /* syscall, under -std=c11 */
#include "gpu_poor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static uint64_t xgetbv0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Linux hands the 8 KB of tile state to a process only on request, and a container may refuse:
 * arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
static int amx_permitted(void)
{
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

unsigned gp_cpu_features(void)
{
    unsigned a, b, c, d, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    int osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return 0;
    uint64_t xcr0 = xgetbv0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if ((xcr0 & 0x6) == 0x6 && (b >> 5 & 1) && fma && f16c) features |= GP_CPU_AVX2;
    unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    if ((features & GP_CPU_AVX2) && (xcr0 & 0xe6) == 0xe6 && (b & avx512) == avx512 &&
        (c >> 11 & 1))
        features |= GP_CPU_AVX512_VNNI;
    unsigned leaf1, ignored;
    if ((features & GP_CPU_AVX512_VNNI) && __get_cpuid_count(7, 1, &leaf1, &ignored, &ignored, &ignored) &&
        (leaf1 >> 5 & 1))
        features |= GP_CPU_AVX512_BF16;
    if ((features & GP_CPU_AVX512_VNNI) && (xcr0 & 0x60000) == 0x60000 && (d >> 24 & 1) &&
        (d >> 25 & 1) && amx_permitted())
        features |= GP_CPU_AMX;
#ifdef GPU_POOR_EMULATE_TILES /* needs no more than the vectors of those kernels */
    if (features & GP_CPU_AVX512_VNNI) features |= GP_CPU_AMX;
#endif
    return features;
}
#else
unsigned gp_cpu_features(void) { return 0; }
#endif
