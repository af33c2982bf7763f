// Runs ggml's KV-cache operations on the emulated Metal device and judges them.
//
//   metal-pairs [--quick] [--shard I/N] [--only K/V] [--head N] [--keys N] [--ops LIST] [--max-fail N] [-v]
//   LIST: some of fa,window,set_rows,cpy,get_rows,rotation
//
// Flash attention: every pair of cache types that has a turbo type or K != V, {1, 3, 24, 32} queries (vec, vec, matrix,
// dequantize-to-f16), {113, 512, 4097} keys, head sizes {64, 128, 256}, and {40, 48, 72, 80, 96, 112, 192} with 113 keys where the
// block sizes divide them. With a second segment of keys and values (window): every pair, the segment in f16 and q8_0,
// of lengths that are no multiple of a kernel's block. The reference is attention in double over the
// values that ggml's own to_float gives. Each case runs once per (lane order, GPU family): the results must agree
// bit for bit. SET_ROWS and CPY to a quantized type are judged by the squared error against quantize_row_*_ref's,
// CPY from it and GET_ROWS must equal to_float exactly.
//
// Exit code 0: everything passed; 1: something failed; 2: could not run.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <set>
#include <string>
#include <vector>

static void (*emu_set_order)(const char *);
static void (*emu_set_family)(int);
static const char * (*emu_take_kernels)(void);

struct setting { const char * order; int family; };

// the three orders, and every GPU family at least once
static const setting k_settings[] = { { "forward", 7 }, { "reverse", 8 }, { "random:1", 9 }, { "random:2", 10 } };

// how often a case was executed and judged right, by lane order: a right case is right in every order
struct order_count { int runs = 0, ok = 0; };
static std::map<std::string, order_count> g_orders;

// one execution of a case under a setting
struct execution {
    order_count & count;
    explicit execution(const setting & st) : count(g_orders[std::string(st.order).substr(0, std::string(st.order).find(':'))]) {
        emu_set_order(st.order);
        emu_set_family(st.family);
        count.runs++;
    }
    void ok() { count.ok++; }
};

static const ggml_type k_types[] = {
    GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL,
    GGML_TYPE_TURBO2, GGML_TYPE_TURBO3, GGML_TYPE_TURBO4,
};

static bool is_turbo(ggml_type t) { return t == GGML_TYPE_TURBO2 || t == GGML_TYPE_TURBO3 || t == GGML_TYPE_TURBO4; }

struct rng_t {
    uint64_t s;
    explicit rng_t(uint64_t seed) : s(seed*0x9e3779b97f4a7c15ull + 1) {}
    float uniform() { s = s*6364136223846793005ull + 1442695040888963407ull; return (float) ((s >> 40) + 0.5)/16777216.0f; }
    float gauss() { return sqrtf(-2.0f*logf(uniform()))*cosf(6.2831853f*uniform()); }
};

// n values as rows of type t
static std::vector<uint8_t> encode(ggml_type t, const std::vector<float> & x, int64_t ne0) {
    const int64_t nrow = x.size()/ne0;
    std::vector<uint8_t> out(ggml_row_size(t, ne0)*nrow);
    ggml_quantize_chunk(t, x.data(), out.data(), 0, nrow, ne0, nullptr);
    return out;
}

static std::vector<float> decode(ggml_type t, const uint8_t * p, int64_t n) {
    std::vector<float> out(n);
    if (t == GGML_TYPE_F32) { memcpy(out.data(), p, n*4); return out; }
    ggml_get_type_traits(t)->to_float(p, out.data(), n);
    return out;
}

struct result { bool ok; std::string text; };

static std::string fmt(const char * f, ...) {
    char buf[512];
    va_list ap;
    va_start(ap, f);
    vsnprintf(buf, sizeof(buf), f, ap);
    va_end(ap);
    return buf;
}

// a graph of one op on one backend: the caller makes the tensors, data is set by tensor
struct runner {
    ggml_context        * ctx;
    ggml_backend_buffer_t buf = nullptr;

    runner() { ctx = ggml_init({ ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true }); }
    ~runner() { if (buf) { ggml_backend_buffer_free(buf); } ggml_free(ctx); }

    void alloc(ggml_backend_t b) { buf = ggml_backend_alloc_ctx_tensors(ctx, b); }
    bool compute(ggml_backend_t b, ggml_tensor * out) {
        ggml_cgraph * gf = ggml_new_graph(ctx);
        ggml_build_forward_expand(gf, out);
        return ggml_backend_graph_compute(b, gf) == GGML_STATUS_SUCCESS;
    }
};

struct fa_case {
    ggml_type tk, tv;
    int hs, kv, nq;
    // a second segment of keys and values: none if n_win == 0
    ggml_type tw = GGML_TYPE_F16;
    int n_win = 0;
    // with the hint that leads to gathered keys
    bool sparse = false;
};

