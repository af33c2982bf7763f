// Compares the CPU's flash attention for every pair of cache types with
//  - attention in double precision over the dequantized cache
//  - ggml's own reference path (ggml_cplan.use_ref: row by row, q rounded to the 8 bits of the dot product)
//
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

// a cache [head_dim, n_kv, n_head_kv, n_stream] of random values, `x` are the values that it holds
static ggml_tensor * cache(ggml_context * ctx, rng & r, ggml_type type, const shape & s, std::vector<float> & x) {
    ggml_tensor * t = ggml_new_tensor_4d(ctx, type, s.head_dim, s.n_head_kv, s.n_kv, s.n_stream);
    x = r.normal(ggml_nelements(t));
    if (type == GGML_TYPE_F32) {
        memcpy(t->data, x.data(), x.size()*sizeof(float));
    } else {
        ggml_quantize_chunk(type, x.data(), t->data, 0, ggml_nrows(t), s.head_dim, nullptr);
        ggml_get_type_traits(type)->to_float(t->data, x.data(), x.size());
    }
    return ggml_permute(ctx, t, 0, 2, 1, 3);
}

// [head_dim, n_head, n_query, n_stream] as the op returns it
static std::vector<float> attention(const shape & s, const std::vector<float> & q, const std::vector<float> & k, const std::vector<float> & v,
        const std::vector<float> & mask, const std::vector<float> & sinks) {
    const int n_head = s.n_head_kv*s.n_gqa;
    const int n_log2 = 1 << (int) floor(log2(n_head));
    const int d      = s.head_dim;

    const double scale = (double) (1.0f/sqrtf(d));

    std::vector<float>  y(q.size());
    std::vector<double> logit(s.n_kv);
    for (int is = 0; is < s.n_stream; ++is) {
        for (int h = 0; h < n_head; ++h) {
            const double slope = s.max_bias == 0.0f ? 1.0 :
                h < n_log2 ? pow(2.0, -s.max_bias/n_log2*(h + 1)) : pow(2.0, -s.max_bias/2.0/n_log2*(2*(h - n_log2) + 1));

            for (int iq = 0; iq < s.n_query; ++iq) {
                const float * pq = q.data() + ((size_t) (is*n_head + h)*s.n_query + iq)*d;
                const auto    row = [&](const std::vector<float> & x, int ik) {
                    return x.data() + ((size_t) (is*s.n_kv + ik)*s.n_head_kv + h/s.n_gqa)*d;
                };

                double max = sinks.empty() ? -INFINITY : sinks[h];
                for (int ik = 0; ik < s.n_kv; ++ik) {
                    double dot = 0.0;
                    for (int i = 0; i < d; ++i) {
                        dot += (double) pq[i]*row(k, ik)[i];
                    }
                    dot *= scale;
                    if (s.softcap != 0.0f) {
                        dot = s.softcap*tanh(dot/s.softcap);
                    }
                    if (s.mask != NO_MASK) {
                        const int hm = s.mask == MASK_PER_HEAD ? h : 0;
                        const int nm = s.mask == MASK_PER_HEAD ? n_head : 1;
                        dot += slope*mask[((size_t) (is*nm + hm)*s.n_query + iq)*s.n_kv + ik];
                    }
                    logit[ik] = dot;
                    max = std::max(max, dot);
                }

                double sum = sinks.empty() ? 0.0 : exp(sinks[h] - max);
                std::vector<double> acc(d, 0.0);
                for (int ik = 0; ik < s.n_kv; ++ik) {
                    const double p = exp(logit[ik] - max);
                    sum += p;
                    for (int i = 0; i < d; ++i) {
                        acc[i] += p*row(v, ik)[i];
                    }
                }
                for (int i = 0; i < d; ++i) {
                    y[((size_t) (is*s.n_query + iq)*n_head + h)*d + i] = acc[i]/sum;
                }
            }
        }
    }
    return y;
}

// normalised mean square error, NAN if either has one
static double nmse(const std::vector<float> & x, const std::vector<float> & ref) {
    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double d = (double) x[i] - ref[i];
        err += d*d;
        sum += (double) ref[i]*ref[i];
    }
    return err/sum;
}

struct errors {
    double exact; // from double precision
    double ref;   // from the reference path
};

