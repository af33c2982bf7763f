#include "emu_runtime.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

namespace emu {

kernel         * kernels = nullptr;
fiber          * cur = nullptr;
const dispatch * cur_dispatch = nullptr;
u3               cur_tg = {};
void           * cur_tgmem[MAX_TGMEM] = {};

void die(const char * fmt, ...) {
    char msg[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    fprintf(stderr, "metal-emu: %s: %s", cur_dispatch && cur_dispatch->k ? cur_dispatch->k->name : "-", msg);
    if (cur) {
        fprintf(stderr, " (threadgroup %u,%u,%u, simdgroup %d, lane %d)", cur_tg.x, cur_tg.y, cur_tg.z, cur->sg->index, cur->lane);
    }
    fprintf(stderr, "\n");
    fflush(nullptr);
    abort();
}

void fc_base::die_unset() const { die("function constant %s (index %d) is read but the host does not set it", name, index); }

//
// guarded memory: the block ends where an inaccessible page begins
//

namespace {

const size_t PAGE = (size_t) sysconf(_SC_PAGESIZE);

size_t page_up(size_t n) { return (n + PAGE - 1)/PAGE*PAGE; }

struct guarded {
    uint8_t * base = nullptr;
    size_t    cap  = 0; // usable bytes before the guard page

    uint8_t * get(size_t size) {
        if (size > cap) {
            if (base) { munmap(base - PAGE, cap + 2*PAGE); }
            cap = page_up(size);
            void * p = mmap(nullptr, cap + 2*PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (p == MAP_FAILED) { die("out of memory"); }
            base = (uint8_t *) p + PAGE;
            mprotect(base, cap, PROT_READ | PROT_WRITE);
        }
        return base + cap - size;
    }

    // an address in the guard page behind the block (or before it)
    bool guards(const void * a) const { return base && ((const uint8_t *) a >= base + cap ? (const uint8_t *) a < base + cap + PAGE : (const uint8_t *) a < base && (const uint8_t *) a >= base - PAGE); }
};

guarded                tg_dynamic[MAX_TGMEM];
std::map<int, guarded> tg_static;
std::map<int, void *>  tg_static_live; // of the running threadgroup

// every byte 0xff: a NaN in half, bfloat and float, -1 in integers
void poison(void * p, size_t n) { memset(p, 0xff, n); }

void on_segv(int, siginfo_t * si, void *) {
    for (int i = 0; i < MAX_TGMEM; ++i) {
        if (tg_dynamic[i].guards(si->si_addr)) { die("access outside threadgroup memory [[threadgroup(%d)]], %zu bytes allocated", i, cur_dispatch->tg_size[i]); }
    }
    for (const auto & s : tg_static) {
        if (s.second.guards(si->si_addr)) { die("access outside a threadgroup array declared in the kernel"); }
    }
    if (cur) { die("invalid access at %p: outside every buffer, or the stack of a thread overflowed", si->si_addr); }
    signal(SIGSEGV, SIG_DFL); // not ours
}

// On a GPU an integer division by zero gives an undefined value and goes on; kernels rely on it (a row number modulo
// the size of a mask that is not there). x86 traps: skip the instruction, the result is 0.
void on_fpe(int, siginfo_t *, void * uc_) {
#if defined(__x86_64__)
    ucontext_t * uc = (ucontext_t *) uc_;
    const uint8_t * start = (const uint8_t *) uc->uc_mcontext.gregs[REG_RIP], * p = start;
    while (*p == 0x66 || (*p & 0xf0) == 0x40) { ++p; } // operand size, REX
    if (cur && (*p == 0xf6 || *p == 0xf7)) {
        const uint8_t modrm = p[1], mod = modrm >> 6, rm = modrm & 7;
        p += 2;
        bool disp32 = mod == 2 || (mod == 0 && rm == 5);
        if (mod != 3 && rm == 4) { // SIB
            disp32 = disp32 || (mod == 0 && (*p & 7) == 5);
            ++p;
        }
        p += mod == 1 ? 1 : disp32 ? 4 : 0;
        uc->uc_mcontext.gregs[REG_RAX] = 0;
        uc->uc_mcontext.gregs[REG_RDX] = 0;
        uc->uc_mcontext.gregs[REG_RIP] += p - start;
        return;
    }
#else
    (void) uc_;
#endif
    signal(SIGFPE, SIG_DFL); // not ours
}

//
// order of lanes, simdgroups and threadgroups
//

enum order_kind { FORWARD, REVERSE, RANDOM };

struct order_t {
    order_kind kind = FORWARD;
    uint64_t   rng  = 1;

    order_t() {
        const char * e = getenv("METAL_EMU_ORDER");
        set(e ? e : "forward");
    }

    void set(const std::string & s) {
        rng = 1;
        if      (s == "forward") { kind = FORWARD; }
        else if (s == "reverse") { kind = REVERSE; }
        else if (s.compare(0, 6, "random") == 0 && (s.size() == 6 || s[6] == ':')) {
            kind = RANDOM;
            if (s.size() > 7) { rng = strtoull(s.c_str() + 7, nullptr, 10)*2 + 1; }
        } else {
            die("METAL_EMU_ORDER=%s is not one of forward, reverse, random, random:SEED", s.c_str());
        }
    }

    uint32_t next(uint32_t n) {
        rng = rng*6364136223846793005ull + 1442695040888963407ull;
        return (uint32_t) ((rng >> 33) % n);
    }

    template <typename T> void permute(T * v, int n) {
        if (kind == FORWARD) { for (int i = 0; i < n; ++i) { v[i] = (T) i; } return; }
        if (kind == REVERSE) { for (int i = 0; i < n; ++i) { v[i] = (T) (n - 1 - i); } return; }
        for (int i = 0; i < n; ++i) { v[i] = (T) i; }
        for (int i = n - 1; i > 0; --i) { std::swap(v[i], v[next(i + 1)]); }
    }
};

order_t & order() { static order_t o; return o; }

//
// fibers
//

extern "C" void emu_switch(void ** save, void * load);

#if defined(__x86_64__)
__asm__(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch,.-emu_switch
)");
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl emu_switch
.type emu_switch,%function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8,  d9,  [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8,  d9,  [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch,.-emu_switch
)");
#else
#error "the fiber switch is written for x86-64 and aarch64"
#endif

enum : uint8_t { READY, WAIT_SIMD, WAIT_TG, DONE };

constexpr size_t STACK = 256*1024; // reserved, not committed; a guard page lies below each

std::vector<fiber>     fibers;
std::vector<uint8_t *> stacks; // top of each
std::vector<simdgroup> groups;
void                 * sched_sp = nullptr;

bool runnable(const fiber & f) {
    return f.state == READY || (f.state == WAIT_SIMD && f.sg->gen != f.waiting);
}

// the pass over the lanes of a simdgroup that is under way
struct pass_t {
    fiber * f0    = nullptr; // lane 0
    int     lanes = 0;
    int     at    = 0;
    uint8_t lane[SIMD_WIDTH]; // the order
} pass;

// the next lane of the pass that can run, or null at its end
fiber * next_lane() {
    while (pass.at < pass.lanes) {
        fiber & f = pass.f0[pass.lane[pass.at++]];
        if (runnable(f)) {
            f.state = READY;
            return &f;
        }
    }
    return nullptr;
}

// straight to the next lane; the scheduler is needed only at the end of a pass
void yield() {
    fiber * me = cur;
    if (fiber * f = next_lane()) {
        cur = f;
        emu_switch(&me->sp, f->sp);
    } else {
        emu_switch(&me->sp, sched_sp);
    }
}

void finish_collective(simdgroup & g) {
    const int parity = g.gen & 1;
    // lanes that have returned give no value; not done when they return, others may still read their last one
    for (int i = 0; g.live < SIMD_WIDTH && i < SIMD_WIDTH; ++i) {
        if (!(g.live_mask >> i & 1)) { poison(g.slot[parity][i], sizeof(g.slot[parity][i])); }
    }
    if (g.complete) { g.complete(g, parity); }
    g.arrived = 0;
    g.kind    = nullptr;
    ++g.gen;
}

void fiber_main() {
    for (;;) {
        cur_dispatch->k->run(cur_dispatch->k->binds);

        simdgroup & g = *cur->sg;
        cur->state = DONE;
        g.live--;
        g.live_mask &= ~(1u << cur->lane);
        if (g.arrived > 0 && g.arrived == g.live) { finish_collective(g); }
        yield();
    }
}

void ensure_fibers(size_t n) {
    while (stacks.size() < n) {
        uint8_t * p = (uint8_t *) mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) { die("out of memory for %zu threads", n); }
        mprotect(p, PAGE, PROT_NONE);
        stacks.push_back(p + PAGE + STACK);
    }
    fibers.resize(n);
}

void prepare(fiber & f, uint8_t * top) {
    void ** sp = (void **) top;
#if defined(__x86_64__)
    *--sp = nullptr;               // keeps the stack 16-byte aligned at fiber_main's entry
    *--sp = (void *) fiber_main;   // return address
    for (int i = 0; i < 6; ++i) { *--sp = nullptr; }
#else
    sp -= 20;
    memset(sp, 0, 160);
    sp[11] = (void *) fiber_main;  // x30
#endif
    f.sp = sp;
}

void run_threadgroup(const dispatch & d) {
    const int n  = (int) (d.group.x*d.group.y*d.group.z);
    const int ng = (n + SIMD_WIDTH - 1)/SIMD_WIDTH;

    groups.resize(ng);
    for (int g = 0; g < ng; ++g) {
        simdgroup & s = groups[g];
        s.index     = g;
        s.gen       = 0;
        s.arrived   = 0;
        s.kind      = nullptr;
        s.live      = std::min(SIMD_WIDTH, n - g*SIMD_WIDTH);
        s.live_mask = s.live == 32 ? 0xffffffffu : (1u << s.live) - 1;
        poison(s.slot, sizeof(s.slot));
    }
    for (int i = 0; i < n; ++i) {
        fiber & f = fibers[i];
        f.sg    = &groups[i/SIMD_WIDTH];
        f.lane  = i % SIMD_WIDTH;
        f.tid   = i;
        f.state = READY;
        f.pos   = { i % d.group.x, i/d.group.x % d.group.y, i/(d.group.x*d.group.y) };
        prepare(f, stacks[i]);
    }

    for (int i = 0; i < MAX_TGMEM; ++i) {
        cur_tgmem[i] = nullptr;
        if (d.tg_size[i] > 0) {
            cur_tgmem[i] = tg_dynamic[i].get(d.tg_size[i]);
            poison(cur_tgmem[i], d.tg_size[i]);
        }
    }
    tg_static_live.clear();

    static std::vector<uint16_t> gorder;
    gorder.resize(ng);
    order_t & ord = order();
    pass.lanes = 0;

    for (;;) {
        int done = 0, at_barrier = 0;
        bool progress = false;
        ord.permute(gorder.data(), ng);
        for (int gi = 0; gi < ng; ++gi) {
            simdgroup & g = groups[gorder[gi]];
            const int lanes = std::min(SIMD_WIDTH, n - g.index*SIMD_WIDTH);
            fiber * f0 = &fibers[g.index*SIMD_WIDTH];
            for (;;) {
                if (ord.kind == RANDOM || pass.lanes != lanes) { ord.permute(pass.lane, lanes); }
                pass.f0    = f0;
                pass.lanes = lanes;
                pass.at    = 0;
                fiber * f  = next_lane();
                if (!f) { break; }
                cur = f;
                emu_switch(&sched_sp, f->sp);
                cur = nullptr;
                progress = true;
            }
            for (int l = 0; l < lanes; ++l) {
                done       += f0[l].state == DONE;
                at_barrier += f0[l].state == WAIT_TG;
            }
        }
        if (done == n) { break; }
        if (at_barrier == n) {
            for (int i = 0; i < n; ++i) { fibers[i].state = READY; }
            continue;
        }
        if (at_barrier > 0 && at_barrier + done == n) {
            die("threadgroup_barrier reached by %d of %d threads: %d have returned (threadgroup %u,%u,%u)", at_barrier, n, done, cur_tg.x, cur_tg.y, cur_tg.z);
        }
        if (!progress) {
            const char * kind = "nothing";
            int where = -1;
            for (int g = 0; g < ng; ++g) { if (groups[g].arrived) { kind = groups[g].kind; where = g; } }
            die("deadlock: simdgroup %d waits in %s with %d of %d lanes, %d threads at a threadgroup_barrier (threadgroup %u,%u,%u)",
                    where, kind, where < 0 ? 0 : groups[where].arrived, where < 0 ? 0 : groups[where].live, at_barrier, cur_tg.x, cur_tg.y, cur_tg.z);
        }
    }
}

} // namespace

int rendezvous(const char * kind, void (*complete)(simdgroup &, int parity)) {
    simdgroup & g = *cur->sg;
    if (g.arrived == 0) {
        g.kind     = kind;
        g.complete = complete;
    } else if (g.kind != kind && strcmp(g.kind, kind) != 0) {
        die("divergent collective: this lane is in %s, %d others in %s", kind, g.arrived, g.kind);
    }
    const int parity = g.gen & 1;
    cur->waiting = g.gen;
    cur->state   = WAIT_SIMD;
    if (++g.arrived == g.live) { finish_collective(g); }
    yield();
    return parity;
}

void threadgroup_barrier() {
    if (cur->sg->arrived > 0) {
        die("divergent collective: this lane is in threadgroup_barrier, %d others in %s", cur->sg->arrived, cur->sg->kind);
    }
    cur->state = WAIT_TG;
    yield();
}

void * tg_local_raw(int id, size_t size) {
    void *& p = tg_static_live[id];
    if (!p) {
        p = tg_static[id].get(size);
        poison(p, size);
    }
    return p;
}

u3 builtin(bind_kind kind) {
    const u3 & gr = cur_dispatch->grid, & gs = cur_dispatch->group;
    switch (kind) {
        case bind_kind::threadgroup_position_in_grid:   return cur_tg;
        case bind_kind::thread_position_in_threadgroup: return cur->pos;
        case bind_kind::thread_position_in_grid:        return { cur_tg.x*gs.x + cur->pos.x, cur_tg.y*gs.y + cur->pos.y, cur_tg.z*gs.z + cur->pos.z };
        case bind_kind::threads_per_threadgroup:        return gs;
        case bind_kind::threadgroups_per_grid:          return gr;
        case bind_kind::thread_index_in_threadgroup:    return { cur->tid, 0, 0 };
        case bind_kind::thread_index_in_simdgroup:      return { cur->lane, 0, 0 };
        case bind_kind::simdgroup_index_in_threadgroup: return { (uint32_t) cur->sg->index, 0, 0 };
        case bind_kind::simdgroups_per_threadgroup:     return { (uint32_t) groups.size(), 0, 0 };
        case bind_kind::threads_per_simdgroup:          return { SIMD_WIDTH, 0, 0 };
        default: die("not a value");
    }
}

void set_order(const char * name) { order().set(name); }

void run(const dispatch & d) {
    static bool handler = false;
    if (!handler) {
        handler = true;
        static uint8_t alt[64*1024];
        stack_t ss = {};
        ss.ss_sp = alt; ss.ss_size = sizeof(alt);
        sigaltstack(&ss, nullptr);
        struct sigaction sa = {};
        sa.sa_sigaction = on_segv;
        sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &sa, nullptr);
        sigaction(SIGBUS,  &sa, nullptr);
        sa.sa_sigaction = on_fpe;
        sigaction(SIGFPE,  &sa, nullptr);
    }

    cur_dispatch = &d;
    const size_t n = (size_t) d.group.x*d.group.y*d.group.z;
    if (n == 0 || n > 1024) { die("%zu threads a threadgroup", n); }
    ensure_fibers(n);

    const uint64_t total = (uint64_t) d.grid.x*d.grid.y*d.grid.z;
    const order_kind kind = order().kind;
    // random: an affine walk over the threadgroups, no list needed
    uint64_t step = 1, at = 0;
    if (kind == RANDOM && total > 1) {
        auto gcd = [](uint64_t a, uint64_t b) { while (b) { const uint64_t t = a % b; a = b; b = t; } return a; };
        step = 1 + order().next((uint32_t) std::min<uint64_t>(total - 1, 0x7fffffff));
        while (gcd(step, total) != 1) { ++step; }
        at = order().next((uint32_t) std::min<uint64_t>(total, 0x7fffffff));
    }
    for (uint64_t i = 0; i < total; ++i) {
        const uint64_t t = kind == FORWARD ? i : kind == REVERSE ? total - 1 - i : at;
        at = (at + step) % total;
        cur_tg = { (uint32_t) (t % d.grid.x), (uint32_t) (t/d.grid.x % d.grid.y), (uint32_t) (t/d.grid.x/d.grid.y) };
        run_threadgroup(d);
    }
    cur_dispatch = nullptr;
}

} // namespace emu