// keys and values of one type each: memory [head size, KV heads, keys, streams] as in the KV cache, which keeps the
// heads of one token together, and a mask [keys, queries, streams]
struct segment {
    ggml_type tk, tv;
    int n, rows; // keys, and rows of the tensors: those from n on are NaN and must not be read
    std::vector<uint8_t> k, v;
    std::vector<float> kd, vd; // what they decode to
    std::vector<ggml_fp16_t> mask;

    segment(rng_t & rng, ggml_type tk, ggml_type tv, int n, int rows, const fa_case & c, int n_kvh, int ns, float k_size) : tk(tk), tv(tv), n(n), rows(rows) {
        std::vector<float> x((size_t) c.hs*n_kvh*rows*ns);
        for (auto & f : x) { f = k_size*rng.gauss(); }
        k  = encode(tk, x, c.hs);
        kd = decode(tk, k.data(), x.size());
        for (auto & f : x) { f = rng.gauss(); }
        v  = encode(tv, x, c.hs);
        vd = decode(tv, v.data(), x.size());
        mask.assign((size_t) n*c.nq*ns, ggml_fp32_to_fp16(0.0f));
        for (auto * t : { &k, &v }) {
            const size_t row = t->size()/rows/ns;
            for (int is = 0; is < ns; ++is) { std::fill(t->begin() + (is*rows + n)*row, t->begin() + (is*rows + rows)*row, 0xff); }
        }
    }

    void hide(size_t i) { mask[i] = ggml_fp32_to_fp16(-INFINITY); }
    bool hidden(size_t i) const { return ggml_fp16_to_fp32(mask[i]) != 0.0f; }

    // seen as [head size, keys, KV heads, streams]
    ggml_tensor * view(runner & own, ggml_context * ctx, ggml_type t, int hs, int n_kvh, int ns, ggml_backend_t dev) const {
        ggml_tensor * all = ggml_new_tensor_4d(own.ctx, t, hs, n_kvh, rows, ns);
        own.alloc(dev);
        return ggml_view_4d(ctx, all, hs, n, n_kvh, ns, all->nb[2], all->nb[1], all->nb[3], 0);
    }
};

// the keys of a case with a second segment that are masked: every query sees some of both segments, except that one
// query in four sees none of the first, another one none of the second, and query 4 nothing at all
static void hide_window_case(rng_t & rng, const fa_case & c, int ns, segment & cache, segment & win) {
    for (int r = 0; r < ns*c.nq; ++r) {
        const int i = r % c.nq;
        for (int j = 0; j < c.kv; ++j) {
            // a block of the matrix kernel, 8 queries x 64 keys, is hidden whole; the window's is seen whole
            if (i % 4 == 1 || i == 4 || j > c.kv - c.nq + i || (j < 64 && i >= 16 && i < 24) || rng.uniform() < 0.2f) { cache.hide((size_t) r*c.kv + j); }
        }
        for (int j = 0; j < c.n_win; ++j) {
            // one block is hidden whole and one is seen whole
            const bool whole = c.n_win > 64 && j < 64 && i >= 8 && i < 24;
            if (i % 4 == 2 || i == 4 || (whole ? i < 16 : rng.uniform() < 0.5f)) { win.hide((size_t) r*c.n_win + j); }
        }
    }
    if (c.n_win > 64) {
        for (int is = 0; is < ns; ++is) {
            for (int i = 16; i < std::min(24, c.nq); ++i) {
                for (int j = 0; j < 64; ++j) { win.mask[((size_t) is*c.nq + i)*c.n_win + j] = ggml_fp32_to_fp16(0.0f); }
            }
        }
    }
}

