// Compares the CPU's flash attention with ggml's own reference path (ggml_cplan.use_ref) for every pair of cache types.
//
// Prints one line per pair and exits non-zero if the normalised mean square error of any case is above its bound.
// Needs ggml alone, so that it can be cross-compiled and run under an emulator.

#include "ggml.h"
#include "ggml-cpu.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct shape {
    int  head_dim;
    int  n_head_kv;
    int  n_gqa;
    int  n_stream;
    int  n_kv;
    int  n_query;
    int  n_threads;
    bool mask;
    bool sinks;
    float max_bias;
    float softcap;
};

static const shape shapes[] = {
    //  D  KVH GQA ST   KV    Q  T  mask   sinks  bias  softcap
    {  64,  2,  7, 1,  577,   1, 1, true,  false, 0.0f,  0.0f },
    {  64,  2,  7, 1, 1100,   1, 3, true,  false, 0.0f,  0.0f },
    {  64,  1,  3, 2,  257,  35, 2, true,  true,  0.0f,  0.0f },
    { 128,  2,  6, 1,  300,   2, 2, true,  false, 8.0f,  0.0f },
    { 128,  1,  1, 3,  113,   1, 2, false, true,  0.0f,  0.0f },
    { 256,  1,  4, 1,   65,  19, 1, true,  false, 0.0f, 10.0f },
    { 192,  2,  2, 1,    1,   1, 2, false, false, 0.0f,  0.0f },
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

static ggml_tensor * cache(ggml_context * ctx, rng & r, ggml_type type, const shape & s) {
    ggml_tensor * t = ggml_new_tensor_4d(ctx, type, s.head_dim, s.n_head_kv, s.n_kv, s.n_stream);
    const std::vector<float> x = r.normal(ggml_nelements(t));
    if (type == GGML_TYPE_F32) {
        memcpy(t->data, x.data(), x.size()*sizeof(float));
    } else {
        ggml_quantize_chunk(type, x.data(), t->data, 0, ggml_nrows(t), s.head_dim, nullptr);
    }
    return ggml_permute(ctx, t, 0, 2, 1, 3);
}

// normalised mean square error of the fast path, NAN if either result has one
static double compare(ggml_type type_k, ggml_type type_v, const shape & s) {
    rng r;

    ggml_init_params ip = { (size_t) 64*1024*1024, nullptr, false };
    ggml_context * ctx = ggml_init(ip);

    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.head_dim, s.n_query, s.n_head_kv*s.n_gqa, s.n_stream);
    const std::vector<float> xq = r.normal(ggml_nelements(q));
    memcpy(q->data, xq.data(), xq.size()*sizeof(float));

    ggml_tensor * k = cache(ctx, r, type_k, s);
    ggml_tensor * v = cache(ctx, r, type_v, s);

    ggml_tensor * mask = nullptr;
    if (s.mask) {
        // causal, with a hole that differs per stream, and a bias on some keys
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_kv, s.n_query, 1, s.n_stream);
        ggml_fp16_t * m = (ggml_fp16_t *) mask->data;
        for (int is = 0; is < s.n_stream; ++is) {
            for (int iq = 0; iq < s.n_query; ++iq) {
                for (int ik = 0; ik < s.n_kv; ++ik) {
                    const bool hidden = ik > s.n_kv - s.n_query + iq || (ik >= 70 + is && ik < 200);
                    *m++ = ggml_fp32_to_fp16(hidden ? -INFINITY : ik%97 == 0 ? -0.5f : 0.0f);
                }
            }
        }
    }

    ggml_tensor * out = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/sqrtf(s.head_dim), s.max_bias, s.softcap);
    if (s.sinks) {
        ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, q->ne[2]);
        const std::vector<float> xs = r.normal(q->ne[2]);
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
            return NAN;
        }
        result.emplace_back(y, y + n);
    }

    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < n; ++i) {
        const double d = (double) result[0][i] - result[1][i];
        err += d*d;
        sum += (double) result[1][i]*result[1][i];
    }
    ggml_free(ctx);
    return err/sum;
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

    int n_bad = 0;
    for (ggml_type type_k : types) {
        for (ggml_type type_v : types) {
            // the reference rounds more there: it accumulates V in half precision, and rounds q to bfloat16
            const double bound = type_v == GGML_TYPE_F16 || type_k == GGML_TYPE_BF16 ? 1e-4 : 1e-6;
            double worst = 0.0;
            for (const shape & s : shapes) {
                const double err = compare(type_k, type_v, s);
                if (!(err <= bound)) {
                    printf("%s/%s head_dim %d kv %d queries %d: nmse %g above %g\n",
                        ggml_type_name(type_k), ggml_type_name(type_v), s.head_dim, s.n_kv, s.n_query, err, bound);
                    n_bad++;
                }
                worst = !(err <= worst) ? err : worst;
            }
            printf("%s/%s nmse %.2e\n", ggml_type_name(type_k), ggml_type_name(type_v), worst);
        }
    }
    printf("%d pairs, %d cases each, %d bad\n", (int) (types.size()*types.size()), (int) (sizeof(shapes)/sizeof(shapes[0])), n_bad);
    return n_bad ? 1 : 0;
}
