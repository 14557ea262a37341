// Flash attention on tensor cores (mma.sync, ldmatrix, cp.async: compute capability 8.0 and later) for float16 and
// bfloat16, in the three modes of DiTFastAttn.
//
// A thread block owns BM queries of one head and loops over the keys in blocks of BN with an online softmax in powers of two
// (Dao, arXiv 2307.08691). A warp owns ROWS queries, so rows never need another warp. K and V have one buffer
// each: V of a block is loaded while its scores are computed, K of the next block during softmax and P·V.
//
// Capture is one pass: the main loop over the keys inside the band, W into shared memory as float32, the main loop over the
// others, O and R = O − W. Blocks on the band's edge are visited twice with complementary masks.
//
// Q and K are padded to a multiple of 16 channels by zeros; P·V needs a multiple of 8, so head dim 72 costs 80 and 72.
#pragma once
#include "band.cuh"

enum AttentionMode { FULL = 0, CAPTURE = 1, WINDOW = 2 };

template <int DIM, int BM_> struct Tile {
    static constexpr int BM = BM_;
    static constexpr int WARPS = BM == 128 && DIM > 80 ? 8 : 4;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int ROWS = BM / WARPS;
    static constexpr int M = ROWS / 16;
    static constexpr int BN = 64;
    static constexpr int K_DIM = (DIM + 15) / 16 * 16;
    /// Elements between rows in shared memory: an odd number of 16-byte pieces, so that the eight rows of a matrix lie
    /// in different banks.
    static constexpr int ROW = K_DIM + 8;
    static constexpr int OPERAND_BYTES = (BM + 2 * BN) * ROW * 2;
    static constexpr int WINDOW_BYTES = BM * DIM * 4;
};

