// The emulated Metal device: replaces ggml-metal-device.m and ggml-metal-context.m, nothing else. ggml-metal's own
// host code builds the argument structs, grids, function constants and pipeline names and calls what is here.
//
// A dispatch runs to completion when it is encoded, so there is no concurrency between dispatches to get wrong; that
// is one of the things only hardware can show.

#include "ggml-metal-device.h"
#include "ggml-metal-context.h"
#include "ggml-metal-common.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-impl.h"
#include "ggml-metal-ops.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include "emu_runtime.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <set>
#include <string>

//
// function constants, pipelines, library
//

struct ggml_metal_cv {
    std::map<int, int64_t> values;
};

ggml_metal_cv_t ggml_metal_cv_init(void) { return new ggml_metal_cv(); }
void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }
void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t idx) { cv->values[idx] = value; }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) { cv->values[idx] = value; }
void ggml_metal_cv_set_bool (ggml_metal_cv_t cv, bool    value, int32_t idx) { cv->values[idx] = value; }

struct ggml_metal_pipeline {
    const emu::kernel    * k = nullptr;
    std::map<int, int64_t> cv;
    uint64_t               n_dispatch = 0;
};

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) { return new ggml_metal_pipeline(); }
void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) { delete pipeline; }

int ggml_metal_pipeline_max_theads_per_threadgroup(struct ggml_metal_pipeline_with_params) { return 1024; }

struct ggml_metal_library {
    ggml_metal_device_t    dev;
    ggml_metal_pipelines_t pipelines;
};

// METAL_EMU_LOG=FILE: one line a pipeline at exit, "<dispatches> <pipeline name>", the proof of what was executed
static std::map<std::string, ggml_metal_pipeline_t> & all_pipelines() { static auto * m = new std::map<std::string, ggml_metal_pipeline_t>(); return *m; }

static void log_pipelines(void) {
    const char * path = getenv("METAL_EMU_LOG");
    if (!path) {
        return;
    }
    if (FILE * f = fopen(path, "a")) {
        for (const auto & p : all_pipelines()) {
            fprintf(f, "%llu %s\n", (unsigned long long) p.second->n_dispatch, p.first.c_str());
        }
        fclose(f);
    }
}

static const emu::kernel * find_kernel(const char * name) {
    static std::map<std::string, const emu::kernel *> index;
    if (index.empty()) {
        for (const emu::kernel * k = emu::kernels; k; k = k->next) {
            if (!index.emplace(k->name, k).second) {
                emu::die("two kernels are registered as %s", k->name);
            }
        }
    }
    const auto it = index.find(name);
    return it == index.end() ? nullptr : it->second;
}

//
// what the test tools use, by dlsym
//

static ggml_metal_device_t g_dev = nullptr;
static bool                g_dry = false;
static std::set<std::string> g_taken, g_missing;

extern "C" {

GGML_BACKEND_API void metal_emu_set_order(const char * name) { emu::set_order(name); }

// pretend to be another GPU family from the next graph on
GGML_BACKEND_API void metal_emu_set_family(int family);

// base names of the kernels dispatched since the last call, each followed by a space
GGML_BACKEND_API const char * metal_emu_take_kernels(void) {
    static std::string s;
    s.clear();
    for (const auto & k : g_taken) {
        s += k + " ";
    }
    g_taken.clear();
    return s.c_str();
}

// dry: resolve pipelines, run nothing, collect the names that no kernel has
GGML_BACKEND_API void metal_emu_set_dry(bool dry) { g_dry = dry; }

// base names that were asked for and have no kernel, since the last call, each followed by a space
GGML_BACKEND_API const char * metal_emu_take_missing(void) {
    static std::string s;
    s.clear();
    for (const auto & k : g_missing) {
        s += k + " ";
    }
    g_missing.clear();
    return s.c_str();
}

}

ggml_metal_library_t ggml_metal_library_init(ggml_metal_device_t dev) { return new ggml_metal_library { dev, ggml_metal_pipelines_init() }; }
ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t, const char *, bool) { return nullptr; }

void ggml_metal_library_free(ggml_metal_library_t lib) {
    // the pipelines are kept: log_pipelines reads them at exit
    delete lib;
}

ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t lib) { return lib->dev; }

struct ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = {};
    res.pipeline = ggml_metal_pipelines_get(lib->pipelines, name);
    return res;
}

