// Attention on CUDA cores: any element type, strides, scale and head dimensions up to MAX_DIM. For float32, and for
// what the tensor-core kernels do not take. Products, sums and softmax are float32.
//
// A thread block of 128 threads owns 32 queries of one head; four neighbouring threads share a query, each with a quarter
// of its keys in the scores and of its channels in the output.
#pragma once
#include "attention.cuh"

template <class T, int MAX_DIM, AttentionMode MODE> struct SimpleKernel {
    static constexpr int BM = 32, BN = 32, THREADS = 128, ROW = MAX_DIM + 1, OWN = MAX_DIM / 4;
    /// Queries, then keys or values, then scores.
    static constexpr int SMEM_BYTES = (2 * BM * ROW + BM * (BN + 1)) * 4;

    const AttentionParams &p;
    const BandView band;
    float *const q_smem, *const kv_smem, *const s_smem;
    i64 q_at, k_at, v_at, out_at, residual_at, mask_at;
    const int own_query, quarter;
    int first_query;
    float o[OWN], w[OWN];
    float row_max, row_sum;

    DEVICE SimpleKernel(const AttentionParams &p_, unsigned char *shared)
        : p(p_), band{p_.half_width, p_.text_begin, p_.text_end, p_.kv_tokens}, q_smem((float *)shared),
          kv_smem(q_smem + BM * ROW), s_smem(kv_smem + BN * ROW), own_query(thread_index() / 4),
          quarter(thread_index() % 4) {
        const int tiles = (p.q_tokens + BM - 1) / BM;
        const int plane = block_index() / tiles;
        const int b = plane / p.heads, h = plane % p.heads, kv = h / p.group;
        first_query = block_index() % tiles * BM;
        q_at = b * p.q.batch + h * p.q.head;
        k_at = b * p.k.batch + kv * p.k.head;
        v_at = b * p.v.batch + kv * p.v.head;
        out_at = b * p.out.batch + h * p.out.head;
        residual_at = b * p.residual.batch + h * p.residual.head;
        mask_at = b * p.mask.batch + h * p.mask.head;
    }

    DEVICE int query() const { return first_query + own_query; }

    /// 32 rows of `dim` channels, as float32; zeros beyond `limit`.
    DEVICE void load_tile(float *to, const Operand &from, i64 at, int first, int limit, int dim) const {
        ROLLED for (int i = thread_index(); i < 32 * dim; i += THREADS) {
            const int row = i / dim, channel = i % dim;
            float x = 0.f;
            if (first + row < limit) {
                x = Element<T>::load(from.data, at + (first + row) * from.token + channel * from.channel);
            }
            to[row * ROW + channel] = x;
        }
    }

    template <BandSide SIDE> DEVICE float score(int key) const {
        bool shown = key < p.kv_tokens && query() < p.q_tokens;
        if (SIDE == INSIDE) shown = shown && band.sees(query(), key);
        if (SIDE == OUTSIDE) shown = shown && !band.sees(query(), key);
        if (!shown) return negative_infinity();
        float bias = 0.f;
        if (p.mask.data) bias = mask_value(p.mask, mask_at + query() * p.mask.query + key * p.mask.key);
        if (bias == negative_infinity()) return bias;
        const float *a = q_smem + own_query * ROW, *b = kv_smem + key % BN * ROW;
        float dot = 0.f;
        UNROLL_BY_4 for (int c = 0; c < p.head_dim; c++) dot += a[c] * b[c];
        return dot * p.scale_log2 + bias;
    }

    template <BandSide SIDE> DEVICE void process_block(int k0) {
        sync_block();
        load_tile(kv_smem, p.k, k_at, k0, p.kv_tokens, p.head_dim);
        sync_block();
        float *s = s_smem + own_query * (BN + 1);
        float new_max = row_max;
        ROLLED for (int j = quarter; j < BN; j += 4) {
            s[j] = score<SIDE>(k0 + j);
            new_max = max_of(new_max, s[j]);
        }
        new_max = max_of(new_max, shuffle_xor(new_max, 1));
        new_max = max_of(new_max, shuffle_xor(new_max, 2));
        const float offset = new_max == negative_infinity() ? 0.f : new_max;
        const float rescale = exp2_fast(row_max - offset);
        row_max = new_max;
        float total = 0.f;
        ROLLED for (int j = quarter; j < BN; j += 4) {
            s[j] = exp2_fast(s[j] - offset);
            total += s[j];
        }
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        row_sum = row_sum * rescale + total;
        sync_block();
        load_tile(kv_smem, p.v, v_at, k0, p.kv_tokens, p.v_dim);
        sync_block();
        UNROLL for (int c = 0; c < OWN; c++) o[c] *= rescale;
        ROLLED for (int j = 0; j < BN; j++) {
            // What is hidden takes no part, whatever its value. Beyond v_dim there is garbage, which nobody reads.
            if (s[j] == 0.f) continue;
            const float *row = kv_smem + j * ROW + quarter;
            UNROLL for (int c = 0; c < OWN; c++) o[c] += s[j] * row[c * 4];
        }
    }

    template <BandSide SIDE> DEVICE void main_loop() {
        const int last = first_query + BM < p.q_tokens ? first_query + BM : p.q_tokens;
        for (int k0 = 0; k0 < p.kv_tokens; k0 += BN) {
            const int k1 = k0 + BN < p.kv_tokens ? k0 + BN : p.kv_tokens;
            if (SIDE == INSIDE && !band.intersects(first_query, last, k0, k1)) continue;
            if (SIDE == OUTSIDE && band.covers(first_query, last, k0, k1)) continue;
            process_block<SIDE>(k0);
        }
    }

    DEVICE void run() {
        UNROLL for (int c = 0; c < OWN; c++) o[c] = w[c] = 0.f;
        row_max = negative_infinity();
        row_sum = 0.f;
        load_tile(q_smem, p.q, q_at, first_query, p.q_tokens, p.head_dim);
        if (MODE == FULL) main_loop<ALL>();
        if (MODE != FULL) main_loop<INSIDE>();
        if (MODE == CAPTURE) {
            const float inverse = row_sum == 0.f ? 0.f : 1.f / row_sum;
            UNROLL for (int c = 0; c < OWN; c++) w[c] = o[c] * inverse;
            main_loop<OUTSIDE>();
        }
        epilogue();
    }

    DEVICE void epilogue() const {
        if (query() >= p.q_tokens) return;
        const bool zero = MODE == WINDOW || !p.mask.data || p.mask.guarded;
        const float inverse = row_sum == 0.f ? (zero ? 0.f : not_a_number()) : 1.f / row_sum;
        bool finite = true;
        UNROLL for (int c = 0; c < OWN; c++) {
            const int channel = c * 4 + quarter;
            if (channel < p.v_dim) {
                float x = o[c] * inverse;
                const i64 at = residual_at + query() * p.residual.token + channel * p.residual.channel;
                if (MODE == WINDOW && p.residual.data) x += Element<T>::load(p.residual.data, at);
                Element<T>::store(p.out.data, out_at + query() * p.out.token + channel * p.out.channel, x);
                if (MODE == CAPTURE) finite = is_finite(Element<T>::store(p.residual.data, at, x - w[c])) && finite;
            }
        }
        if (MODE == CAPTURE && !finite && p.non_finite) *p.non_finite = 1;
    }
};
