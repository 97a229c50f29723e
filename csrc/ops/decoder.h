/* SPDX-License-Identifier: MIT
 *
 * A decoder block as it is run: its weights and what is done between them. M tokens at a time, rows of
 * float32; hidden [M][E], queries [M][H D], keys and values [M][G D].
 */
#ifndef GPU_POOR_OPS_DECODER_H
#define GPU_POOR_OPS_DECODER_H

#include "ops/linear.h"

namespace gpu_poor {

/* What a block consists of: a row of `layout` int64 [blocks, kColumns] and one of `numbers` float32
 * [blocks, kNumbers]. gpu_poor/fusion/layout.py writes the same columns. The tensors of a block
 * follow in the order of the norms and linears: for a norm its weight, and its bias; for a linear its
 * weight, the scale of an int8 or grouped one, its bias, and what its inputs are multiplied by. */
enum Column {
    kHeads,
    kKvHeads,
    kHeadDim,
    kQkv,        /* 0: q, k and v; 1: one linear of q, k, v one after the other; 2: head by head */
    kGated,      /* 0: f(first); 1: f(gate) * up; 2: the same in one linear, gate first */
    kActivation, /* gp_activation */
    kParallel,   /* the feed-forward network reads the block's input, not what attention made of it */
    kWindow,     /* slots a token sees, itself included; 0: all */
    kNorms,      /* four of kNormColumns: before attention, before the network (absent: the first's
                  * output), of query heads, of key heads */
    kNormColumns = 2,
    kLinears = kNorms + 4 * kNormColumns, /* seven of kLinearColumns: q, k, v, o, gate, up, down */
    kLinearColumns = 5,
    kColumns = kLinears + 7 * kLinearColumns
};
/* Of a norm: 0 absent, 1 RMS, 2 layer norm; whether it has a bias. */
enum { kNormKind, kNormBias };
/* Of a linear: N, 0 if it is absent; its group, if it is grouped; activation_bits; whether it has a
 * bias, and an input scale. */
enum { kLinearN, kLinearGroup, kLinearBits, kLinearBias, kLinearInput };
enum Number { kAttentionEps, kNetworkEps, kHeadEps, kSoftmaxScale, kNumbers };

class Norm {
  public:
    Norm(class Reader &reader, int64_t i, float eps, int64_t size);
    Norm(class Reader &reader, int64_t kind, bool bias, float eps, int64_t size);
    explicit operator bool() const { return kind_ != 0; }
    void operator()(const float *x, float *y) const
    {
        if (kind_ == 1)
            gp.rms_norm_row(x, weight_.data, eps_, size_, y);
        else
            gp.layer_norm_row(x, weight_.data, bias_.data, eps_, size_, y);
    }

  private:
    int64_t kind_, size_;
    float eps_;
    Floats weight_, bias_;
};

/* Cosines and sines [rows][dims] of rotary embeddings, for the first dims of a head, whose halves lie
 * together: token m's row is m % rows. No dims: none. */
struct Rotation {
    const float *cosine = nullptr, *sine = nullptr;
    int64_t rows = 1, dims = 0;
};

class Block {
  public:
    Block(class Reader &reader, int64_t hidden);

    /* Norm, the three projections, norms of heads, rotation. */
    void qkv(const float *x, int64_t M, const Rotation &rotation, float *q, float *k, float *v) const;
    /* y = the block's output from its input and from what attention made, [M][H D]. y may be x. */
    void out(const float *x, const float *attention, int64_t M, float *y) const;

    int64_t E, H, G, D, window;
    float softmax_scale;

  private:
    void split(const float *from, int64_t m, float *q, float *k, float *v) const;
    void finish_heads(int64_t m, const Rotation &rotation, float *q, float *k) const;

    int64_t qkv_, gated_, parallel_, inner_;
    gp_activation activation_;
    Norm attention_norm_, network_norm_, q_norm_, k_norm_;
    struct Weight {
        Weight(class Reader &reader, int64_t i, int64_t K);
        Linear linear;
        Floats bias, input_scale;
    };
    Weight q_, k_, v_, o_, gate_, up_, down_;
};

/* Reads blocks from the arguments of an operator, and checks them. */
class Reader {
  public:
    Reader(const char *op, const std::vector<Tensor> &tensors, const Tensor &layout, const Tensor &numbers);
    int64_t blocks() const { return blocks_; }
    /* The next block. */
    Block read(int64_t hidden);
    int64_t taken() const { return static_cast<int64_t>(taken_); }
    /* After the last one: no tensor may be left. */
    void end() const;

    const char *const op;
    int64_t column(int64_t i) const { return layout_[block_ * kColumns + i]; }
    float number(int64_t i) const { return numbers_[block_ * kNumbers + i]; }
    const Tensor &next(const char *what);

  private:
    const std::vector<Tensor> &tensors_;
    size_t taken_ = 0;
    int64_t blocks_, block_ = 0;
    const int64_t *layout_;
    const float *numbers_;
};

} // namespace gpu_poor

#endif
