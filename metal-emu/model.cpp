// Compares a whole model on several sides, token for token: the CPU backend, the CPU backend with exact attention, and
// the emulated Metal device.
//
//   metal-model -m GGUF -f TEXT --side NAME --side NAME [...] --pair K/V[+R] [...] --at T:N [...] [--cache shared|own]
//               [--shard I/M] [-t THREADS]
//   K/V+R: with an exact window of the newest R tokens and the first 4, in q8_0
//   NAME: cpu, exact (the CPU backend, its attention replaced by one in double over ggml's to_float), metal
//
// At token T of the text each side decodes the next N tokens as one ubatch, and their logits are compared.
//
// A quantized cache amplifies rounding: a difference of one part in a million somewhere flips codes in the cache,
// whose steps are a hundredth, and after some layers and tokens two right implementations hold caches that differ by as
// much as each differs from f16. `--cache own` measures that. With `--cache shared`, the default, all sides read the
// bytes of the first one's cache: the earlier ones are copied before each comparison, the rows that the step itself
// writes are compared and then replaced by the first side's, layer by layer. What is left is the arithmetic of the step.
//
// Prints, for each pair, each two sides A, B in the order given, and each compared token:
//   tok PAIR A B POSITION QUERIES KL(A||B) KL(A's f16||A) KL(B's f16||B)
// where f16 is f16/f16 of the same side, in nats, and for each side after the first how much of what it wrote into its
// cache differs from what the first one wrote (shared and quantized only):
//   rows PAIR SIDE POSITION QUERIES DIFFERENT-BYTES BYTES
// With --shard, only every M-th comparison is made; the shards together print what one run would.
//
// Exit code 0: compared everything; 1: a decode failed or a logit is not finite; 2: could not run.

#include "llama.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

[[noreturn]] static void fail(int code, const std::string & text) {
    fprintf(stderr, "metal-model: %s\n", text.c_str());
    exit(code);
}

