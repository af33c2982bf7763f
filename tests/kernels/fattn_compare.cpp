// Compares the CPU's flash attention for every pair of cache types, alone and with a window (a second segment of keys
// and values, ggml_flash_attn_ext_add_window), with
//  - attention in double precision over the dequantized cache
//  - ggml's own reference path (ggml_cplan.use_ref: row by row, q rounded to the 8 bits of the dot product)
//
// usage: fattn_compare [TYPE...]     the pairs of these cache types, default all
// Prints one line per pair and exits non-zero if the normalised mean square error of any case is above its bound.
// Needs ggml alone, so that it can be cross-compiled and run under an emulator.

#include "ggml.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

enum mask_kind { NO_MASK, MASK, MASK_PER_HEAD };

enum {
    FEWER  = 1, // one thread fewer runs than the work buffer was planned for
    POISON = 2, // some keys hold NaN: hidden from all queries, or seen by every other one
    HOLES  = 4, // of 4 queries one sees nothing in the cache, one nothing in the window, one nothing at all
};

struct shape {
    int  head_dim;
    int  n_head_kv;
    int  n_gqa;
    int  n_stream;
    int  n_kv;
    int  n_query;
    int  n_threads;
    mask_kind mask;
    bool sinks;
    float max_bias;
    float softcap;
    int  n_win = 0;
    int  flags = 0;
};

static const shape shapes[] = {
    //  D  KVH GQA ST   KV    Q  T  mask           sinks  bias  softcap
    {  64,  2,  7, 1,  577,   1, 1, MASK,          false, 0.0f,  0.0f },
    {  64,  2,  7, 1, 1100,   1, 3, MASK,          false, 0.0f,  0.0f },
    {  64,  1,  3, 2,  257,  35, 2, MASK,          true,  0.0f,  0.0f },
    {  64,  2,  4, 2,  333,   1, 2, MASK,          true,  0.0f,  0.0f },
    {  64,  1,  5, 1,  191,  37, 2, MASK,          false, 0.0f, 20.0f },
    {  64,  2,  2, 1,  131,  11, 2, MASK_PER_HEAD, false, 0.0f,  0.0f },
    {  80,  2,  3, 1,  131,   5, 2, MASK,          true,  0.0f,  0.0f },
    {  96,  1,  2, 1,  257,   3, 1, MASK,          false, 0.0f,  0.0f },
    { 128,  2,  6, 1,  300,   2, 2, MASK,          false, 8.0f,  0.0f },
    { 128,  1,  1, 3,  113,   1, 2, NO_MASK,       true,  0.0f,  0.0f },
    { 128,  1,  6, 1,   67,  33, 2, MASK,          true,  8.0f,  0.0f },
    { 128,  2,  2, 2,  129,   9, 3, MASK,          false, 0.0f, 30.0f },
    { 192,  2,  2, 1,    1,   1, 2, NO_MASK,       false, 0.0f,  0.0f },
    { 256,  1,  4, 1,   65,  19, 1, MASK,          false, 0.0f, 10.0f },
    { 256,  1,  2, 2,   63,   1, 2, MASK,          true,  0.0f, 50.0f },
    { 256,  1,  3, 1,  513,   1, 4, MASK,          false, 0.0f,  0.0f },
    // no keys
    { 128,  1,  3, 1,    0,   2, 2, NO_MASK,       true,  0.0f,  0.0f },
    { 128,  2,  2, 1,    0,   1, 3, NO_MASK,       false, 0.0f,  0.0f },
    //                                                                   win  flags
    {  64,  2,  7, 1,  577,   1, 3, MASK,          false, 0.0f,  0.0f,   0,   POISON },
    { 128,  1,  3, 1,  333,  37, 2, MASK,          true,  0.0f,  0.0f,   0,   POISON },
    {  96,  1,  2, 2,  257,   5, 2, MASK_PER_HEAD, false, 0.0f, 10.0f,   0,   POISON },
};