static result run_fa(ggml_backend_t dev, const fa_case & c, const std::vector<setting> & settings) {
    // 5 heads to a KV head: more than the 4 that the decode path takes together
    const int n_kvh = 2, gqa = c.nq == 1 ? 5 : 2, nh = n_kvh*gqa;
    // with a second segment: two streams where there are several queries, and mostly attention sinks
    const int ns = c.n_win > 0 && c.nq > 1 ? 2 : 1;
    const bool has_sinks = ns > 1 && c.nq != 24;
    const bool sink_rows = has_sinks && c.tw == GGML_TYPE_F16; // a sink for each row of q, or one a head
    rng_t rng(c.hs*131 + c.kv*17 + c.nq + c.tk*1009 + c.tv*9176 + c.tw*31 + c.n_win*71);

    std::vector<float> q((size_t) c.hs*c.nq*nh*ns), sinks((size_t) nh*(sink_rows ? c.nq*ns : 1));
    for (auto & x : q)     { x = rng.gauss(); }
    for (auto & x : sinks) { x = rng.gauss(); }
    std::vector<segment> segments;
    segments.emplace_back(rng, c.tk, c.tv, c.kv, c.kv, c, n_kvh, ns, 1.0f);
    if (c.n_win > 0) {
        // larger logits than the first segment's: each part has another maximum
        // with 24 queries it ends with its tensors, whose end is that of their buffer: nothing may be read beyond it
        segments.emplace_back(rng, c.tw, c.tw, c.n_win, c.n_win + (c.nq == 24 ? 0 : 5), c, n_kvh, ns, 3.0f);
        hide_window_case(rng, c, ns, segments[0], segments[1]);
    } else {
        // causal over the last keys and a hole in the middle
        for (int i = 0; i < c.nq; ++i) {
            for (int j = 0; j < c.kv; ++j) {
                if (j > c.kv - c.nq + i || (j >= c.kv/3 && j < c.kv/3 + 70 && c.kv > 200)) { segments[0].hide((size_t) i*c.kv + j); }
            }
        }
    }
    const float scale = 1.0f/sqrtf(c.hs);

    std::vector<double> ref((size_t) c.hs*nh*c.nq*ns);
    std::vector<double> p;
    for (int r = 0; r < ns*c.nq*nh; ++r) {
        const int h = r % nh, i = r/nh % c.nq, is = r/nh/c.nq;
        const float * qi = &q[(((size_t) is*nh + h)*c.nq + i)*c.hs];
        const double sink = has_sinks ? sinks[sink_rows ? ((size_t) is*c.nq + i)*nh + h : h] : -INFINITY;
        double m = sink;
        p.clear();
        for (const segment & g : segments) {
            for (int j = 0; j < g.n; ++j) {
                double d = -INFINITY;
                if (!g.hidden(((size_t) is*c.nq + i)*g.n + j)) {
                    const float * kj = &g.kd[(((size_t) is*g.rows + j)*n_kvh + h/gqa)*c.hs];
                    float acc[8] = { 0 };
                    for (int l = 0; l < c.hs; l += 8) { for (int u = 0; u < 8; ++u) { acc[u] += qi[l + u]*kj[l + u]; } }
                    d = 0;
                    for (float a : acc) { d += a; }
                    d *= scale;
                }
                p.push_back(d);
                m = std::max(m, d);
            }
        }
        double * o = &ref[(size_t) r*c.hs];
        double s = has_sinks ? exp(sink - m) : 0;
        size_t at = 0;
        for (const segment & g : segments) {
            for (int j = 0; j < g.n; ++j, ++at) {
                if (p[at] == -INFINITY) { continue; }
                const double w = exp(p[at] - m);
                s += w;
                const float * vj = &g.vd[(((size_t) is*g.rows + j)*n_kvh + h/gqa)*c.hs];
                for (int l = 0; l < c.hs; ++l) { o[l] += w*vj[l]; }
            }
        }
        for (int l = 0; l < c.hs; ++l) { o[l] = s > 0 ? o[l]/s : 0; }
    }

    std::vector<float> first;
    double nmse = 0;
    std::string kernels;
    for (const setting & st : settings) {
        execution run(st);
        std::vector<runner> kv(2*segments.size()); // a buffer of its own for each K and V
        runner r;
        ggml_tensor * tq = ggml_new_tensor_4d(r.ctx, GGML_TYPE_F32, c.hs, c.nq, nh, ns);
        std::vector<ggml_tensor *> tk, tv, tm;
        for (const segment & g : segments) {
            tk.push_back(g.view(kv[2*tk.size()],     r.ctx, g.tk, c.hs, n_kvh, ns, dev));
            tv.push_back(g.view(kv[2*tv.size() + 1], r.ctx, g.tv, c.hs, n_kvh, ns, dev));
            tm.push_back(ggml_new_tensor_4d(r.ctx, GGML_TYPE_F16, g.n, c.nq, 1, ns));
        }
        ggml_tensor * ts = has_sinks ? ggml_new_tensor_3d(r.ctx, GGML_TYPE_F32, nh, sink_rows ? c.nq : 1, sink_rows ? ns : 1) : nullptr;
        ggml_tensor * out = ggml_flash_attn_ext(r.ctx, tq, tk[0], tv[0], tm[0], scale, 0.0f, 0.0f);
        ggml_flash_attn_ext_add_sinks(out, ts);
        if (c.sparse) { ggml_flash_attn_ext_set_n_kv_max(out, c.kv); }
        if (c.n_win > 0) { ggml_flash_attn_ext_add_window(out, tk[1], tv[1], tm[1]); }
        if (!ggml_backend_supports_op(dev, out)) {
            // the kernels for any pair take 16 values of a row at a time
            return { c.hs % 16 != 0, "refused by supports_op" };
        }
        r.alloc(dev);
        ggml_backend_tensor_set(tq, q.data(), 0, ggml_nbytes(tq));
        if (ts) { ggml_backend_tensor_set(ts, sinks.data(), 0, ggml_nbytes(ts)); }
        for (size_t i = 0; i < segments.size(); ++i) {
            ggml_backend_tensor_set(tk[i]->view_src, segments[i].k.data(),    0, ggml_nbytes(tk[i]->view_src));
            ggml_backend_tensor_set(tv[i]->view_src, segments[i].v.data(),    0, ggml_nbytes(tv[i]->view_src));
            ggml_backend_tensor_set(tm[i],           segments[i].mask.data(), 0, ggml_nbytes(tm[i]));
        }
        emu_take_kernels();
        if (!r.compute(dev, out)) {
            return { false, "graph failed" };
        }
        kernels = emu_take_kernels();
        std::vector<float> got(ref.size());
        ggml_backend_tensor_get(out, got.data(), 0, ggml_nbytes(out));
        double e = 0, n = 0;
        for (size_t i = 0; i < got.size(); ++i) {
            if (!std::isfinite(got[i])) {
                return { false, fmt("not finite at %zu (order %s, family %d)", i, st.order, st.family) };
            }
            e += (got[i] - ref[i])*(got[i] - ref[i]);
            n += ref[i]*ref[i];
        }
        nmse = e/n;
        // q and the dequantized K pass through half: relative error 2^-11 a value
        if (!(nmse < 5e-6)) {
            return { false, fmt("NMSE %.2e (order %s, family %d; %s)", nmse, st.order, st.family, kernels.c_str()) };
        }
        if (first.empty()) {
            first = got;
        } else if (memcmp(first.data(), got.data(), got.size()*sizeof(float)) != 0) {
            return { false, fmt("order %s, family %d differs from order %s, family %d", st.order, st.family, settings[0].order, settings[0].family) };
        }
        run.ok();
    }

    // which path must have run
    const bool vec = (c.nq < 20 || c.sparse) && c.hs % 32 == 0;
    const bool f16 = c.nq >= 32 && !c.sparse && (ggml_is_quantized(c.tk) || ggml_is_quantized(c.tv));
    const bool has_vec = kernels.find("flash_attn_ext_vec_") != std::string::npos;
    const bool has_cvt = kernels.find("flash_attn_ext_kv_") != std::string::npos && kernels.find("_f16 ") != std::string::npos;
    if (vec != has_vec) {
        return { false, "wrong path: " + kernels };
    }
    if (c.sparse != (kernels.find("_vec_idx") != std::string::npos)) {
        return { false, "wrong path: " + kernels };
    }
    if (f16 && !has_cvt && c.tk != GGML_TYPE_BF16 && c.tv != GGML_TYPE_BF16) {
        return { false, "no dequantization to f16: " + kernels };
    }
    uint64_t hash = 1469598103934665603ull; // FNV-1a: with -v two builds can be compared bit for bit
    for (size_t i = 0; i < first.size()*sizeof(float); ++i) { hash = (hash ^ ((const uint8_t *) first.data())[i])*1099511628211ull; }
    return { true, fmt("NMSE %.1e bits %016llx %s", nmse, (unsigned long long) hash, kernels.c_str()) };
}

