/* SPDX-License-Identifier: MIT
 * What Python asks about the team. */
#include "ops/team.h"

/* Whether our loops run on the calling thread alone just now, because another process has a core. */
extern "C" int gp_alone(void) { return gpu_poor::Stalls::alone(); }