// with a window
static const shape window_shapes[] = {
    //  D  KVH GQA ST   KV    Q  T  mask           sinks  bias  softcap  win  flags
    {  64,  2,  7, 1, 1100,   1, 3, MASK,          false, 0.0f,  0.0f, 144 },
    { 128,  1,  4, 2,  333,   1, 4, MASK,          true,  0.0f,  0.0f,  17 },
    { 128,  2,  2, 1,  513,   5, 2, MASK,          false, 8.0f,  0.0f, 145 },
    {  96,  2,  2, 1,  131,  11, 2, MASK_PER_HEAD, false, 0.0f,  0.0f,  16 },
    { 256,  1,  3, 1,   65,   1, 1, MASK,          false, 0.0f, 10.0f,   1 },
    { 128,  1,  6, 2,  267,  33, 2, MASK,          true,  8.0f,  0.0f, 145 },
    {  64,  1,  7, 1,  300,  65, 3, MASK,          false, 0.0f, 20.0f, 209 },
    {  64,  1,  3, 1,  257,  35, 2, MASK,          true,  0.0f,  0.0f,  48,   HOLES },
    {  64,  2,  2, 2,  257,   7, 4, MASK,          false, 0.0f,  0.0f,  70,   HOLES },
    { 128,  1,  3, 1,  333,  37, 2, MASK,          true,  0.0f,  0.0f,  80,   POISON },
    {  64,  2,  2, 1,  129,   3, 2, MASK,          false, 0.0f,  0.0f,  70,   POISON | HOLES },
};

// once, not for every pair
static const shape fewer_shapes[] = {
    // the blocks of 10 threads need more room than those of 11
    { 128,  1, 12, 1, 1024, 117, 11, MASK,         false, 0.0f,  0.0f,   0,   FEWER },
    { 128,  2,  8, 1, 1024,   1,  8, MASK,         false, 0.0f,  0.0f,   0,   FEWER },
    {  64,  1,  4, 1, 1024, 257,  8, MASK,         true,  0.0f,  0.0f, 144,   FEWER },
};

struct rng {
    std::mt19937 gen { 42 };
    std::normal_distribution<float> dist { 0.0f, 1.0f };

    std::vector<float> normal(size_t n) {
        std::vector<float> x(n);
        for (float & v : x) {
            v = dist(gen);
        }
        return x;
    }
};

// keys and values as the op takes them, and the values that they hold
struct segment {
    int n    = 0; // keys
    int n_mh = 1; // masks: 1 or one per head

    ggml_tensor * k    = nullptr;
    ggml_tensor * v    = nullptr;
    ggml_tensor * mask = nullptr;

    std::vector<float> xk; // [n_stream][n][n_head_kv][head_dim]
    std::vector<float> xv;
    std::vector<float> xm; // [n_stream][n_mh][n_query][n], empty without a mask
};

// a key that holds NaN, if its type can
static bool poisoned(int ik) {
    return ik%5 == 3 || ik%50 == 7;
}

static bool poison_hidden(int ik, int iq) {
    return ik%5 == 3 || (ik%50 == 7 && iq%2 == 0);
}

// a cache [head_dim, n, n_head_kv, n_stream] of random values, `x` are the values that it holds
static ggml_tensor * cache(ggml_context * ctx, rng & r, ggml_type type, const shape & s, int n, std::vector<float> & x) {
    ggml_tensor * t = ggml_new_tensor_4d(ctx, type, s.head_dim, s.n_head_kv, n, s.n_stream);
    x = r.normal(ggml_nelements(t));
    if (x.empty()) {
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    }
    if (type == GGML_TYPE_F32) {
        memcpy(t->data, x.data(), x.size()*sizeof(float));
    } else {
        ggml_quantize_chunk(type, x.data(), t->data, 0, ggml_nrows(t), s.head_dim, nullptr);
    }
    if (s.flags & POISON) {
        for (int ir = 0; ir < ggml_nrows(t); ++ir) {
            if (poisoned((ir/s.n_head_kv)%n)) {
                memset((char *) t->data + ir*t->nb[1], 0xFF, t->nb[1]); // a scale of NaN, or all NaN
            }
        }
    }
    if (type == GGML_TYPE_F32) {
        memcpy(x.data(), t->data, x.size()*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(t->data, x.data(), x.size());
    }
    return ggml_permute(ctx, t, 0, 2, 1, 3);
}

static void set_mask(ggml_context * ctx, const shape & s, segment & seg) {
    seg.mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, seg.n, s.n_query, seg.n_mh, s.n_stream);
    ggml_fp32_to_fp16_row(seg.xm.data(), (ggml_fp16_t *) seg.mask->data, seg.xm.size());
}