static std::vector<double> row_to_double(const ggml_tensor * t, const char * p) {
    std::vector<float> f(t->ne[0]);
    if (t->type == GGML_TYPE_F32) {
        memcpy(f.data(), p, f.size()*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(p, f.data(), t->ne[0]);
    }
    return std::vector<double>(f.begin(), f.end());
}

// replaces the result of a FLASH_ATTN_EXT node by attention in double, over the cache and the window if there is one
static void exact_attention(ggml_tensor * t) {
    const ggml_tensor * q = t->src[0];
    float par[3]; // scale, max_bias, logit_softcap
    memcpy(par, t->op_params, sizeof(par));
    if (par[1] != 0.0f || par[2] != 0.0f || t->src[4] || q->ne[3] != 1 || !t->src[3]) {
        fail(2, "the exact attention knows no ALiBi, soft cap, sinks or streams; take another model");
    }
    const int64_t nq = q->ne[1], nh = q->ne[2], nv = t->src[2]->ne[0];
    std::vector<double> top(nq*nh, -INFINITY), sum(nq*nh, 0.0), o(nq*nh*nv, 0.0);
    for (int is = 1; is < 8; is += 4) {
        const ggml_tensor * k = t->src[is], * v = t->src[is + 1], * m = t->src[is + 2];
        if (!k) { continue; }
        const int64_t gqa = nh/k->ne[2], nkv = k->ne[1];
        for (int64_t hk = 0; hk < k->ne[2]; ++hk) {
            std::vector<std::vector<double>> kd(nkv), vd(nkv);
            for (int64_t j = 0; j < nkv; ++j) {
                kd[j] = row_to_double(k, (const char *) k->data + j*k->nb[1] + hk*k->nb[2]);
                vd[j] = row_to_double(v, (const char *) v->data + j*v->nb[1] + hk*v->nb[2]);
            }
            for (int64_t h = hk*gqa; h < (hk + 1)*gqa; ++h) {
                for (int64_t i = 0; i < nq; ++i) {
                    const float       * qi = (const float *) ((const char *) q->data + i*q->nb[1] + h*q->nb[2]);
                    const ggml_fp16_t * mi = (const ggml_fp16_t *) ((const char *) m->data + i*m->nb[1]);
                    const int64_t r = i*nh + h;
                    std::vector<double> p(nkv, -INFINITY);
                    double top_new = top[r];
                    for (int64_t j = 0; j < nkv; ++j) {
                        const float mask = ggml_fp16_to_fp32(mi[j]);
                        if (mask == -INFINITY) { continue; }
                        double d = 0;
                        for (int64_t l = 0; l < k->ne[0]; ++l) { d += qi[l]*kd[j][l]; }
                        p[j] = d*par[0] + mask;
                        top_new = std::max(top_new, p[j]);
                    }
                    if (top_new == -INFINITY) { continue; }
                    const double scale = exp(top[r] - top_new);
                    top[r] = top_new;
                    sum[r] *= scale;
                    for (int64_t l = 0; l < nv; ++l) { o[r*nv + l] *= scale; }
                    for (int64_t j = 0; j < nkv; ++j) {
                        if (p[j] == -INFINITY) { continue; }
                        const double w = exp(p[j] - top_new);
                        sum[r] += w;
                        for (int64_t l = 0; l < nv; ++l) { o[r*nv + l] += w*vd[j][l]; }
                    }
                }
            }
        }
    }
    for (int64_t r = 0; r < nq*nh; ++r) {
        float * dst = (float *) ((char *) t->data + r%nh*t->nb[1] + r/nh*t->nb[2]);
        for (int64_t l = 0; l < nv; ++l) { dst[l] = sum[r] > 0 ? (float) (o[r*nv + l]/sum[r]) : 0.0f; }
    }
}

// the rows that SET_ROWS writes into the caches: taken from one side, compared with the other's and imposed on it
struct exchange {
    std::map<std::string, std::vector<uint8_t>> rows; // by cache tensor
    size_t different = 0, total = 0;
};

enum class rows_mode { leave, take, impose };

struct hooks {
    bool       exact = false;
    rows_mode  mode  = rows_mode::leave;
    exchange * x     = nullptr;
};

static void exchange_rows(ggml_tensor * t, const hooks & h) {
    std::vector<int64_t> idx(t->src[1]->ne[0]);
    if (t->src[1]->type != GGML_TYPE_I64 || t->ne[2] != 1 || ggml_nelements(t->src[1]) != t->src[1]->ne[0]) {
        fail(2, std::string("the rows of ") + t->name + " are not written as expected; metal-model needs a change");
    }
    ggml_backend_tensor_get(t->src[1], idx.data(), 0, ggml_nbytes(t->src[1]));
    const size_t size = ggml_row_size(t->type, t->ne[0]);
    std::vector<uint8_t> rows(idx.size()*size);
    for (size_t i = 0; i < idx.size(); ++i) { ggml_backend_tensor_get(t, &rows[i*size], idx[i]*t->nb[1], size); }
    if (h.mode == rows_mode::take) {
        h.x->rows[t->name] = rows;
        return;
    }
    const std::vector<uint8_t> & other = h.x->rows[t->name];
    if (other.size() != rows.size()) { fail(2, std::string("the two sides write different rows of ") + t->name); }
    for (size_t i = 0; i < rows.size(); ++i) { h.x->different += rows[i] != other[i]; }
    h.x->total += rows.size();
    for (size_t i = 0; i < idx.size(); ++i) { ggml_backend_tensor_set(t, &other[i*size], idx[i]*t->nb[1], size); }
}

// the keys or values of a window as a prompt's attention reads them: the slots, and after them the batch's own rows
static void exchange_window(ggml_tensor * t, const hooks & h) {
    const ggml_tensor * slots = t->src[0];
    while (slots->view_src) { slots = slots->view_src; }
    std::vector<uint8_t> rows(ggml_nbytes(t));
    if (h.mode == rows_mode::take) {
        ggml_backend_tensor_get(t, rows.data(), 0, rows.size());
        h.x->rows[std::string("concat ") + slots->name] = rows;
        return;
    }
    const std::vector<uint8_t> & other = h.x->rows[std::string("concat ") + slots->name];
    if (other.size() != rows.size()) { fail(2, std::string("the two sides read different windows of ") + slots->name); }
    ggml_backend_tensor_set(t, other.data(), 0, other.size());
}

static bool is_window(const ggml_tensor * t) {
    const ggml_tensor * slots = t->src[0];
    while (slots && slots->view_src) { slots = slots->view_src; }
    return t->op == GGML_OP_CONCAT && strncmp(slots->name, "cache_", 6) == 0;
}

static bool eval_callback(ggml_tensor * t, bool ask, void * data) {
    const hooks & h = *(const hooks *) data;
    const bool fa   = h.exact && t->op == GGML_OP_FLASH_ATTN_EXT;
    const bool rows = h.mode != rows_mode::leave && t->op == GGML_OP_SET_ROWS && strncmp(t->name, "cache_", 6) == 0;
    const bool win  = h.mode != rows_mode::leave && is_window(t);
    if (ask) {
        return fa || rows || win;
    }
    if (fa)   { exact_attention(t); }
    if (rows) { exchange_rows(t, h); }
    if (win)  { exchange_window(t, h); }
    return true;
}

struct side {
    std::string name;
    llama_model * model = nullptr;
};

static llama_model * load(const std::string & path, bool metal) {
    llama_model_params p = llama_model_default_params();
    ggml_backend_dev_t devices[2] = { nullptr, nullptr };
    if (metal) {
        devices[0] = ggml_backend_dev_by_name("MTL0");
        if (!devices[0]) { fail(2, "there is no device MTL0; set GGML_BACKEND_PATH to libggml-metal-emu.so"); }
    }
    p.devices      = devices;
    p.n_gpu_layers = metal ? 999 : 0;
    llama_model * m = llama_model_load_from_file(path.c_str(), p);
    if (!m) { fail(2, path + " does not load"); }
    return m;
}

struct context {
    llama_context * ctx;
    hooks h; // what happens during the next decode
    int n_vocab;

    context(const side & s, ggml_type k, ggml_type v, const llama_kv_params & window, int n_ctx, int n_batch, int threads, bool share) {
        llama_context_params p = llama_context_default_params();
        p.n_ctx           = n_ctx;
        p.n_batch         = n_batch;
        p.n_ubatch        = n_batch;
        p.n_threads       = threads;
        p.n_threads_batch = threads;
        p.type_k          = k;
        p.type_v          = v;
        p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        p.offload_kqv     = s.name == "metal";
        p.op_offload      = false;
        p.no_perf         = true;
        if (s.name == "exact" || share) {
            p.cb_eval           = eval_callback;
            p.cb_eval_user_data = &h;
        }
        ctx = llama_init_from_model_kv(s.model, p, &window);
        if (!ctx) { fail(2, std::string("no context for ") + ggml_type_name(k) + "/" + ggml_type_name(v) + " on " + s.name); }
        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(s.model));
    }
    context(const context &) = delete;
    ~context() { llama_free(ctx); }

    // n tokens from position pos as one ubatch; their log-probabilities if want
    std::vector<std::vector<float>> decode(const std::vector<llama_token> & tokens, int pos, int n, bool want) {
        llama_batch b = llama_batch_init(n, 0, 1);
        b.n_tokens = n;
        for (int i = 0; i < n; ++i) {
            b.token[i]     = tokens[pos + i];
            b.pos[i]       = pos + i;
            b.n_seq_id[i]  = 1;
            b.seq_id[i][0] = 0;
            b.logits[i]    = want;
        }
        const int rc = llama_decode(ctx, b);
        llama_batch_free(b);
        if (rc != 0) { fail(1, "decode of " + std::to_string(n) + " tokens at " + std::to_string(pos) + " failed"); }
        std::vector<std::vector<float>> out;
        for (int i = 0; want && i < n; ++i) {
            const float * l = llama_get_logits_ith(ctx, i);
            double top = -INFINITY, sum = 0;
            for (int j = 0; j < n_vocab; ++j) {
                if (!std::isfinite(l[j])) { fail(1, "a logit at token " + std::to_string(pos + i) + " is not finite"); }
                top = std::max(top, (double) l[j]);
            }
            for (int j = 0; j < n_vocab; ++j) { sum += exp(l[j] - top); }
            std::vector<float> lp(n_vocab);
            for (int j = 0; j < n_vocab; ++j) { lp[j] = (float) (l[j] - top - log(sum)); }
            out.push_back(lp);
        }
        return out;
    }

    std::vector<uint8_t> state() const {
        std::vector<uint8_t> s(llama_state_seq_get_size(ctx, 0));
        s.resize(llama_state_seq_get_data(ctx, s.data(), s.size(), 0));
        return s;
    }

    void set_state(const std::vector<uint8_t> & s) {
        llama_memory_clear(llama_get_memory(ctx), true);
        if (!s.empty() && llama_state_seq_set_data(ctx, s.data(), s.size(), 0) == 0) { fail(1, "the cache could not be copied"); }
    }
};

