// For every combination that supports_op accepts: does the name the host builds have a kernel?
//
//   metal-crosscheck [-v]
//
// The emulated device runs dry: ggml-metal's own host code encodes the op, so tuning tables, head sizes, GPU families
// and fallbacks are the real ones, pipelines are resolved, nothing is executed. Flash attention, SET_ROWS, CPY and
// GET_ROWS must have no gap at all, and no op may have one for a turbo type; gaps that upstream has in other ops are
// listed. Exit code 0: no gap where none may be; 1: there is one; 2: could not run.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

static void (*emu_set_family)(int);
static const char * (*emu_take_missing)(void);

static jmp_buf g_jmp;
static std::string g_abort;

static void on_abort(const char * msg) {
    g_abort = msg ? msg : "abort";
    longjmp(g_jmp, 1);
}

struct tally { long accepted = 0; std::map<std::string, std::string> gaps; }; // gap -> example

static ggml_backend_t        g_dev;
static ggml_backend_buffer_t g_buf;
static std::map<std::string, tally> g_ops;
static std::map<std::string, tally> g_turbo;

// make: build the op in ctx; every tensor then lies at the start of one buffer, which is enough for a dry run
static void check(const char * op, const std::string & what, bool turbo, const std::function<ggml_tensor * (ggml_context *)> & make) {
    static std::vector<uint8_t> arena(1 << 20);
    ggml_context * ctx = ggml_init({ arena.size(), arena.data(), true });
    ggml_tensor * out = make(ctx);
    if (out && ggml_backend_supports_op(g_dev, out)) {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            if (t->view_src) { ggml_backend_view_init(t); } else { ggml_backend_tensor_alloc(g_buf, t, ggml_backend_buffer_get_base(g_buf)); }
        }
        g_abort.clear();
        emu_take_missing();
        if (setjmp(g_jmp) == 0) {
            ggml_cgraph * gf = ggml_new_graph_custom(ctx, 16, false);
            ggml_build_forward_expand(gf, out);
            ggml_backend_graph_compute(g_dev, gf);
        }
        std::string missing = emu_take_missing();
        if (!g_abort.empty()) {
            missing = "(host aborts: " + g_abort.substr(0, g_abort.find('\n')) + ") ";
        }
        for (auto * m : { &g_ops, turbo ? &g_turbo : nullptr }) {
            if (!m) { continue; }
            tally & t = (*m)[op];
            t.accepted++;
            if (!missing.empty()) { t.gaps.emplace(missing, what); }
        }
    }
    ggml_free(ctx);
}

