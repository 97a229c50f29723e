/* SPDX-License-Identifier: MIT
 * The table of kernels: the reference first, each faster implementation overriding what it has. */
#include <string.h>

#include "gpu_poor.h"

#define GP_IMPL(name) extern const gp_impl gp_impl_##name;
#include "impls.h"
#undef GP_IMPL

static const gp_impl *const impls[] = {
#define GP_IMPL(name) &gp_impl_##name,
#include "impls.h"
#undef GP_IMPL
};
enum { N_IMPLS = sizeof(impls) / sizeof(impls[0]) };

gp_impl gp;

static const char *const kernel_names[] = {
#define GP_NAME(name, type, args) #name,
    GP_KERNELS(GP_NAME)
#undef GP_NAME
};
enum { N_KERNELS = sizeof(kernel_names) / sizeof(kernel_names[0]) };
static const char *served_by[N_KERNELS];

static unsigned features(void)
{
    static unsigned cached = ~0u;
    if (cached == ~0u) cached = gp_cpu_features();
    return cached;
}

/* Every level needs the ones below it; a line of a level may need more than its other lines. */
static int usable(int i) { return (impls[i]->needs & ~features()) == 0; }

/* The i-th instruction set: the first of its lines. */
static const gp_impl *level(int i)
{
    for (int k = 0; k < N_IMPLS; k++)
        if (usable(k) && (k == 0 || strcmp(impls[k]->name, impls[k - 1]->name)) && i-- == 0)
            return impls[k];
    return NULL;
}

int gp_available(void)
{
    int n = 0;
    while (level(n)) n++;
    return n;
}

const char *gp_available_isa(int i) { return level(i) ? level(i)->name : NULL; }

int gp_set_isa(const char *name)
{
    int last = -1;
    for (int i = 0; i < N_IMPLS; i++)
        if (usable(i) && (!name || strcmp(impls[i]->name, name) == 0)) last = i;
    if (last < 0) return -1;
    gp_impl table = *impls[0];
    for (int i = 0; i <= last; i++) {
        int k = 0;
        if (!usable(i)) continue;
        table.name = impls[i]->name;
#define GP_MERGE(kernel, type, args)                                                              \
        if (impls[i]->kernel) table.kernel = impls[i]->kernel, served_by[k] = impls[i]->name;     \
        k++;
        GP_KERNELS(GP_MERGE)
#undef GP_MERGE
        if (impls[i]->int8_linear) table.pack_min_rows = impls[i]->pack_min_rows;
        if (impls[i]->gram_pairs) table.fast_pairs = impls[i]->fast_pairs;
    }
    gp = table;
    return 0;
}

int gp_kernel(int i, const char **kernel, const char **impl)
{
    if (i < 0 || i >= N_KERNELS) return -1;
    *kernel = kernel_names[i];
    *impl = served_by[i];
    return 0;
}