struct ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    ggml_metal_pipeline_with_params res = {};
    res.pipeline = ggml_metal_pipelines_get(lib->pipelines, name);
    if (res.pipeline) {
        return res;
    }
    const emu::kernel * k = find_kernel(base);
    if (!k && g_dry) {
        static ggml_metal_pipeline dummy;
        g_missing.insert(base);
        res.pipeline = &dummy;
        return res;
    }
    if (!k) {
        GGML_LOG_ERROR("%s: kernel not found in any metal library: base = '%s', name = '%s'\n", __func__, base, name);
        return res;
    }
    res.pipeline = ggml_metal_pipeline_init();
    res.pipeline->k = k;
    if (cv) {
        res.pipeline->cv = cv->values;
    }
    ggml_metal_pipelines_add(lib->pipelines, name, res.pipeline);
    if (all_pipelines().empty()) {
        atexit(log_pipelines);
    }
    all_pipelines()[name] = res.pipeline;
    return res;
}

//
// encoder
//

struct ggml_metal_encoder {
    ggml_metal_pipeline_t pipeline = nullptr;
    emu::dispatch         d;
    // set_bytes copies; 64-byte slots keep the alignment the kernels' structs want
    alignas(64) uint8_t   bytes[emu::MAX_BUFFERS][4096];
};

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder(); }
void ggml_metal_encoder_free(ggml_metal_encoder_t encoder) { delete encoder; }
void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop (ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, struct ggml_metal_pipeline_with_params pipeline) {
    if (!pipeline.pipeline) {
        GGML_ABORT("%s: nil Metal pipeline (missing kernel; see compile_pipeline log above)\n", __func__);
    }
    encoder->pipeline = pipeline.pipeline;
    // threadgroup memory lengths belong to the encoder on Metal and would carry over; a kernel that relies on that
    // is a bug waiting, so they are cleared
    memset(encoder->d.tg_size, 0, sizeof(encoder->d.tg_size));
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int idx) {
    GGML_ASSERT(size <= sizeof(encoder->bytes[0])); // Metal's limit is 4 KiB too
    memcpy(encoder->bytes[idx], data, size);
    encoder->d.buf     [idx] = encoder->bytes[idx];
    encoder->d.buf_size[idx] = size;
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, struct ggml_metal_buffer_id buffer, int idx) {
    encoder->d.buf     [idx] = buffer.metal ? (char *) buffer.metal + buffer.offs : nullptr;
    encoder->d.buf_size[idx] = 0;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int idx) {
    GGML_ASSERT(size % 16 == 0);
    encoder->d.tg_size[idx] = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    ggml_metal_pipeline_t p = encoder->pipeline;
    if (g_dry) {
        return;
    }
    g_taken.insert(p->k->name);
    for (emu::fc_base * fc = p->k->lib->fcs; fc; fc = fc->next) {
        const auto it = p->cv.find(fc->index);
        fc->is_set = it != p->cv.end();
        fc->value  = fc->is_set ? it->second : 0;
    }
    size_t total = 0;
    for (size_t s : encoder->d.tg_size) {
        total += s;
    }
    if (total > 32*1024) {
        encoder->d.k = p->k;
        emu::die("%zu bytes of threadgroup memory, Apple GPUs have 32 KiB", total);
    }
    encoder->d.k     = p->k;
    encoder->d.grid  = { (uint32_t) tg0,   (uint32_t) tg1,   (uint32_t) tg2 };
    encoder->d.group = { (uint32_t) tptg0, (uint32_t) tptg1, (uint32_t) tptg2 };
    p->n_dispatch++;
    emu::run(encoder->d);
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t) {}
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t) {}

//
// device
//

struct ggml_metal_device {
    ggml_metal_library_t           library;
    ggml_metal_device_props        props;
    struct ggml_metal_fusion_info * finfo;
};

// device names, ggml_metal_device_id_parse/token, ggml_metal_device_supports_op: the source text of ggml-metal-device.m
#include "device-extract.inc"

// METAL_EMU_FAMILY: which Apple GPU family to be; the name decides the tuning rows, the family the code paths
static const struct { int family; const char * name; } k_families[] = {
    {  7, "Apple M1" }, {  8, "Apple M2" }, {  9, "Apple M4" }, { 10, "Apple M5" },
};

static void set_family(ggml_metal_device_props & p, int family) {
    const char * name = nullptr;
    for (const auto & f : k_families) {
        if (f.family == family) {
            name = f.name;
        }
    }
    if (!name) {
        fprintf(stderr, "metal-emu: METAL_EMU_FAMILY=%d is not one of 7, 8, 9, 10\n", family);
        exit(2);
    }
    snprintf(p.desc, sizeof(p.desc), "%s (emulated on the CPU)", name);
    p.device_id  = ggml_metal_device_id_parse(name);
    p.gpu_family = family;
}