// squared error of type t's blocks against x, by group of 32 values
static double sq_err(ggml_type t, const uint8_t * p, const std::vector<float> & x) {
    const std::vector<float> d = decode(t, p, x.size());
    double e = 0;
    for (size_t i = 0; i < x.size(); ++i) { e += (double) (d[i] - x[i])*(d[i] - x[i]); }
    return e;
}

static result judge_encoding(ggml_type t, const std::vector<uint8_t> & got, const std::vector<uint8_t> & ref, const std::vector<float> & x) {
    size_t same = 0;
    const size_t bs = ggml_type_size(t);
    for (size_t i = 0; i < got.size(); i += bs) { same += memcmp(&got[i], &ref[i], bs) == 0; }
    const double e = sq_err(t, got.data(), x), e0 = sq_err(t, ref.data(), x);
    const double frac = (double) same/(ref.size()/bs);
    // upstream's Metal encoder of iq4_nl does not search the scale as its CPU encoder does
    const bool ok = t == GGML_TYPE_IQ4_NL ? e <= 1.2*e0 : e <= 1.0005*e0 && frac >= 0.98;
    return { ok, fmt("%.2f %% of the blocks byte-equal to the reference's, squared error %.6f of it", 100*frac, e/e0) };
}

static std::vector<float> rows(int64_t n, uint64_t seed) {
    rng_t rng(seed);
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) {
        x[i] = rng.gauss()*expf(3.0f*sinf(0.01f*(i/64))); // the groups differ in size by e^6
    }
    std::fill(x.begin() + 64, x.begin() + 128, 0.0f); // a block of zeros
    for (int64_t i = 128; i < 192 && i < n; ++i) { x[i] *= 300.0f; } // a block beyond the largest scale of the turbo types
    return x;
}