// causal, with a hole that differs per stream, and a bias on some keys; what the window holds of the newest keys
// is taken from there
static void make_masks(ggml_context * ctx, const shape & s, segment & main, segment & win) {
    win.xm.assign((size_t) s.n_stream*s.n_query*win.n, -INFINITY);
    for (int is = 0; is < s.n_stream; ++is) {
        for (int h = 0; h < main.n_mh; ++h) {
            for (int iq = 0; iq < s.n_query; ++iq) {
                const bool no_main = (s.flags & HOLES) && iq%4 >= 2;
                const bool no_win  = (s.flags & HOLES) && iq%4%2 == 1;
                for (int ik = 0; ik < s.n_kv; ++ik) {
                    const int  last   = s.n_kv - s.n_query + iq;
                    const bool hidden = ik > last || (ik >= 70 + is + h && ik < 200) || ((s.flags & POISON) && poison_hidden(ik, iq));
                    const int  slot   = s.n_kv - 1 - ik < win.n ? (7*ik + is)%win.n : -1;

                    float value = hidden ? -INFINITY : ik%97 == 0 ? -0.5f - h : 0.0f;
                    if (slot >= 0 && ik <= last && last - ik < (win.n + 1)/2) {
                        const bool hidden_win = no_win || ((s.flags & POISON) && poison_hidden(slot, iq));
                        win.xm[((size_t) is*s.n_query + iq)*win.n + slot] = hidden_win ? -INFINITY : ik%97 == 0 ? -0.5f : 0.0f;
                        value = -INFINITY;
                    }
                    main.xm.push_back(no_main ? -INFINITY : value);
                }
            }
        }
    }
    set_mask(ctx, s, main);
    if (win.n > 0) {
        set_mask(ctx, s, win);
    }
}

// [head_dim, n_head, n_query, n_stream] as the op returns it
static std::vector<float> attention(const shape & s, const std::vector<float> & q, const std::vector<const segment *> & segments,
        const std::vector<float> & sinks) {
    const int n_head = s.n_head_kv*s.n_gqa;
    const int n_log2 = 1 << (int) floor(log2(n_head));
    const int d      = s.head_dim;

    const double scale = (double) (1.0f/sqrtf(d));

    std::vector<float> y(q.size());
    for (int is = 0; is < s.n_stream; ++is) {
        for (int h = 0; h < n_head; ++h) {
            const double slope = s.max_bias == 0.0f ? 1.0 :
                h < n_log2 ? pow(2.0, -s.max_bias/n_log2*(h + 1)) : pow(2.0, -s.max_bias/2.0/n_log2*(2*(h - n_log2) + 1));

            for (int iq = 0; iq < s.n_query; ++iq) {
                const float * pq = q.data() + ((size_t) (is*n_head + h)*s.n_query + iq)*d;

                std::vector<double>        logit;
                std::vector<const float *> value;
                double max = sinks.empty() ? -INFINITY : sinks[h];
                for (const segment * seg : segments) {
                    for (int ik = 0; ik < seg->n; ++ik) {
                        const size_t ir = ((size_t) (is*seg->n + ik)*s.n_head_kv + h/s.n_gqa)*d;
                        const float  m  = seg->xm.empty() ? 0.0f :
                            seg->xm[((size_t) (is*seg->n_mh + (seg->n_mh > 1 ? h : 0))*s.n_query + iq)*seg->n + ik];
                        if (m == -INFINITY) {
                            continue;
                        }
                        double dot = 0.0;
                        for (int i = 0; i < d; ++i) {
                            dot += (double) pq[i]*seg->xk[ir + i];
                        }
                        dot *= scale;
                        if (s.softcap != 0.0f) {
                            dot = s.softcap*tanh(dot/s.softcap);
                        }
                        logit.push_back(dot + slope*m);
                        value.push_back(&seg->xv[ir]);
                        max = std::max(max, logit.back());
                    }
                }

                double sum = sinks.empty() ? 0.0 : exp(sinks[h] - max);
                std::vector<double> acc(d, 0.0);
                for (size_t ik = 0; ik < logit.size(); ++ik) {
                    const double p = exp(logit[ik] - max);
                    sum += p;
                    for (int i = 0; i < d; ++i) {
                        acc[i] += p*value[ik][i];
                    }
                }
                for (int i = 0; i < d; ++i) {
                    y[((size_t) (is*s.n_query + iq)*n_head + h)*d + i] = sum == 0.0 ? 0.0 : acc[i]/sum;
                }
            }
        }
    }
    return y;
}