void metal_emu_set_family(int family) { set_family(g_dev->props, family); }

ggml_metal_device_t ggml_metal_device_init(int device, int n_devices) {
    GGML_UNUSED(n_devices);

    ggml_metal_device_t dev = new ggml_metal_device();
    ggml_metal_device_props & p = dev->props;
    p = {};
    p.device                     = device;
    p.device_virt                = device;
    snprintf(p.name, sizeof(p.name), "MTL%d", device);
    p.max_buffer_size            = (size_t) 16 << 30;
    p.max_working_set_size       = (size_t) 16 << 30;
    p.max_theadgroup_memory_size = 32*1024;
    p.has_simdgroup_reduction    = true;
    p.has_simdgroup_mm           = true;
    p.has_unified_memory         = true;
    p.has_bfloat                 = getenv("GGML_METAL_BF16_DISABLE") == nullptr;
    p.has_tensor                 = false; // the tensor API has no emulation
    p.use_residency_sets         = false;
    p.use_shared_buffers         = true;
    p.supports_gpu_family_apple7 = true;
    p.op_offload_min_batch_size  = getenv("GGML_OP_OFFLOAD_MIN_BATCH") ? atoi(getenv("GGML_OP_OFFLOAD_MIN_BATCH")) : 32;

    const char * family = getenv("METAL_EMU_FAMILY");
    set_family(p, family ? atoi(family) : 9);

    const char * fusion_debug = getenv("GGML_METAL_FUSION_DEBUG");
    dev->finfo   = ggml_metal_fusion_info_init(getenv("GGML_METAL_FUSION_DISABLE") == nullptr, fusion_debug ? atoi(fusion_debug) : 0);
    dev->library = ggml_metal_library_init(dev);
    g_dev = dev;

    // the lines a Mac prints, for those who read them
    GGML_LOG_INFO("%s: GPU name:   %s (%s)\n", __func__, p.name, p.desc);
    GGML_LOG_INFO("%s: GPU family: MTLGPUFamilyApple%d  (%d)\n", __func__, p.gpu_family, 1000 + p.gpu_family);
    return dev;
}

void ggml_metal_device_free(ggml_metal_device_t dev) {
    ggml_metal_fusion_info_free(dev->finfo);
    ggml_metal_library_free(dev->library);
    delete dev;
}

void * ggml_metal_device_get_obj  (ggml_metal_device_t dev) { return dev; }
void * ggml_metal_device_get_queue(ggml_metal_device_t dev) { return dev; }
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t dev) { return dev->library; }
void ggml_metal_device_rsets_add(ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_rm (ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_keep_alive(ggml_metal_device_t) {}
struct ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t dev) { return dev->finfo; }

void ggml_metal_device_get_memory(ggml_metal_device_t dev, size_t * free, size_t * total) {
    *free = *total = dev->props.max_working_set_size;
}

// everything is synchronous: events have nothing to wait for
struct ggml_metal_event { int unused; };
void ggml_metal_event_encode_signal(ggml_metal_event_t, ggml_metal_cmd_buf_t) {}
void ggml_metal_event_encode_wait  (ggml_metal_event_t, ggml_metal_cmd_buf_t) {}
ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) { return new ggml_metal_event(); }
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t ev) { delete ev; }
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}

//
// buffers: NaN-poisoned, the end (rounded up to 64 bytes) against an inaccessible page
//

struct ggml_metal_buffer {
    uint8_t * data = nullptr; // what ggml sees
    size_t    size = 0;
    void    * map  = nullptr;
    size_t    map_size = 0;
};

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t, size_t size, bool) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t used = (size + 63)/64*64;
    const size_t body = (used + page - 1)/page*page;
    ggml_metal_buffer_t res = new ggml_metal_buffer();
    res->map_size = body + page;
    res->map = mmap(nullptr, res->map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (res->map == MAP_FAILED) {
        GGML_LOG_ERROR("%s: error: failed to allocate buffer, size = %8.2f MiB\n", __func__, size/1024.0/1024.0);
        delete res;
        return nullptr;
    }
    mprotect((uint8_t *) res->map + body, page, PROT_NONE);
    res->data = (uint8_t *) res->map + body - used;
    res->size = size;
    memset(res->data, 0xff, used);
    return res;
}

ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t, void * ptr, size_t size, size_t) {
    ggml_metal_buffer_t res = new ggml_metal_buffer();
    res->data = (uint8_t *) ptr;
    res->size = size;
    return res;
}