static result run_set_rows(ggml_backend_t dev, ggml_type t, ggml_type ti, int64_t ne0, const std::vector<setting> & settings) {
    const int64_t n = 7, total = 11;
    const std::vector<float> x = rows(ne0*n, ne0 + t);
    const std::vector<uint8_t> ref = encode(t, x, ne0);
    const size_t rs = ggml_row_size(t, ne0);
    std::vector<uint8_t> first;
    for (const setting & st : settings) {
        execution run(st);
        runner r;
        ggml_tensor * dst = ggml_new_tensor_2d(r.ctx, t, ne0, total);
        ggml_tensor * src = ggml_new_tensor_2d(r.ctx, GGML_TYPE_F32, ne0, n);
        ggml_tensor * idx = ggml_new_tensor_1d(r.ctx, ti, n);
        ggml_tensor * out = ggml_set_rows(r.ctx, dst, src, idx);
        if (!ggml_backend_supports_op(dev, out)) { return { false, "refused by supports_op" }; }
        r.alloc(dev);
        std::vector<int64_t> i64; std::vector<int32_t> i32;
        for (int64_t i = 0; i < n; ++i) { i64.push_back((i*3 + 1) % total); i32.push_back((int32_t) i64.back()); }
        ggml_backend_tensor_set(src, x.data(), 0, ggml_nbytes(src));
        ggml_backend_tensor_set(idx, ti == GGML_TYPE_I64 ? (void *) i64.data() : (void *) i32.data(), 0, ggml_nbytes(idx));
        std::vector<uint8_t> all(rs*total, 0xa5);
        ggml_backend_tensor_set(dst, all.data(), 0, all.size());
        if (!r.compute(dev, out)) { return { false, "graph failed" }; }
        ggml_backend_tensor_get(dst, all.data(), 0, all.size());
        std::vector<uint8_t> got;
        std::set<int64_t> written;
        for (int64_t i = 0; i < n; ++i) { got.insert(got.end(), &all[rs*i64[i]], &all[rs*i64[i]] + rs); written.insert(i64[i]); }
        for (int64_t i = 0; i < total; ++i) {
            if (!written.count(i) && !std::all_of(&all[rs*i], &all[rs*i] + rs, [](uint8_t b) { return b == 0xa5; })) { return { false, fmt("row %d was written", (int) i) }; }
        }
        if (first.empty()) { first = got; }
        if (first != got) { return { false, fmt("order %s differs", st.order) }; }
        run.ok();
    }
    return judge_encoding(t, first, ref, x);
}

static result run_cpy_to(ggml_backend_t dev, ggml_type t, int64_t ne0, const std::vector<setting> & settings) {
    const int64_t n = 7;
    const std::vector<float> x = rows(ne0*n, ne0 + t + 5);
    const std::vector<uint8_t> ref = encode(t, x, ne0);
    std::vector<uint8_t> first;
    for (const setting & st : settings) {
        execution run(st);
        runner r;
        ggml_tensor * src = ggml_new_tensor_2d(r.ctx, GGML_TYPE_F32, ne0, n);
        ggml_tensor * out = ggml_cpy(r.ctx, src, ggml_new_tensor_2d(r.ctx, t, ne0, n));
        if (!ggml_backend_supports_op(dev, out)) { return { false, "refused by supports_op" }; }
        r.alloc(dev);
        ggml_backend_tensor_set(src, x.data(), 0, ggml_nbytes(src));
        if (!r.compute(dev, out)) { return { false, "graph failed" }; }
        std::vector<uint8_t> got(ref.size());
        ggml_backend_tensor_get(out, got.data(), 0, got.size());
        if (first.empty()) { first = got; }
        if (first != got) { return { false, fmt("order %s differs", st.order) }; }
        run.ok();
    }
    return judge_encoding(t, first, ref, x);
}

