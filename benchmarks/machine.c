// SPDX-License-Identifier: MIT
// What this machine can do at best: the read-only memory stream and the int8 multiply-add peaks.
//
// The figures of benchmarks/kernels.py are given in % of these, so they are the best of several
// loops: a weak loop here would make every kernel look good. Compiled at run time by machine.py;
// each function carries its own target attribute, and the caller checks the CPU's features.

#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256
#define TARGET(x) __attribute__((target(x), noinline))

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// -- read stream: every loop returns a sum of what it read, so no load can be dropped -------------

// Plain C. What "sum the array" costs; the hardware prefetcher does what it can.
static uint64_t read_plain(const char *p, int64_t n, int64_t distance) {
    uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int64_t i = 0; i + 32 <= n; i += 32) {
        const uint64_t *q = (const uint64_t *)(p + i);
        s0 += q[0], s1 += q[1], s2 += q[2], s3 += q[3];
    }
    (void)distance;
    return s0 + s1 + s2 + s3;
}

// One pass over [p, p+n) as `streams` equal parts read side by side, 256 bytes of each in turn, each
// prefetching `distance` bytes ahead (0: none). Prefetching past the end never faults.
#define READ_LOOP(NAME, TGT, VEC, ZERO, LOAD, ADD, VL, FOLD, HINT)                                  \
    TARGET(TGT) static uint64_t NAME(const char *p, int64_t n, int64_t distance, int streams) {     \
        const int64_t part = n / streams / 256 * 256;                                               \
        VEC a = ZERO, b = ZERO, c = ZERO, d = ZERO;                                                 \
        for (int64_t i = 0; i < part; i += 256)                                                     \
            for (int s = 0; s < streams; s++) {                                                     \
                const char *q = p + s * part + i;                                                   \
                if (distance)                                                                       \
                    for (int l = 0; l < 256; l += 64) _mm_prefetch(q + distance + l, HINT);         \
                for (int l = 0; l < 256; l += 4 * VL) {                                             \
                    a = ADD(a, LOAD((const void *)(q + l)));                                        \
                    b = ADD(b, LOAD((const void *)(q + l + VL)));                                   \
                    c = ADD(c, LOAD((const void *)(q + l + 2 * VL)));                               \
                    d = ADD(d, LOAD((const void *)(q + l + 3 * VL)));                               \
                }                                                                                   \
            }                                                                                       \
        a = ADD(ADD(a, b), ADD(c, d));                                                              \
        return (uint64_t)FOLD(a);                                                                   \
    }

#define FOLD256(v) _mm256_extract_epi64(v, 0)
READ_LOOP(read_avx2, "avx2", __m256i, _mm256_setzero_si256(), _mm256_loadu_si256,
          _mm256_add_epi64, 32, FOLD256, _MM_HINT_T0)
READ_LOOP(read_avx512, "avx512f", __m512i, _mm512_setzero_si512(), _mm512_loadu_si512,
          _mm512_add_epi64, 64, _mm512_reduce_add_epi64, _MM_HINT_T0)
READ_LOOP(read_avx512_nta, "avx512f", __m512i, _mm512_setzero_si512(), _mm512_loadu_si512,
          _mm512_add_epi64, 64, _mm512_reduce_add_epi64, _MM_HINT_NTA)

enum loop { PLAIN, AVX2, AVX512, AVX512_NTA };

static uint64_t read_one(int loop, const char *p, int64_t n, int64_t distance, int streams) {
    switch (loop) {
    case PLAIN: return read_plain(p, n, distance);
    case AVX2: return read_avx2(p, n, distance, streams);
    case AVX512: return read_avx512(p, n, distance, streams);
    default: return read_avx512_nta(p, n, distance, streams);
    }
}

// -- register-only int8 peaks: no loads inside the loop -------------------------------------------