// normalised mean square error, NAN if one has a NaN where the other has none
static double nmse(const std::vector<float> & x, const std::vector<float> & ref) {
    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
        if (std::isnan(x[i]) && std::isnan(ref[i])) {
            continue;
        }
        const double d = (double) x[i] - ref[i];
        err += d*d;
        sum += (double) ref[i]*ref[i];
    }
    return err == 0.0 ? 0.0 : err/sum;
}

struct errors {
    double exact; // from double precision
    double ref;   // from the reference path
};

// type_win is looked at if the shape has a window
static errors compare(ggml_type type_k, ggml_type type_v, ggml_type type_win, const shape & s) {
    rng r;

    ggml_init_params ip = { (size_t) 64*1024*1024, nullptr, false };
    ggml_context * ctx = ggml_init(ip);

    const int n_head = s.n_head_kv*s.n_gqa;

    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.head_dim, s.n_query, n_head, s.n_stream);
    const std::vector<float> xq = r.normal(ggml_nelements(q));
    memcpy(q->data, xq.data(), xq.size()*sizeof(float));

    segment main;
    main.n    = s.n_kv;
    main.n_mh = s.mask == MASK_PER_HEAD ? n_head : 1;
    main.k    = cache(ctx, r, type_k, s, main.n, main.xk);
    main.v    = cache(ctx, r, type_v, s, main.n, main.xv);

    segment win;
    win.n = s.n_win;
    if (win.n > 0) {
        win.k = cache(ctx, r, type_win, s, win.n, win.xk);
        win.v = cache(ctx, r, type_win, s, win.n, win.xv);
    }
    if (s.mask != NO_MASK) {
        make_masks(ctx, s, main, win);
    }

    ggml_tensor * out = ggml_flash_attn_ext(ctx, q, main.k, main.v, main.mask, 1.0f/sqrtf(s.head_dim), s.max_bias, s.softcap);
    std::vector<float> xs;
    if (s.sinks) {
        ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head);
        xs = r.normal(n_head);
        memcpy(sinks->data, xs.data(), xs.size()*sizeof(float));
        ggml_flash_attn_ext_add_sinks(out, sinks);
    }
    if (win.n > 0) {
        ggml_flash_attn_ext_add_window(out, win.k, win.v, win.mask);
    }

    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);

    const float * y = (const float *) out->data;
    const size_t  n = ggml_nelements(out);

    std::vector<std::vector<float>> result;
    for (bool use_ref : { false, true }) {
        ggml_cplan plan = ggml_graph_plan(graph, s.n_threads, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        plan.use_ref   = use_ref;
        if (s.flags & FEWER) {
            plan.n_threads--;
        }
        for (size_t i = 0; i < n; ++i) {
            ((float *) out->data)[i] = i%2 ? NAN : 1.0f;
        }
        if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) {
            return { NAN, NAN };
        }
        result.emplace_back(y, y + n);
    }
    ggml_free(ctx);

    return { nmse(result[0], attention(s, xq, { &main, &win }, xs)), nmse(result[0], result[1]) };
}