// CPY to f32 or f16, or GET_ROWS when to == COUNT
static result run_decode(ggml_backend_t dev, ggml_type t, ggml_type to, int64_t ne0, const std::vector<setting> & settings) {
    const int64_t n = 7;
    std::vector<float> x = rows(ne0*n, ne0 + t + 9);
    for (auto & f : x) { f *= 0.25f; }
    std::vector<uint8_t> data = encode(t, x, ne0);
    if (is_turbo(t)) { // every code of the format
        rng_t rng(7);
        for (auto & b : data) { b = (uint8_t) (rng.uniform()*256); }
    }
    const std::vector<float> want = decode(t, data.data(), x.size());
    for (const setting & st : settings) {
        execution run(st);
        runner r;
        ggml_tensor * src = ggml_new_tensor_2d(r.ctx, t, ne0, n);
        ggml_tensor * idx = ggml_new_tensor_1d(r.ctx, GGML_TYPE_I32, n);
        ggml_tensor * out = to == GGML_TYPE_COUNT ? ggml_get_rows(r.ctx, src, idx) : ggml_cpy(r.ctx, src, ggml_new_tensor_2d(r.ctx, to, ne0, n));
        if (!ggml_backend_supports_op(dev, out)) { return { false, "refused by supports_op" }; }
        r.alloc(dev);
        std::vector<int32_t> ids;
        for (int64_t i = 0; i < n; ++i) { ids.push_back(n - 1 - i); }
        ggml_backend_tensor_set(src, data.data(), 0, ggml_nbytes(src));
        ggml_backend_tensor_set(idx, ids.data(), 0, ggml_nbytes(idx));
        if (!r.compute(dev, out)) { return { false, "graph failed" }; }
        std::vector<uint8_t> raw(ggml_nbytes(out));
        ggml_backend_tensor_get(out, raw.data(), 0, raw.size());
        const std::vector<float> got = decode(out->type, raw.data(), x.size());
        for (int64_t i = 0; i < (int64_t) x.size(); ++i) {
            float w = to == GGML_TYPE_COUNT ? want[(n - 1 - i/ne0)*ne0 + i%ne0] : want[i];
            if (to == GGML_TYPE_F16) { w = ggml_fp16_to_fp32(ggml_fp32_to_fp16(w)); }
            if (got[i] != w) { return { false, fmt("value %d is %g, must be %g (order %s, family %d)", (int) i, got[i], w, st.order, st.family) }; }
        }
        run.ok();
    }
    return { true, "exact" };
}

// the KV cache's rotation: mul_mat with a Hadamard matrix, which the backend may replace by a fast transform
static result run_rotation(ggml_backend_t dev, int n, int64_t rows_, const std::vector<setting> & settings) {
    rng_t rng(n + rows_);
    std::vector<float> h((size_t) n*n), x((size_t) n*rows_);
    for (int i = 0; i < n; ++i) { for (int j = 0; j < n; ++j) { h[(size_t) i*n + j] = (__builtin_popcount(i & j) & 1 ? -1.0f : 1.0f)/sqrtf(n); } }
    for (auto & v : x) { v = rng.gauss(); }
    std::string kernels;
    for (const setting & st : settings) {
        execution run(st);
        runner r;
        ggml_tensor * th = ggml_new_tensor_2d(r.ctx, GGML_TYPE_F32, n, n);
        ggml_tensor * tx = ggml_new_tensor_2d(r.ctx, GGML_TYPE_F32, n, rows_);
        ggml_tensor * out = ggml_mul_mat(r.ctx, th, tx);
        ggml_mul_mat_set_hint(out, GGML_HINT_SRC0_IS_HADAMARD);
        r.alloc(dev);
        ggml_backend_tensor_set(th, h.data(), 0, ggml_nbytes(th));
        ggml_backend_tensor_set(tx, x.data(), 0, ggml_nbytes(tx));
        emu_take_kernels();
        if (!r.compute(dev, out)) { return { false, "graph failed" }; }
        kernels = emu_take_kernels();
        std::vector<float> got(x.size());
        ggml_backend_tensor_get(out, got.data(), 0, ggml_nbytes(out));
        double e = 0, s = 0;
        for (int64_t i = 0; i < rows_; ++i) {
            for (int j = 0; j < n; ++j) {
                double w = 0;
                for (int l = 0; l < n; ++l) { w += (double) h[(size_t) j*n + l]*x[(size_t) i*n + l]; }
                e += (got[i*n + j] - w)*(got[i*n + j] - w);
                s += w*w;
            }
        }
        if (!(e/s < 1e-10)) { return { false, fmt("NMSE %.2e (order %s; %s)", e/s, st.order, kernels.c_str()) }; }
        run.ok();
    }
    return { kernels.find("fwht") != std::string::npos, kernels };
}

