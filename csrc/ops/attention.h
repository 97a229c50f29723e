/* SPDX-License-Identifier: MIT
 *
 * The cache's two steps without tensors, for operators and for fused blocks: store the keys and
 * values of T new tokens, then attend from them to all that is visible. Rows of q, k, v and out are
 * tokens, [batch * T] of them, `stride` floats apart, the heads of one D apart.
 */
#ifndef GPU_POOR_OPS_ATTENTION_H
#define GPU_POOR_OPS_ATTENTION_H

#include "ops/common.h"

namespace gpu_poor {

/* One layer's pages, and where each sequence of a batch lies in them. */
struct Pages {
    gp_pages layer;
    int64_t n_pages, batch;
    const int32_t *block_table; /* [batch][table_stride] */
    int64_t table_stride;
    const int32_t *lengths; /* [batch]: tokens before the T new ones */
    const int32_t *starts;  /* [batch]: first slot that counts (left padding); NULL: 0 */
    int64_t window;         /* slots a token sees, itself included; 0: all */
    const float *shift;     /* [kv_heads][D] that keys are stored less: softmax does not see what all
                             * scores of a query have in common. NULL: 0 */

    int64_t start(int64_t b) const { return starts ? starts[b] : 0; }
    /* The first slot that a token in `slot` sees. */
    int64_t visible_from(int64_t b, int64_t slot) const
    {
        return window ? std::max(start(b), slot + 1 - window) : start(b);
    }
    const int32_t *table(int64_t b) const { return block_table + b * table_stride; }
};

/* Of a layer's pages [n, 2, kv_heads, page_size, D], each contiguous, scales [n, 2, kv_heads, page_size]
 * or none, and block_table int32 [batch, max_pages]; lengths, starts, window and shift are left to
 * the caller. Throws what is wrong with them. */
Pages pages_of(const char *op, const Tensor &pages, const std::optional<Tensor> &scales,
               const Tensor &block_table, int64_t batch);

/* Throws if int8 pages have a size that their order does not allow: gpu_poor.h. */
void check_layout(const char *op, const gp_pages &layer);

/* Throws unless slots [first new one, or the first that it sees; lengths + T) of each sequence lie in
 * pages there are. Entries of the table before those, of pages that were given back, are not read.
 * Not for use inside a parallel region; append and attend rely on it. */
void check_pages(const char *op, const Pages &pages, int64_t T, bool appends);

/* Quantize and store; a parallel region of its own if there is enough to do. */
void append(const Pages &pages, const float *k, const float *v, int64_t stride, int64_t T);

/* Attention of the T new tokens of each sequence, causal among them. Work is cut into tasks(), each for the
 * query heads of one key head of a sequence, in any order and on any threads. A few tokens take a task for
 * each chunk, and whoever ends the last one of a head joins them all; of more than that a task takes a block
 * of tokens over all chunks. Either way each token sees its chunks in their order, with the same result. A
 * query that sees nothing (padding) gets zeros. */
class Attention {
  public:
    /* Bytes of the scratch that the constructor takes. */
    static size_t bytes(const Pages &pages, int64_t T, int64_t heads);
    Attention(const Pages &pages, const float *q, int64_t q_stride, int64_t T, int64_t heads,
              float softmax_scale, float *out, int64_t out_stride, Scratch &scratch);

    int64_t tasks() const;
    double bytes_per_task() const;
    void run(int64_t task) const;

  private:
    /* Chunks of sequence b, counted from its start. */
    struct Range {
        int64_t begin, end;
        int64_t size() const { return end - begin; }
    };
    /* Those that any of the tokens [first, first + n) sees. */
    Range chunks(int64_t b, int64_t first, int64_t n) const { return chunks(pages_, b, first, n); }
    static Range chunks(const Pages &pages, int64_t b, int64_t first, int64_t n);
    void chunk(int64_t b, int64_t g, int64_t first, int64_t n, int64_t chunk, float *partial) const;
    void block(int64_t b, int64_t g, int64_t first, int64_t n) const;
    void finish(int64_t b, int64_t g, int64_t first, int64_t n, const float *partial) const;
    int64_t row_floats() const { return rows_ * GP_PARTIAL(pages_.layer.D); }

    Pages pages_;
    const float *q_;
    float *out_;
    int64_t q_stride_, out_stride_, T_, rows_;
    float scale_;
    /* Of few tokens */
    int64_t *first_;             /* [batch + 1]: task of a sequence's first chunk */
    std::atomic<int64_t> *left_; /* [batch][kv_heads]: chunks not done */
    float *partial_;             /* [task][T][rows][GP_PARTIAL(D)] */
    /* Of many */
    int64_t block_, blocks_; /* tokens of a task; tasks of a head */
};

/* All its tasks, in one parallel region. */
void attend(const Attention &attention);

} // namespace gpu_poor

#endif