template <class T, int DIM, int BM, AttentionMode MODE, bool MASKED> struct AttentionKernel {
    typedef Tile<DIM, BM> Shape;
    static constexpr int BN = Shape::BN, M = Shape::M, ROW = Shape::ROW, THREADS = Shape::THREADS;
    static constexpr int K_STEPS = Shape::K_DIM / 16, KEY_TILES = BN / 8, OUT_TILES = DIM / 8;

    const AttentionParams &p;
    const BandView band;
    u16 *const q_smem, *const k_smem, *const v_smem;
    float *const window_smem;
    const u16 *q, *k, *v, *residual_in;
    u16 *out, *residual_out;
    i64 mask_row;
    const int lane, warp;
    int first_query;

    /// Running softmax and output of this thread's queries: tile i, half h of it is query i·16 + h·8 + lane/4.
    float o[M][OUT_TILES][4];
    float row_max[M][2], row_sum[M][2];

    DEVICE AttentionKernel(const AttentionParams &p_, unsigned char *shared)
        : p(p_), band{p_.half_width, p_.text_begin, p_.text_end, p_.kv_tokens}, q_smem((u16 *)shared),
          k_smem(q_smem + BM * ROW), v_smem(k_smem + BN * ROW), window_smem((float *)(v_smem + BN * ROW)),
          lane(thread_index() & 31), warp(thread_index() >> 5) {
        const int tiles = (p.q_tokens + BM - 1) / BM;
        const int plane = block_index() / tiles;
        const int b = plane / p.heads, h = plane % p.heads, kv = h / p.group;
        first_query = block_index() % tiles * BM;
        q = (const u16 *)p.q.data + b * p.q.batch + h * p.q.head;
        k = (const u16 *)p.k.data + b * p.k.batch + kv * p.k.head;
        v = (const u16 *)p.v.data + b * p.v.batch + kv * p.v.head;
        out = (u16 *)p.out.data + b * p.out.batch + h * p.out.head;
        residual_out = (u16 *)p.residual.data + b * p.residual.batch + h * p.residual.head;
        residual_in = residual_out;
        mask_row = b * p.mask.batch + h * p.mask.head;
    }

    /// Starts to load `rows` rows of DIM channels from row `first` on; rows beyond `limit` and channels beyond DIM become
    /// zeros.
    DEVICE void load_tile_async(u16 *to, const u16 *from, i64 stride, int first, int rows, int limit) const {
        constexpr int PIECES = Shape::K_DIM / 8;
        for (int i = thread_index(); i < rows * PIECES; i += THREADS) {
            const int row = i / PIECES, channel = i % PIECES * 8;
            const bool valid = first + row < limit && channel < DIM;
            copy_async(to + row * ROW + channel, valid ? from + (first + row) * stride + channel : from, valid);
        }
    }

    DEVICE int last_query() const { return first_query + BM < p.q_tokens ? first_query + BM : p.q_tokens; }

    /// Whether the main loop of this side visits a block of keys.
    template <BandSide SIDE> DEVICE bool is_visited(int block) const {
        const int k0 = block * BN, k1 = k0 + BN < p.kv_tokens ? k0 + BN : p.kv_tokens;
        if (SIDE == INSIDE) return band.intersects(first_query, last_query(), k0, k1);
        if (SIDE == OUTSIDE) return !band.covers(first_query, last_query(), k0, k1);
        return true;
    }

    template <BandSide SIDE> DEVICE int next_block(int block, int blocks) const {
        while (block < blocks && !is_visited<SIDE>(block)) block++;
        return block;
    }

    /// Whether some key of the block is hidden from some query on this side, by band or end of the sequence.
    template <BandSide SIDE> DEVICE bool needs_mask(int block) const {
        const int k0 = block * BN, k1 = k0 + BN;
        bool partial = k1 > p.kv_tokens;
        if (SIDE == INSIDE) partial = partial || !band.covers(first_query, last_query(), k0, k1);
        if (SIDE == OUTSIDE) partial = partial || band.intersects(first_query, last_query(), k0, k1);
        return partial;
    }

    DEVICE int query_of(int i, int half) const { return first_query + warp * Shape::ROWS + i * 16 + half * 8 + (lane >> 2); }

    DEVICE void init() {
        UNROLL for (int i = 0; i < M; i++) {
            UNROLL for (int j = 0; j < OUT_TILES; j++) {
                UNROLL for (int e = 0; e < 4; e++) o[i][j][e] = 0.f;
            }
            row_max[i][0] = row_max[i][1] = negative_infinity();
            row_sum[i][0] = row_sum[i][1] = 0.f;
        }
    }

    /// S = Q·Kᵀ.
    DEVICE void compute_qk(float (&s)[M][KEY_TILES][4]) const {
        UNROLL for (int i = 0; i < M; i++) {
            UNROLL for (int j = 0; j < KEY_TILES; j++) {
                UNROLL for (int e = 0; e < 4; e++) s[i][j][e] = 0.f;
            }
        }
        UNROLL for (int step = 0; step < K_STEPS; step++) {
            u32 a[M][4];
            UNROLL for (int i = 0; i < M; i++) {
                const int row = warp * Shape::ROWS + i * 16 + (lane & 15);
                load_matrix_x4(a[i], q_smem + row * ROW + step * 16 + (lane >> 4) * 8);
            }
            UNROLL for (int j = 0; j < KEY_TILES; j += 2) {
                u32 b[4];
                const int row = j * 8 + (lane & 7) + (lane >> 4) * 8;
                load_matrix_x4(b, k_smem + row * ROW + step * 16 + ((lane >> 3) & 1) * 8);
                UNROLL for (int i = 0; i < M; i++) {
                    mma<T>(s[i][j], a[i], b);
                    mma<T>(s[i][j + 1], a[i], b + 2);
                }
            }
        }
    }

    /// Scores that are not on this side become −∞; a mask is added, in powers of two.
    template <BandSide SIDE> DEVICE void apply_mask(float (&s)[M][KEY_TILES][4], int block) const {
        const bool partial = needs_mask<SIDE>(block);
        if (!partial && !MASKED) return;
        UNROLL for (int i = 0; i < M; i++) {
            UNROLL for (int j = 0; j < KEY_TILES; j++) {
                UNROLL for (int e = 0; e < 4; e++) {
                    const int query = query_of(i, e >> 1), key = block * BN + j * 8 + (lane & 3) * 2 + (e & 1);
                    bool shown = key < p.kv_tokens;
                    if (SIDE == INSIDE) shown = shown && band.sees(query, key);
                    if (SIDE == OUTSIDE) shown = shown && !band.sees(query, key);
                    if (MASKED) {
                        shown = shown && query < p.q_tokens;
                        float bias = negative_infinity();
                        if (shown) bias = mask_value(p.mask, mask_row + query * p.mask.query + key * p.mask.key);
                        s[i][j][e] = bias == negative_infinity() ? bias : s[i][j][e] * p.scale_log2 + bias;
                    } else if (!shown) {
                        s[i][j][e] = negative_infinity();
                    }
                }
            }
        }
    }

    /// Scores become exponentials relative to the new row maximum, and output and sums are brought up to it.
    DEVICE void online_softmax(float (&s)[M][KEY_TILES][4]) {
        const float scale = MASKED ? 1.f : p.scale_log2;
        UNROLL for (int i = 0; i < M; i++) {
            UNROLL for (int half = 0; half < 2; half++) {
                float new_max = row_max[i][half];
                UNROLL for (int j = 0; j < KEY_TILES; j++) {
                    new_max = max_of(new_max, max_of(s[i][j][half * 2], s[i][j][half * 2 + 1]));
                }
                new_max = max_of(new_max, shuffle_xor(new_max, 1));
                new_max = max_of(new_max, shuffle_xor(new_max, 2));
                // While a query has seen nothing its row maximum is −∞, and −∞ − (−∞) must not be computed.
                const float offset = new_max == negative_infinity() ? 0.f : new_max * scale;
                const float rescale = exp2_fast(row_max[i][half] * scale - offset);
                row_max[i][half] = new_max;
                float total = 0.f;
                UNROLL for (int j = 0; j < KEY_TILES; j++) {
                    UNROLL for (int e = half * 2; e < half * 2 + 2; e++) {
                        s[i][j][e] = exp2_fast(s[i][j][e] * scale - offset);
                        total += s[i][j][e];
                    }
                }
                row_sum[i][half] = row_sum[i][half] * rescale + total;
                UNROLL for (int j = 0; j < OUT_TILES; j++) {
                    o[i][j][half * 2] *= rescale;
                    o[i][j][half * 2 + 1] *= rescale;
                }
            }
        }
    }

    /// O += P·V.
    DEVICE void compute_pv(const float (&s)[M][KEY_TILES][4]) {
        UNROLL for (int step = 0; step < BN / 16; step++) {
            u32 a[M][4];
            UNROLL for (int i = 0; i < M; i++) {
                UNROLL for (int r = 0; r < 4; r++) {
                    const float *pair = &s[i][2 * step + r / 2][r % 2 * 2];
                    a[i][r] = pack<T>(pair[0], pair[1]);
                }
            }
            const u16 *row = v_smem + (step * 16 + (lane & 15)) * ROW;
            UNROLL for (int j = 0; j + 1 < OUT_TILES; j += 2) {
                u32 b[4];
                load_matrix_x4_transposed(b, row + j * 8 + (lane >> 4) * 8);
                UNROLL for (int i = 0; i < M; i++) {
                    mma<T>(o[i][j], a[i], b);
                    mma<T>(o[i][j + 1], a[i], b + 2);
                }
            }
            if (OUT_TILES % 2) {
                u32 b[2];
                load_matrix_x2_transposed(b, row + (OUT_TILES - 1) * 8);
                UNROLL for (int i = 0; i < M; i++) mma<T>(o[i][OUT_TILES - 1], a[i], b);
            }
        }
    }

    /// Goes over the keys once. Q must be on its way to shared memory.
    template <BandSide SIDE> DEVICE void main_loop() {
        const int blocks = (p.kv_tokens + BN - 1) / BN;
        int block = next_block<SIDE>(0, blocks);
        if (block < blocks) load_tile_async(k_smem, k, p.k.token, block * BN, BN, p.kv_tokens);
        copy_commit();
        ROLLED while (block < blocks) {
            const int next = next_block<SIDE>(block + 1, blocks);
            copy_wait<0>();
            sync_block();
            load_tile_async(v_smem, v, p.v.token, block * BN, BN, p.kv_tokens);
            copy_commit();
            float s[M][KEY_TILES][4];
            compute_qk(s);
            apply_mask<SIDE>(s, block);
            copy_wait<0>();
            sync_block();
            if (next < blocks) load_tile_async(k_smem, k, p.k.token, next * BN, BN, p.kv_tokens);
            copy_commit();
            online_softmax(s);
            compute_pv(s);
            block = next;
        }
    }

    /// 1 / Σ of the exponentials of a query; `empty` if it has seen nothing.
    DEVICE float inverse_sum(int i, int half, float empty) const {
        float total = row_sum[i][half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        return total == 0.f ? empty : 1.f / total;
    }

    /// W goes to shared memory, where each thread finds its own numbers again.
    DEVICE void store_window_output() {
        UNROLL for (int i = 0; i < M; i++) {
            UNROLL for (int half = 0; half < 2; half++) {
                const float inverse = inverse_sum(i, half, 0.f);
                UNROLL for (int j = 0; j < OUT_TILES; j++) {
                    UNROLL for (int e = half * 2; e < half * 2 + 2; e++) {
                        window_smem[((i * OUT_TILES + j) * 4 + e) * THREADS + thread_index()] = o[i][j][e] * inverse;
                    }
                }
            }
        }
    }

    /// Normalises O, forms O = W + R or R = O − W, and stores.
    DEVICE void epilogue() const {
        const float empty = MODE == WINDOW || !MASKED || p.mask.guarded ? 0.f : not_a_number();
        bool finite = true;
        UNROLL for (int i = 0; i < M; i++) {
            UNROLL for (int half = 0; half < 2; half++) {
                const float inverse = inverse_sum(i, half, empty);
                const int query = query_of(i, half);
                if (query < p.q_tokens) {
                    UNROLL for (int j = 0; j < OUT_TILES; j++) {
                        const int channel = j * 8 + (lane & 3) * 2;
                        float x = o[i][j][half * 2] * inverse, y = o[i][j][half * 2 + 1] * inverse;
                        const i64 at = query * p.residual.token + channel;
                        if (MODE == WINDOW && residual_in) {
                            const u32 r = *(const u32 *)(residual_in + at);
                            x += low<T>(r);
                            y += high<T>(r);
                        }
                        *(u32 *)(out + query * p.out.token + channel) = pack<T>(x, y);
                        if (MODE == CAPTURE) {
                            const float *w = window_smem + ((i * OUT_TILES + j) * 4 + half * 2) * THREADS + thread_index();
                            const u32 r = pack<T>(x - w[0], y - w[THREADS]);
                            *(u32 *)(residual_out + at) = r;
                            finite = finite && pair_is_finite<T>(r);
                        }
                    }
                }
            }
        }
        if (MODE == CAPTURE && !finite && p.non_finite) *p.non_finite = 1;
    }

    DEVICE void run() {
        init();
        load_tile_async(q_smem, q, p.q.token, first_query, BM, p.q_tokens);
        if (MODE == FULL) main_loop<ALL>();
        if (MODE != FULL) main_loop<INSIDE>();
        if (MODE == CAPTURE) {
            store_window_output();
            main_loop<OUTSIDE>();
        }
        copy_wait<0>();
        epilogue();
    }
};