static bool is_float(ggml_type type) {
    return !ggml_is_quantized(type);
}

static int n_case = 0;
static int n_bad  = 0;

// adds to the worst errors so far
static void check(ggml_type type_k, ggml_type type_v, ggml_type type_win, const shape & s, errors & worst) {
    const std::string window = s.n_win == 0 ? "" : std::string(" + ") + std::to_string(s.n_win) + " " + ggml_type_name(type_win);
    for (ggml_type type : { type_k, type_v, type_win }) {
        if (s.head_dim % ggml_blck_size(type) != 0) {
            return; // not a multiple of the block
        }
    }
    const bool floats = is_float(type_k) && is_float(type_v);
    if (floats && s.n_win == 0 && ((s.flags & POISON) || s.n_kv == 0)) {
        return; // llama.cpp's own paths for two float types
    }
    // which round to half precision
    const double bound_exact = floats && s.n_win == 0 ? 1e-4 : 1e-8;
    // the reference rounds q to 8 bits or bfloat16, and accumulates V of type f16 in half precision
    const double bound_ref   = 2e-4;

    n_case++;
    const errors err = compare(type_k, type_v, type_win, s);
    if (!(err.exact <= bound_exact) || !(err.ref <= bound_ref)) {
        printf("%s/%s%s head_dim %d kv %d queries %d flags %d: nmse %g above %g, or from the reference path %g above %g\n",
            ggml_type_name(type_k), ggml_type_name(type_v), window.c_str(), s.head_dim, s.n_kv, s.n_query, s.flags,
            err.exact, bound_exact, err.ref, bound_ref);
        n_bad++;
    }
    worst.exact = !(err.exact <= worst.exact) ? err.exact : worst.exact;
    worst.ref   = !(err.ref   <= worst.ref)   ? err.ref   : worst.ref;
}

int main(int argc, char ** argv) {
    ggml_cpu_init();
    setvbuf(stdout, nullptr, _IOLBF, 0);

    std::vector<std::string> names(argv + 1, argv + argc);
    if (names.empty()) {
        names = { "f16", "bf16", "f32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "turbo2", "turbo3", "turbo4" };
    }
    std::vector<ggml_type> types;
    for (const std::string & name : names) {
        for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
            const char * other = ggml_type_name((ggml_type) i);
            if (other && name == other) {
                types.push_back((ggml_type) i);
            }
        }
    }

    printf("neon %d dotprod %d avx2 %d avx512 %d avx512_vnni %d\n",
        ggml_cpu_has_neon(), ggml_cpu_has_dotprod(), ggml_cpu_has_avx2(), ggml_cpu_has_avx512(), ggml_cpu_has_avx512_vnni());

    int n_pair = 0;
    for (ggml_type type_k : types) {
        for (ggml_type type_v : types) {
            errors alone  = { 0.0, 0.0 };
            errors window = { 0.0, 0.0 };
            for (const shape & s : shapes) {
                check(type_k, type_v, GGML_TYPE_F16, s, alone);
            }
            int i = n_pair++;
            for (const shape & s : window_shapes) {
                check(type_k, type_v, i++ % 2 ? GGML_TYPE_F16 : GGML_TYPE_Q8_0, s, window); // the other one for the next pair
            }
            printf("%s/%s nmse %.2e, from the reference path %.2e; with a window %.2e, %.2e\n", ggml_type_name(type_k), ggml_type_name(type_v),
                alone.exact, alone.ref, window.exact, window.ref);
        }
    }

    errors fewer = { 0.0, 0.0 };
    for (const shape & s : fewer_shapes) {
        check(GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, s, fewer);
    }
    printf("fewer threads than planned: nmse %.2e, from the reference path %.2e\n", fewer.exact, fewer.ref);

    printf("%d pairs, %d cases, %d bad\n", n_pair, n_case, n_bad);
    return n_bad ? 1 : 0;
}
