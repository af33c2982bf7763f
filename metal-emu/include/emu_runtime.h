// Runtime of the Metal emulator: one threadgroup at a time, every thread of it a fiber.
//
// What a kernel can observe of a GPU is reproduced by rendezvous points: a simdgroup operation completes when every
// live lane of the simdgroup has called it, a threadgroup barrier when every thread of the threadgroup has. Between
// two rendezvous points a lane runs alone, in an order the caller picks, so code that relies on lanes advancing in
// lockstep reads stale or poisoned values instead of passing by luck.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace emu {

constexpr int SIMD_WIDTH  = 32;
constexpr int MAX_BUFFERS = 31; // Metal's limit on buffer arguments
constexpr int MAX_TGMEM   = 31;

// Prints "metal-emu: <kernel>: <message>" to stderr and aborts: a broken kernel must end the run, never pass.
[[noreturn]] void die(const char * fmt, ...) __attribute__((format(printf, 1, 2)));

//
// function constants
//

struct fc_base;

// One per translation unit, i.e. per Metal library: a pipeline sets the function constants of its own library.
struct tu {
    const char * name = "?";
    fc_base    * fcs  = nullptr;
};

struct fc_base {
    fc_base    * next;
    int          index;
    const char * name;
    bool         is_set = false;
    int64_t      value  = 0;

    fc_base(tu * t, int index, const char * name) : next(t->fcs), index(index), name(name) { t->fcs = this; }

    [[noreturn]] void die_unset() const;
};

// Reading a function constant the pipeline did not set is an error on Metal at pipeline creation; here it ends the run.
template <typename T> struct fc : fc_base {
    using fc_base::fc_base;
    operator T() const {
        if (__builtin_expect(!is_set, 0)) { die_unset(); }
        return (T) value;
    }
};

//
// kernel registry
//

enum class bind_kind : uint8_t {
    buffer, tgmem,
    threadgroup_position_in_grid, thread_position_in_threadgroup, thread_position_in_grid, threads_per_threadgroup,
    threadgroups_per_grid, thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
    simdgroups_per_threadgroup, threads_per_simdgroup,
};

struct bind {
    bind_kind kind;
    uint8_t   index;
};

struct kernel {
    const char * name; // host_name, what the host side asks for
    tu         * lib;
    void      (* run)(const bind *);
    const bind * binds;
    kernel     * next;
};

extern kernel * kernels; // all registered kernels, a linked list

struct reg {
    kernel k;
    reg(const char * name, tu * lib, void (*run)(const bind *), const bind * binds) : k{name, lib, run, binds, kernels} { kernels = &k; }
};

struct u3 { uint32_t x, y, z; };

// The arguments of the dispatch that is running.
struct dispatch {
    const kernel * k = nullptr;
    void * buf     [MAX_BUFFERS] = {};
    size_t buf_size[MAX_BUFFERS] = {}; // bytes bound with set_bytes, 0 for buffers
    size_t tg_size [MAX_TGMEM]   = {};
    u3 grid  = {1, 1, 1}; // threadgroups
    u3 group = {1, 1, 1}; // threads a threadgroup
};

// Runs every threadgroup of the dispatch to completion. Dies on divergent collectives, deadlock, memory overrun.
void run(const dispatch & d);

// In what order lanes, simdgroups and threadgroups run: forward, reverse, random or random:SEED. The default is the
// environment variable METAL_EMU_ORDER, or forward.
void set_order(const char * name);

//
// state of the running lane
//

struct simdgroup;

struct fiber {
    void      * sp;
    simdgroup * sg;
    uint16_t    lane;    // in the simdgroup
    uint16_t    tid;     // in the threadgroup
    uint8_t     state;   // see runtime
    uint64_t    waiting; // generation of the simdgroup it waits to end
    u3          pos;     // thread_position_in_threadgroup
};

// What one simdgroup shares in a collective. Two generations: a lane may deposit for the next collective while
// another still reads the last one, it can't get further ahead than that.
struct simdgroup {
    uint64_t gen      = 0;
    int      arrived  = 0;
    int      live     = 0;
    uint32_t live_mask = 0; // lanes that have not returned
    int      index    = 0;
    const char * kind = nullptr;
    void (*complete)(simdgroup &, int parity) = nullptr;
    alignas(16) uint8_t slot[2][SIMD_WIDTH][32];
    alignas(16) uint8_t result[2][32];
    const void * arg0 = nullptr;  // of the first lane to arrive: must be the same on all lanes
    int64_t      arg1 = 0;
    void       * leader[2] = {};  // lane 0's operand
};

extern fiber            * cur;
extern const dispatch   * cur_dispatch;
extern u3                 cur_tg;
extern void             * cur_tgmem[MAX_TGMEM];

static inline bool is_leader() { return cur->lane == 0; }

// Arrive at a collective of the simdgroup named kind; the last lane to arrive runs complete. Returns the parity of
// the generation that ended, the index into slot/result/leader.
int rendezvous(const char * kind, void (*complete)(simdgroup &, int parity));

void threadgroup_barrier();

// Memory of a `threadgroup T x[N]` declaration inside a kernel: one per declaration and threadgroup, NaN-poisoned,
// followed by a guard page.
void * tg_local_raw(int id, size_t size);

template <typename A> A & tg_local(int id) { return *(A *) tg_local_raw(id, sizeof(A)); }

//
// from the dispatch's arguments to a kernel's parameters
//

template <typename T> struct remove_ref        { typedef T type; };
template <typename T> struct remove_ref<T &>   { typedef T type; };
template <typename T> struct is_ref            { static constexpr bool value = false; };
template <typename T> struct is_ref<T &>       { static constexpr bool value = true;  };
template <typename T> struct is_ptr            { static constexpr bool value = false; };
template <typename T> struct is_ptr<T *>       { static constexpr bool value = true;  };
template <typename T> struct to_value {
    static T get(const u3 & v) { return (T) v.x; }
};

u3 builtin(bind_kind kind);

template <typename A> A argument(const bind & b) {
    if constexpr (is_ptr<A>::value) {
        return (A) (b.kind == bind_kind::tgmem ? cur_tgmem[b.index] : cur_dispatch->buf[b.index]);
    } else if constexpr (is_ref<A>::value) {
        typedef typename remove_ref<A>::type T;
        const size_t have = cur_dispatch->buf_size[b.index];
        if (have != 0 && have != sizeof(T)) {
            die("argument %d: the host sent %zu bytes, the kernel's struct has %zu", b.index, have, sizeof(T));
        }
        return *(T *) cur_dispatch->buf[b.index];
    } else {
        return to_value<A>::get(builtin(b.kind));
    }
}

template <typename F> struct caller;
template <typename... A> struct caller<void (*)(A...)> {
    template <size_t... I> struct seq {};
    template <size_t N, size_t... I> struct make : make<N - 1, N - 1, I...> {};
    template <size_t... I> struct make<0, I...> { typedef seq<I...> type; };

    template <size_t... I> static void call(void (*f)(A...), const bind * b, seq<I...>) { f(argument<A>(b[I])...); }
    static void call(void (*f)(A...), const bind * b) { call(f, b, typename make<sizeof...(A)>::type()); }
};

template <auto F> struct thunk {
    static void run(const bind * b) { caller<decltype(F)>::call(F, b); }
};

} // namespace emu