int main(int argc, char ** argv) {
    bool quick = false, verbose = false;
    int shard = 0, n_shards = 1, max_fail = 20, only_head = 0, only_keys = 0;
    std::string only, ops = "fa,window,set_rows,cpy,get_rows,rotation";
    for (int i = 1; i < argc; ++i) {
        const std::string a = argv[i];
        const char * val = i + 1 < argc ? argv[i + 1] : "";
        if      (a == "--quick") { quick = true; }
        else if (a == "-v")      { verbose = true; }
        else if (a == "--shard" && sscanf(val, "%d/%d", &shard, &n_shards) == 2 && shard < n_shards) { ++i; }
        else if (a == "--only" && *val)     { only = val; ++i; }
        else if (a == "--head" && *val)     { only_head = atoi(val); ++i; }
        else if (a == "--keys" && *val)     { only_keys = atoi(val); ++i; }
        else if (a == "--ops" && *val)      { ops = val; ++i; }
        else if (a == "--max-fail" && *val) { max_fail = atoi(val); ++i; }
        else { fprintf(stderr, "usage: metal-pairs [--quick] [--shard I/N] [--only K/V] [--head N] [--keys N] [--ops fa,window,set_rows,cpy,get_rows,rotation] [--max-fail N] [-v]\n"); return 2; }
    }
    const char * path = getenv("GGML_BACKEND_PATH");
    if (!path) {
        fprintf(stderr, "metal-pairs: set GGML_BACKEND_PATH to libggml-metal-emu.so\n");
        return 2;
    }
    ggml_log_set([](ggml_log_level level, const char * text, void *) { if (level >= GGML_LOG_LEVEL_WARN) { fputs(text, stderr); } }, nullptr);
    ggml_backend_reg_t reg = ggml_backend_load(path);
    void * lib = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!reg || !lib) {
        fprintf(stderr, "metal-pairs: %s does not load; build it with `make metal-emu`\n", path);
        return 2;
    }
    emu_set_order    = (void (*)(const char *)) dlsym(lib, "metal_emu_set_order");
    emu_set_family   = (void (*)(int)) dlsym(lib, "metal_emu_set_family");
    emu_take_kernels = (const char * (*)(void)) dlsym(lib, "metal_emu_take_kernels");
    ggml_backend_t dev = ggml_backend_dev_init(ggml_backend_reg_dev_get(reg, 0), nullptr);

    const std::vector<setting> settings(std::begin(k_settings), std::end(k_settings));
    std::map<std::string, std::pair<int, int>> counts; // op -> passed, failed
    std::map<std::string, int> slots;                  // sharding is by case number within an op
    int failed = 0;
    const auto t0 = std::chrono::steady_clock::now();
    auto mine = [&](const std::string & op) { return slots[op]++ % n_shards == shard; };
    auto record = [&](const std::string & op, const std::string & name, const result & r) {
        (r.ok ? counts[op].first : counts[op].second)++;
        failed += !r.ok;
        if (!r.ok || verbose) {
            printf("%s %s %s: %s\n", r.ok ? "ok  " : "FAIL", op.c_str(), name.c_str(), r.text.c_str());
            fflush(stdout);
        }
        if (failed > max_fail) { printf("stopped after %d failures\n", failed); exit(1); }
    };
    auto has = [&](const char * op) { return ("," + ops + ",").find(std::string(",") + op + ",") != std::string::npos; };

    for (ggml_type t : k_types) {
        if (!ggml_is_quantized(t) || !only.empty()) { continue; }
        for (int64_t ne0 : { 64, 128, 256, 1024 }) {
            const std::string name = std::string(ggml_type_name(t)) + " ne0=" + std::to_string(ne0);
            for (ggml_type ti : { GGML_TYPE_I64, GGML_TYPE_I32 }) {
                if (has("set_rows") && mine("SET_ROWS")) { record("SET_ROWS", name, run_set_rows(dev, t, ti, ne0, settings)); }
            }
            if (has("cpy") && mine("CPY")) { record("CPY", "f32 -> " + name, run_cpy_to(dev, t, ne0, settings)); }
            if (has("cpy") && t != GGML_TYPE_IQ4_NL) {
                if (mine("CPY")) { record("CPY", name + " -> f32", run_decode(dev, t, GGML_TYPE_F32, ne0, settings)); }
                if (mine("CPY")) { record("CPY", name + " -> f16", run_decode(dev, t, GGML_TYPE_F16, ne0, settings)); }
            }
            if (has("get_rows") && mine("GET_ROWS")) { record("GET_ROWS", name, run_decode(dev, t, GGML_TYPE_COUNT, ne0, settings)); }
        }
    }

    for (int n : { 64, 128, 256 }) {
        for (int64_t nrow : { 1, 9 }) {
            if (has("rotation") && only.empty() && mine("rotation")) { record("rotation", fmt("n=%d rows=%d", n, (int) nrow), run_rotation(dev, n, nrow, settings)); }
        }
    }

    int pairs = 0;
    for (ggml_type tk : k_types) {
        for (ggml_type tv : k_types) {
            if (!has("fa") || !(tk != tv || is_turbo(tk))) { continue; }
            const std::string pair = std::string(ggml_type_name(tk)) + "/" + ggml_type_name(tv);
            if (!only.empty() && only != pair) { continue; }
            // quick: the pairs of turbo types with each other, with f16 and with q8_0
            auto in_quick = [](ggml_type t) { return is_turbo(t) || t == GGML_TYPE_F16 || t == GGML_TYPE_Q8_0; };
            if (quick && !(in_quick(tk) && in_quick(tv))) { continue; }
            ++pairs;
            for (int hs : { 40, 48, 64, 72, 80, 96, 112, 128, 192, 256 }) {
                if (hs % ggml_blck_size(tk) != 0 || hs % ggml_blck_size(tv) != 0) { continue; }
                const bool main_size = hs == 64 || hs == 128 || hs == 256;
                for (int kv : { 113, 512, 1100, 4097 }) {
                    for (int nq : { 1, 3, 24, 32 }) {
                        if (only_head && hs != only_head) { continue; }
                        if (only_keys && kv != only_keys) { continue; }
                        if (!main_size && (quick || kv != 113)) { continue; }
                        // 1100: decode with several heads to a KV head is another path from 1024 keys on
                        if (kv == 1100 && !(nq == 1 && quick)) { continue; }
                        if (quick && (kv == 4097 || (hs == 256 && nq > 1))) { continue; }
                        if (kv == 4097 && nq == 24) { continue; } // the matrix kernel's loop is covered by 512
                        if (!mine("FLASH_ATTN_EXT")) { continue; }
                        const fa_case c = { tk, tv, hs, kv, nq };
                        std::vector<setting> s = settings;
                        if (kv == 4097) { s.resize(3); }
                        record("FLASH_ATTN_EXT", fmt("%s head=%d keys=%d queries=%d", pair.c_str(), hs, kv, nq), run_fa(dev, c, s));
                    }
                }
            }
        }
    }

    std::set<std::string> window_pairs;

    // with a second segment of keys and values: also K = V of the types that have a kernel of their own without it
    for (ggml_type tk : k_types) {
        for (ggml_type tv : k_types) {
            const std::string pair = std::string(ggml_type_name(tk)) + "/" + ggml_type_name(tv);
            if (!has("window") || (!only.empty() && only != pair)) { continue; }
            auto in_quick = [](ggml_type t) { return is_turbo(t) || t == GGML_TYPE_F16 || t == GGML_TYPE_Q8_0; };
            const bool few = !(in_quick(tk) && in_quick(tv)); // fewer cases for the others
            if (quick && few) { continue; }
            for (ggml_type tw : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                for (int hs : { 40, 64, 80, 128, 256 }) {
                    for (int kv : { 113, 1100 }) {
                        for (int n_win : { 1, 77, 132, 200 }) {
                            for (int nq : { 1, 3, 24, 32 }) {
                                if (only_head && hs != only_head) { continue; }
                                if (only_keys && kv != only_keys) { continue; }
                                if (hs % ggml_blck_size(tk) != 0 || hs % ggml_blck_size(tv) != 0 || hs % ggml_blck_size(tw) != 0) { continue; }
                                // all lengths with one head size; the others with one length; 1100: the decode path for several heads
                                if (n_win != 77 && (quick || few || hs != 64 || kv != 113)) {
                                    if (!(n_win == 132 && hs == 64 && kv == 1100 && nq == 1 && !few)) { continue; }
                                } else if (kv == 1100 && (nq != 1 || few || quick)) { continue; }
                                if ((hs == 40 || hs == 256) && (quick || few)) { continue; }
                                // quick: each window type with every second number of queries
                                if (quick && kv == 113 && (nq % 2 == 1 ? nq == 1 : nq == 24) != (tw == GGML_TYPE_F16) && hs != 64) { continue; }
                                if (!mine("WINDOW")) { continue; }
                                window_pairs.insert(pair);
                                const fa_case c = { tk, tv, hs, kv, nq, tw, n_win };
                                const std::string name = fmt("%s window=%s:%d head=%d keys=%d queries=%d", pair.c_str(), ggml_type_name(tw), n_win, hs, kv, nq);
                                record("FLASH_ATTN_EXT_WINDOW", name, run_fa(dev, c, settings));
                                // gathered keys beside a window
                                if (hs == 128 && is_turbo(tk) && is_turbo(tv)) {
                                    fa_case s = c;
                                    s.sparse = true;
                                    record("FLASH_ATTN_EXT_WINDOW", name + " sparse", run_fa(dev, s, settings));
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    for (const auto & c : counts) {
        printf("%-21s %5d passed %5d failed\n", c.first.c_str(), c.second.first, c.second.second);
    }
    for (const auto & o : g_orders) {
        printf("lane order %s: %d executions, %d right\n", o.first.c_str(), o.second.runs, o.second.ok);
    }
    printf("%d K/V pairs, %zu with a window, lane orders forward, reverse, random, GPU families Apple7..10, shard %d/%d, %.0f s\n", pairs, window_pairs.size(), shard, n_shards,
            std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count());
    if (counts.empty()) {
        fprintf(stderr, "metal-pairs: nothing was selected\n");
        return 2;
    }
    return failed ? 1 : 0;
}