static errors compare(ggml_type type_k, ggml_type type_v, const shape & s) {
    rng r;

    ggml_init_params ip = { (size_t) 64*1024*1024, nullptr, false };
    ggml_context * ctx = ggml_init(ip);

    const int n_head = s.n_head_kv*s.n_gqa;

    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.head_dim, s.n_query, n_head, s.n_stream);
    const std::vector<float> xq = r.normal(ggml_nelements(q));
    memcpy(q->data, xq.data(), xq.size()*sizeof(float));

    std::vector<float> xk;
    std::vector<float> xv;
    ggml_tensor * k = cache(ctx, r, type_k, s, xk);
    ggml_tensor * v = cache(ctx, r, type_v, s, xv);

    ggml_tensor * mask = nullptr;
    std::vector<float> xm;
    if (s.mask != NO_MASK) {
        // causal, with a hole that differs per stream, and a bias on some keys
        const int n_mask = s.mask == MASK_PER_HEAD ? n_head : 1;
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_kv, s.n_query, n_mask, s.n_stream);
        ggml_fp16_t * m = (ggml_fp16_t *) mask->data;
        for (int is = 0; is < s.n_stream; ++is) {
            for (int h = 0; h < n_mask; ++h) {
                for (int iq = 0; iq < s.n_query; ++iq) {
                    for (int ik = 0; ik < s.n_kv; ++ik) {
                        const bool hidden = ik > s.n_kv - s.n_query + iq || (ik >= 70 + is + h && ik < 200);
                        xm.push_back(hidden ? -INFINITY : ik%97 == 0 ? -0.5f - h : 0.0f);
                        *m++ = ggml_fp32_to_fp16(xm.back());
                    }
                }
            }
        }
    }

    ggml_tensor * out = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/sqrtf(s.head_dim), s.max_bias, s.softcap);
    std::vector<float> xs;
    if (s.sinks) {
        ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head);
        xs = r.normal(n_head);
        memcpy(sinks->data, xs.data(), xs.size()*sizeof(float));
        ggml_flash_attn_ext_add_sinks(out, sinks);
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
        for (size_t i = 0; i < n; ++i) {
            ((float *) out->data)[i] = NAN;
        }
        if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) {
            return { NAN, NAN };
        }
        result.emplace_back(y, y + n);
    }
    ggml_free(ctx);

    return { nmse(result[0], attention(s, xq, xk, xv, xm, xs)), nmse(result[0], result[1]) };
}

static bool is_float(ggml_type type) {
    return !ggml_is_quantized(type);
}

int main() {
    ggml_cpu_init();

    std::vector<ggml_type> types;
    for (const char * name : { "f16", "bf16", "f32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "turbo3", "turbo4" }) {
        for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
            const char * other = ggml_type_name((ggml_type) i);
            if (other && std::string(name) == other) {
                types.push_back((ggml_type) i);
            }
        }
    }

    printf("neon %d dotprod %d avx2 %d avx512 %d avx512_vnni %d\n",
        ggml_cpu_has_neon(), ggml_cpu_has_dotprod(), ggml_cpu_has_avx2(), ggml_cpu_has_avx512(), ggml_cpu_has_avx512_vnni());

    int n_case = 0;
    int n_bad  = 0;
    for (ggml_type type_k : types) {
        for (ggml_type type_v : types) {
            // two float types take llama.cpp's own paths, which round to half precision
            const double bound_exact = is_float(type_k) && is_float(type_v) ? 1e-4 : 1e-8;
            // the reference rounds q to 8 bits or bfloat16, and accumulates V of type f16 in half precision
            const double bound_ref   = 2e-4;

            errors worst = { 0.0, 0.0 };
            for (const shape & s : shapes) {
                if (s.head_dim % ggml_blck_size(type_k) != 0 || s.head_dim % ggml_blck_size(type_v) != 0) {
                    continue; // not a multiple of the block
                }
                n_case++;
                const errors err = compare(type_k, type_v, s);
                if (!(err.exact <= bound_exact) || !(err.ref <= bound_ref)) {
                    printf("%s/%s head_dim %d kv %d queries %d: nmse %g above %g, or from the reference path %g above %g\n",
                        ggml_type_name(type_k), ggml_type_name(type_v), s.head_dim, s.n_kv, s.n_query,
                        err.exact, bound_exact, err.ref, bound_ref);
                    n_bad++;
                }
                worst.exact = !(err.exact <= worst.exact) ? err.exact : worst.exact;
                worst.ref   = !(err.ref   <= worst.ref)   ? err.ref   : worst.ref;
            }
            printf("%s/%s nmse %.2e, from the reference path %.2e\n", ggml_type_name(type_k), ggml_type_name(type_v), worst.exact, worst.ref);
        }
    }
    printf("%d pairs, %d cases, %d bad\n", (int) (types.size()*types.size()), n_case, n_bad);
    return n_bad ? 1 : 0;
}