// 16 independent accumulators hide dpbusd's latency (5 cycles, 2 ports). 128 operations each.
// In assembly with named registers: from intrinsics gcc 12 copies and spills the accumulators.
#define VNNI_ACCUMULATORS 16
#define DOT(r) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #r "\n\t"
TARGET("avx512f,avx512vnni") static uint64_t vnni_loop(int64_t n) {
    uint32_t low;
    __asm__ volatile(
        "vpbroadcastd %k2, %%zmm30\n\t"
        "vpbroadcastd %k2, %%zmm31\n\t"
        "1:\n\t" DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7)
        DOT(8) DOT(9) DOT(10) DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)
        "dec %1\n\t"
        "jnz 1b\n\t"
        "vmovd %%xmm0, %k0"
        : "=r"(low), "+r"(n)
        : "r"(0x01020304)
        : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10",
          "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm30", "zmm31", "cc");
    return low;
}

// Static and const on purpose: gcc 12 believes _tile_loadconfig reads 8 bytes, so a configuration
// built on the stack may be stored after the instruction has read it.
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16];
    uint8_t rows[16];
} TILES __attribute__((aligned(64))) = {
    .palette = 1,
    .columns = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

// Tiles 0-3 accumulate (2x2), 4-5 and 6-7 are operands: the register blocking of a real GEMM.
// 16 x 16 x 64 multiply-adds = 32768 operations an instruction.
TARGET("amx-tile,amx-int8") static uint64_t amx_loop(int64_t n) {
    static const int8_t ones[1024] __attribute__((aligned(64))) = {1, 2, 3, 4, 5, 6, 7, 8};
    int32_t out[256] __attribute__((aligned(64)));
    _tile_loadconfig(&TILES);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    for (int64_t i = 0; i < n; i++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, out, 64);
    _tile_release();
    return (uint64_t)(uint32_t)out[0];
}

// Asks the kernel for the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA). 0: granted.
int64_t amx_request(void) { return syscall(SYS_arch_prctl, 0x1023, 18); }

// -- the same work on every thread, from the first start to the last end --------------------------
//
// Each thread reads the clock itself: the thread that waits for them may be woken late, for they
// occupy every core, and a clock started late makes any machine look fast.

struct job {
    pthread_barrier_t *gate;
    const char *p;
    int64_t n, distance;
    int kind, streams;
    uint64_t sink;
    double start, end;
};

enum { VNNI = 100, AMX = 101 };

static void *run(void *argument) {
    struct job *job = argument;
    pthread_barrier_wait(job->gate);
    job->start = now();
    if (job->kind == VNNI) job->sink = vnni_loop(job->n);
    else if (job->kind == AMX) job->sink = amx_loop(job->n);
    else job->sink = read_one(job->kind, job->p, job->n, job->distance, job->streams);
    job->end = now();
    return NULL;
}

static double timed(int kind, const char *p, int64_t n, int64_t distance, int streams, int threads) {
    pthread_t thread[MAX_THREADS];
    struct job job[MAX_THREADS];
    pthread_barrier_t gate;
    if (threads < 1 || threads > MAX_THREADS) return -1;
    pthread_barrier_init(&gate, NULL, threads);
    const int64_t part = p ? n / threads / 4096 * 4096 : n;
    for (int t = 0; t < threads; t++) {
        job[t] = (struct job){&gate, p ? p + t * part : NULL, part, distance, kind, streams, 0, 0, 0};
        if (pthread_create(&thread[t], NULL, run, &job[t])) return -1;
    }
    double start = 1e300, end = 0;
    for (int t = 0; t < threads; t++) {
        pthread_join(thread[t], NULL);
        if (job[t].start < start) start = job[t].start;
        if (job[t].end > end) end = job[t].end;
    }
    pthread_barrier_destroy(&gate);
    return end - start;
}

// Seconds of one read-only pass over n bytes, split over `threads`.
double read_stream(const char *p, int64_t n, int loop, int64_t distance, int streams, int threads) {
    return timed(loop, p, n, distance, streams, threads);
}

// Operations per second of n iterations on each of `threads`.
double vnni_peak(int64_t n, int threads) {
    return 128.0 * VNNI_ACCUMULATORS * n * threads / timed(VNNI, NULL, n, 0, 1, threads);
}
double amx_peak(int64_t n, int threads) {
    return 4.0 * 32768 * n * threads / timed(AMX, NULL, n, 0, 1, threads);
}