int main(int argc, char ** argv) {
    const bool verbose = argc > 1 && strcmp(argv[1], "-v") == 0;
    const char * path = getenv("GGML_BACKEND_PATH");
    if (!path) {
        fprintf(stderr, "metal-crosscheck: set GGML_BACKEND_PATH to libggml-metal-emu.so\n");
        return 2;
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_reg_t reg = ggml_backend_load(path);
    void * lib = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!reg || !lib) {
        fprintf(stderr, "metal-crosscheck: %s does not load; build it with `make metal-emu`\n", path);
        return 2;
    }
    emu_set_family   = (void (*)(int)) dlsym(lib, "metal_emu_set_family");
    emu_take_missing = (const char * (*)(void)) dlsym(lib, "metal_emu_take_missing");
    ((void (*)(bool)) dlsym(lib, "metal_emu_set_dry"))(true);
    g_dev = ggml_backend_dev_init(ggml_backend_reg_dev_get(reg, 0), nullptr);
    g_buf = ggml_backend_buft_alloc_buffer(ggml_backend_get_default_buffer_type(g_dev), (size_t) 256 << 20);
    ggml_set_abort_callback(on_abort);

    std::vector<ggml_type> types;
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        if (ggml_type_size((ggml_type) t) > 0 && ggml_blck_size((ggml_type) t) > 0) { types.push_back((ggml_type) t); }
    }
    auto turbo = [](ggml_type t) { return t == GGML_TYPE_TURBO2 || t == GGML_TYPE_TURBO3 || t == GGML_TYPE_TURBO4; };
    auto name  = [](ggml_type t) { return std::string(ggml_type_name(t)); };

    const int sizes[] = { 16, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 320, 512, 576 };
    for (int family = 7; family <= 10; ++family) {
        emu_set_family(family);
        for (ggml_type tk : types) for (ggml_type tv : types) for (int dk : sizes) for (int dv : sizes) {
            if (dk % ggml_blck_size(tk) != 0 || dv % ggml_blck_size(tv) != 0) { continue; }
            for (int nq : { 1, 2, 3, 4, 5, 8, 19, 20, 31, 32, 64 }) for (int kv : { 64, 113, 1100, 5000, 20000 }) {
                // the tuning tables know the key length only for the vec kernels
                if (nq >= 20 && kv > 113) { continue; }
                check("FLASH_ATTN_EXT", name(tk) + "/" + name(tv) + " dk=" + std::to_string(dk) + " dv=" + std::to_string(dv) + " queries=" + std::to_string(nq) + " keys=" + std::to_string(kv) + " family=" + std::to_string(family),
                    turbo(tk) || turbo(tv), [&](ggml_context * c) {
                        return ggml_flash_attn_ext(c, ggml_new_tensor_3d(c, GGML_TYPE_F32, dk, nq, 4), ggml_new_tensor_3d(c, tk, dk, kv, 2), ggml_new_tensor_3d(c, tv, dv, kv, 2),
                                ggml_new_tensor_2d(c, GGML_TYPE_F16, kv, nq), 1.0f, 0.0f, 0.0f);
                    });
            }
        }
    }
    // with a second segment of keys and values
    for (int family = 7; family <= 10; ++family) {
        emu_set_family(family);
        for (ggml_type tw : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) for (ggml_type tk : types) for (ggml_type tv : types) for (int dk : sizes) for (int dv : sizes) {
            if (dk % ggml_blck_size(tk) != 0 || dv % ggml_blck_size(tv) != 0 || dk % ggml_blck_size(tw) != 0 || dv % ggml_blck_size(tw) != 0) { continue; }
            for (int nq : { 1, 4, 19, 20, 32 }) for (int kv : { 113, 1100, 20000 }) {
                if (nq >= 20 && kv > 113) { continue; }
                check("FLASH_ATTN_EXT_WINDOW", name(tk) + "/" + name(tv) + " window=" + name(tw) + " dk=" + std::to_string(dk) + " dv=" + std::to_string(dv) + " queries=" + std::to_string(nq) + " keys=" + std::to_string(kv) + " family=" + std::to_string(family),
                    turbo(tk) || turbo(tv), [&](ggml_context * c) {
                        ggml_tensor * out = ggml_flash_attn_ext(c, ggml_new_tensor_3d(c, GGML_TYPE_F32, dk, nq, 4), ggml_new_tensor_3d(c, tk, dk, kv, 2), ggml_new_tensor_3d(c, tv, dv, kv, 2),
                                ggml_new_tensor_2d(c, GGML_TYPE_F16, kv, nq), 1.0f, 0.0f, 0.0f);
                        ggml_flash_attn_ext_add_window(out, ggml_new_tensor_3d(c, tw, dk, 77, 2), ggml_new_tensor_3d(c, tw, dv, 77, 2), ggml_new_tensor_2d(c, GGML_TYPE_F16, 77, nq));
                        return out;
                    });
            }
        }
    }
    for (ggml_type a : types) {
        check("GET_ROWS", name(a), turbo(a), [&](ggml_context * c) { return ggml_get_rows(c, ggml_new_tensor_2d(c, a, 1024, 8), ggml_new_tensor_1d(c, GGML_TYPE_I32, 4)); });
        for (ggml_type b : types) {
            if (a == GGML_TYPE_F32 || a == GGML_TYPE_F16 || a == GGML_TYPE_BF16) {
                for (ggml_type ti : { GGML_TYPE_I32, GGML_TYPE_I64 }) {
                    if (a != GGML_TYPE_F32 && a != b) { continue; } // ggml_set_rows takes f32, or copies
                    check("SET_ROWS", name(a) + " -> " + name(b), turbo(b), [&](ggml_context * c) -> ggml_tensor * {
                        if (a != GGML_TYPE_F32 && a != GGML_TYPE_F16) { return nullptr; }
                        return ggml_set_rows(c, ggml_new_tensor_2d(c, b, 1024, 8), ggml_new_tensor_2d(c, a, 1024, 4), ggml_new_tensor_1d(c, ti, 4));
                    });
                }
            }
            check("CPY", name(a) + " -> " + name(b), turbo(a) || turbo(b), [&](ggml_context * c) { return ggml_cpy(c, ggml_new_tensor_2d(c, a, 1024, 4), ggml_new_tensor_2d(c, b, 1024, 4)); });
        }
        check("CONCAT", name(a), turbo(a), [&](ggml_context * c) { return ggml_concat(c, ggml_new_tensor_2d(c, a, 1024, 4), ggml_new_tensor_2d(c, a, 1024, 4), 1); });
        for (ggml_type b : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) for (int n : { 1, 2, 4, 8, 9, 64 }) {
            check("MUL_MAT", name(a) + " x " + name(b) + " n=" + std::to_string(n), turbo(a), [&](ggml_context * c) { return ggml_mul_mat(c, ggml_new_tensor_2d(c, a, 1024, 64), ggml_new_tensor_2d(c, b, 1024, n)); });
            check("MUL_MAT_ID", name(a) + " x " + name(b) + " n=" + std::to_string(n), turbo(a), [&](ggml_context * c) {
                return b == GGML_TYPE_BF16 ? nullptr : ggml_mul_mat_id(c, ggml_new_tensor_3d(c, a, 1024, 64, 8), ggml_new_tensor_3d(c, b, 1024, 2, n), ggml_new_tensor_2d(c, GGML_TYPE_I32, 2, n));
            });
        }
    }

    int bad = 0;
    for (const auto & o : g_ops) {
        const std::string op = o.first;
        const bool ours = op == "FLASH_ATTN_EXT" || op == "FLASH_ATTN_EXT_WINDOW" || op == "SET_ROWS" || op == "CPY" || op == "GET_ROWS";
        const tally & tt = g_turbo[op];
        printf("%-21s %7ld accepted, %ld of them with a turbo type; without a kernel: %zu names, %zu of them for a turbo type\n", op.c_str(), o.second.accepted, tt.accepted, o.second.gaps.size(), tt.gaps.size());
        bad += ours ? o.second.gaps.size() : tt.gaps.size();
        size_t shown = 0;
        for (const auto & g : o.second.gaps) {
            if (!ours && !verbose && shown++ >= 12) { printf("    ... (-v shows all)\n"); break; }
            printf("    %s%s, first for %s\n", ours || tt.gaps.count(g.first) ? "GAP " : "upstream: ", g.first.c_str(), g.second.c_str());
        }
    }
    printf("%d gaps where none may be\n", bad);
    return bad ? 1 : 0;
}