static double kl(const std::vector<float> & p, const std::vector<float> & q) {
    double s = 0;
    for (size_t i = 0; i < p.size(); ++i) { s += exp((double) p[i])*((double) p[i] - q[i]); }
    return s;
}

static ggml_type type_of(const std::string & name) {
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        const char * n = ggml_type_name((ggml_type) t);
        if (n && name == n) { return (ggml_type) t; }
    }
    fail(2, "unknown cache type " + name);
}

struct probe { int pos, n; };

int main(int argc, char ** argv) {
    std::string model, text_file, cache = "shared";
    std::vector<std::string> pairs;
    std::vector<side> sides;
    std::vector<probe> probes;
    int shard = 0, n_shards = 1, threads = 1;
    for (int i = 1; i < argc; i += 2) {
        const std::string arg = argv[i], val = i + 1 < argc ? argv[i + 1] : "";
        probe p = { 0, 0 };
        if      (arg == "-m")       { model = val; }
        else if (arg == "-f")       { text_file = val; }
        else if (arg == "-t")       { threads = atoi(val.c_str()); }
        else if (arg == "--pair" && val.find('/') != std::string::npos) { pairs.push_back(val); }
        else if (arg == "--side" && (val == "cpu" || val == "exact" || val == "metal")) { sides.push_back({ val }); }
        else if (arg == "--cache" && (val == "shared" || val == "own")) { cache = val; }
        else if (arg == "--at" && sscanf(val.c_str(), "%d:%d", &p.pos, &p.n) == 2 && p.pos > 0 && p.n > 0) { probes.push_back(p); }
        else if (arg == "--shard" && sscanf(val.c_str(), "%d/%d", &shard, &n_shards) == 2 && shard < n_shards) { }
        else { fail(2, "usage: metal-model -m GGUF -f TEXT --side cpu|exact|metal ... --pair K/V[+R] ... --at T:N ... [--cache shared|own] [--shard I/M] [-t N]"); }
    }
    if (model.empty() || text_file.empty() || sides.size() < 2 || pairs.empty() || probes.empty()) {
        fail(2, "needs -m, -f, two or more --side, and at least one --pair and one --at");
    }
    std::sort(probes.begin(), probes.end(), [](const probe & x, const probe & y) { return x.pos < y.pos; });
    for (size_t i = 1; i < probes.size(); ++i) {
        if (probes[i].pos < probes[i - 1].pos + probes[i - 1].n) { fail(2, "two --at overlap"); }
    }

    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level == GGML_LOG_LEVEL_ERROR) { fputs(text, stderr); } }, nullptr);
    ggml_backend_load_all();
    llama_backend_init();

    llama_model * models[2] = { nullptr, nullptr }; // on the CPU, on the device
    for (side & s : sides) {
        llama_model *& m = models[s.name == "metal"];
        m = m ? m : load(model, s.name == "metal");
        s.model = m;
    }

    std::ifstream in(text_file);
    std::stringstream text;
    text << in.rdbuf();
    const std::string s = text.str().substr(0, 64*1024);
    std::vector<llama_token> tokens(s.size() + 8);
    const int n_tokens = llama_tokenize(llama_model_get_vocab(sides[0].model), s.data(), (int) s.size(), tokens.data(), (int) tokens.size(), true, false);
    const int n_need = probes.back().pos + probes.back().n;
    if (n_tokens < n_need) { fail(2, text_file + " has " + std::to_string(std::max(n_tokens, 0)) + " tokens, " + std::to_string(n_need) + " are needed"); }

    typedef std::vector<std::vector<float>> logits; // log-probabilities by token
    pairs.erase(std::remove(pairs.begin(), pairs.end(), "f16/f16"), pairs.end());
    pairs.insert(pairs.begin(), "f16/f16");
    std::vector<std::vector<logits>> base(probes.size(), std::vector<logits>(sides.size())); // f16's, by probe and side
    const int n_batch = 64;
    const int n_ctx   = (n_need + 255)/256*256;
    const bool shared = cache == "shared";
    for (size_t ip = 0; ip < pairs.size(); ++ip) {
        const std::string & pair = pairs[ip];
        const size_t slash = pair.find('/');
        const size_t plus  = std::min(pair.find('+'), pair.size());
        const ggml_type k = type_of(pair.substr(0, slash)), v = type_of(pair.substr(slash + 1, plus - slash - 1));
        llama_kv_params window = llama_kv_default_params();
        window.n_recent    = plus < pair.size() ? atoi(pair.c_str() + plus + 1) : 0;
        window.n_first     = window.n_recent > 0 ? 4 : 0;
        window.type_recent = GGML_TYPE_Q8_0;
        // what f16 rounds away does not grow: those caches only start from the same bytes
        const bool impose = shared && (ggml_is_quantized(k) || ggml_is_quantized(v));
        std::vector<std::unique_ptr<context>> ctx;
        for (const side & sd : sides) {
            ctx.push_back(std::make_unique<context>(sd, k, v, window, n_ctx, n_batch, threads, impose));
            ctx.back()->h.exact = sd.name == "exact" && !shared; // a shared cache may come from anywhere
        }
        int pos = 0;
        for (size_t i = 0; i < probes.size(); ++i) {
            const probe & p = probes[i];
            for (int n; pos < p.pos; pos += n) {
                n = std::min(n_batch, p.pos - pos);
                for (size_t is = 0; is < (shared ? 1 : sides.size()); ++is) { ctx[is]->decode(tokens, pos, n, false); }
            }
            const bool mine = (int) i % n_shards == shard;
            if (shared) {
                // the first side too: restoring orders the slots of a window anew, and its rows are exchanged by slot
                const std::vector<uint8_t> state = ctx[0]->state();
                for (size_t is = 0; is < (mine ? sides.size() : 1); ++is) { ctx[is]->set_state(state); }
            }
            exchange x;
            std::vector<logits> out(sides.size());
            for (size_t is = 0; is < (mine || !shared ? sides.size() : 1); ++is) {
                hooks & h = ctx[is]->h;
                h.exact = sides[is].name == "exact" && (mine || !shared);
                h.mode  = !impose || !mine ? rows_mode::leave : is == 0 ? rows_mode::take : rows_mode::impose;
                h.x     = &x;
                x.different = x.total = 0;
                out[is] = ctx[is]->decode(tokens, pos, p.n, mine);
                if (h.mode == rows_mode::impose) {
                    if (x.total == 0) { fail(2, "no write into the cache was seen; metal-model needs a change"); }
                    printf("rows %s %s %d %d %zu %zu\n", pair.c_str(), sides[is].name.c_str(), pos, p.n, x.different, x.total);
                }
                h.exact = h.exact && !shared;
                h.mode  = rows_mode::leave;
            }
            if (mine) {
                if (ip == 0) { base[i] = out; }
                for (size_t a = 0; a < sides.size(); ++a) for (size_t b = a + 1; b < sides.size(); ++b) for (int j = 0; j < p.n; ++j) {
                    printf("tok %s %s %s %d %d %.6e %.6e %.6e\n", pair.c_str(), sides[a].name.c_str(), sides[b].name.c_str(), pos + j, p.n,
                        kl(out[a][j], out[b][j]), kl(base[i][a][j], out[a][j]), kl(base[i][b][j], out[b][j]));
                }
                fflush(stdout);
            }
            pos += p.n;
        }
    }
    for (llama_model * m : models) { if (m) { llama_model_free(m); } }
    return 0;
}