void ggml_metal_buffer_free(ggml_metal_buffer_t buf) {
    if (buf->map) {
        munmap(buf->map, buf->map_size);
    }
    delete buf;
}

void * ggml_metal_buffer_get_base (ggml_metal_buffer_t buf) { return buf->data; }
bool   ggml_metal_buffer_is_shared(ggml_metal_buffer_t) { return true; }

void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t, struct ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) { memset((char *) tensor->data + offset, value, size); }
void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t, struct ggml_tensor * tensor, const void * data, size_t offset, size_t size) { memcpy((char *) tensor->data + offset, data, size); }
void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const struct ggml_tensor * tensor, void * data, size_t offset, size_t size) { memcpy(data, (const char *) tensor->data + offset, size); }
bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const struct ggml_tensor * src, struct ggml_tensor * dst) { memcpy(dst->data, src->data, ggml_nbytes(src)); return true; }
void ggml_metal_buffer_clear(ggml_metal_buffer_t buf, uint8_t value) { memset(buf->data, value, buf->size); }

struct ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buf, const struct ggml_tensor * t) {
    ggml_metal_buffer_id res = { nullptr, 0 };
    const int64_t offs = (int64_t) t->data - (int64_t) buf->data;
    if (offs >= 0 && offs + (int64_t) ggml_nbytes(t) <= (int64_t) buf->size) {
        res = { buf->data, (size_t) offs };
    } else {
        GGML_LOG_ERROR("%s: error: tensor '%s' buffer is nil\n", __func__, t->name);
    }
    return res;
}

//
// context (ggml-metal-context.m)
//

struct ggml_metal {
    ggml_metal_device_t dev;
    ggml_metal_event_t  ev_cpy;
    bool                use_graph_optimize;
    int                 debug_graph;
};

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) {
    const char * val = getenv("GGML_METAL_GRAPH_DEBUG");
    return new ggml_metal { dev, ggml_metal_device_event_init(dev), getenv("GGML_METAL_GRAPH_OPTIMIZE_DISABLE") == nullptr, val ? atoi(val) : 0 };
}

void ggml_metal_free(ggml_metal_t ctx) {
    ggml_metal_device_event_free(ctx->dev, ctx->ev_cpy);
    delete ctx;
}

const char * ggml_metal_get_name(ggml_metal_t ctx) { return ctx->dev->props.name; }
void ggml_metal_synchronize(ggml_metal_t) {}
void ggml_metal_set_tensor_async(ggml_metal_t, struct ggml_tensor * tensor, const void * data, size_t offset, size_t size) { memcpy((char *) tensor->data + offset, data, size); }
void ggml_metal_get_tensor_async(ggml_metal_t, const struct ggml_tensor * tensor, void * data, size_t offset, size_t size) { memcpy(data, (const char *) tensor->data + offset, size); }
bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const struct ggml_tensor * src, struct ggml_tensor * dst) { memcpy(dst->data, src->data, ggml_nbytes(src)); return true; }

enum ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, struct ggml_cgraph * gf) {
    if (gf->n_nodes == 0) {
        return GGML_STATUS_SUCCESS;
    }
    ggml_metal_op_t op = ggml_metal_op_init(ctx->dev, nullptr, gf, ctx->dev->finfo, 0, gf->n_nodes, true, false, ctx->debug_graph);
    for (int idx = 0; idx < ggml_metal_op_n_nodes(op); ++idx) {
        const int res = ggml_metal_op_encode(op, idx);
        if (res == 0) {
            break;
        }
        idx += res - 1;
    }
    ggml_metal_op_free(op);
    return GGML_STATUS_SUCCESS;
}

void ggml_metal_graph_optimize(ggml_metal_t ctx, struct ggml_cgraph * gf) {
    if (ctx->use_graph_optimize) {
        ggml_graph_optimize(gf);
    }
}

void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait  (ggml_metal_t, ggml_metal_event_t) {}
ggml_metal_event_t ggml_metal_get_ev_cpy(ggml_metal_t ctx) { return ctx->ev_cpy; }
void ggml_metal_set_n_cb(ggml_metal_t, int) {}
void ggml_metal_set_abort_callback(ggml_metal_t, ggml_abort_callback, void *) {}
bool ggml_metal_supports_family(ggml_metal_t ctx, int family) { return family <= ctx->dev->props.gpu_family; }
void ggml_metal_capture_next_compute(ggml_metal_t) {}
