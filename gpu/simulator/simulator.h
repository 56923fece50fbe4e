// The CUDA language, as far as the kernels of gpu/kernels/ use it, on one thread of the processor: this text, the kernels and a
// table of their names are compiled as C++. Test equipment; slow.
//
// Each CUDA thread is a fiber: a stack of its own that is switched to and from. Blocks run one after the other. Barriers, shuffles
// and __syncwarp are places where a fiber waits for the others; between two of them the order of the threads is the launch's
// `schedule`: 0 forwards, 1 backwards, others shuffled anew in every round, with whole warps held back at random. So a missing
// barrier changes results. Dynamic shared memory starts as NaN.
// Not covered: the memory model between blocks, float functions that round differently, cuBLAS, speed.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define SIMULATOR 1
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) float* name = simulator::dynamic_shared.data()

namespace simulator {

struct Index {
    unsigned x, y, z;
};

#if !defined(__x86_64__) || defined(SIMULATOR_UCONTEXT)

#include <ucontext.h>
typedef ucontext_t Context;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void begin_at(Context& context, void (*start)(), char* stack, size_t bytes) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, start, 0);
}

#else // the same by hand: swapcontext asks the kernel at every switch, which takes twenty times as long

typedef void* Context; // the stack pointer; the registers that a call preserves lie above it
__attribute__((naked, noinline)) inline void switch_to(Context& /* rdi */, Context& /* rsi */) {
    asm("push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");
}
inline void begin_at(Context& context, void (*start)(), char* stack, size_t bytes) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--top = nullptr; // `start` finds the stack as a call leaves it
    *--top = reinterpret_cast<void*>(start);
    for (int registers = 0; registers < 6; registers++) *--top = nullptr;
    context = top;
}

#endif

const size_t STACK = 64 << 10;
const unsigned LANES = 32;
const size_t ANY_COUNT = SIZE_MAX; // arguments from somebody who does not know how many there are

struct Fiber {
    enum State { READY, AT_WARP, AT_BLOCK, DONE } state;
    unsigned id;
    Context context;
    std::unique_ptr<char[]> stack;
    unsigned char published[8]; // what a shuffle gives to the other lanes
};

// All that one processor thread simulates: tests launch kernels from several.
thread_local std::vector<Fiber> fibers;
thread_local std::vector<float> dynamic_shared;
thread_local Fiber* current;
thread_local Context scheduler;
thread_local void (*body)(void*);
thread_local void* body_data;
thread_local Index block_index, block_size, grid_size;

inline void wait(Fiber::State state) {
    current->state = state;
    switch_to(current->context, scheduler);
}

inline void start() {
    body(body_data);
    wait(Fiber::DONE);
    abort(); // nobody resumes it
}

template <class T> T shuffle(T value, unsigned lane) {
    static_assert(sizeof(T) <= sizeof(current->published), "a wider value");
    memcpy(current->published, &value, sizeof value);
    wait(Fiber::AT_WARP);
    memcpy(&value, fibers[current->id / LANES * LANES + lane].published, sizeof value);
    wait(Fiber::AT_WARP); // all have read
    return value;
}

struct Random {
    uint64_t state;
    uint64_t next() { // xorshift64*
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545F4914F6CDD1Dull;
    }
};

// One block; a message if it cannot end.
inline const char* run_block(unsigned schedule) {
    const unsigned n = block_size.x;
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; i++) {
        order[i] = schedule == 1 ? n - 1 - i : i;
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        fiber.id = i, fiber.state = Fiber::READY;
        begin_at(fiber.context, start, fiber.stack.get(), STACK);
    }
    Random random = {schedule * 0x9E3779B97F4A7C15ull + 1};
    uint64_t held = 0; // a bit for each warp: for some rounds, so that others come far ahead
    for (;;) {
        if (schedule > 1) {
            for (unsigned i = n - 1; i > 0; i--) std::swap(order[i], order[random.next() % (i + 1)]);
            if (random.next() % 16 == 0) held = random.next();
        }
        bool ran = false;
        for (int attempt = 0; attempt < 2 && !ran; attempt++) {
            if (attempt == 1) held = 0; // nobody else can run
            for (unsigned i : order) {
                if (fibers[i].state != Fiber::READY || (held >> i / LANES & 1)) continue;
                current = &fibers[i];
                switch_to(scheduler, current->context);
                ran = true;
            }
        }
        unsigned at_block = 0, done = 0;
        bool released = false;
        for (unsigned warp = 0; warp < n; warp += LANES) {
            unsigned counts[4] = {};
            for (unsigned i = warp; i < warp + LANES; i++) counts[fibers[i].state]++;
            at_block += counts[Fiber::AT_BLOCK], done += counts[Fiber::DONE];
            if (counts[Fiber::AT_WARP] == LANES) {
                for (unsigned i = warp; i < warp + LANES; i++) fibers[i].state = Fiber::READY;
                released = true;
            }
        }
        if (done == n) return nullptr;
        if (at_block == n) {
            for (Fiber& fiber : fibers) fiber.state = Fiber::READY;
            released = true;
        }
        if (!ran && !released) return "threads wait for others that will not come: a barrier or shuffle that not all of them reach";
    }
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(args[I])...);
}

template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, size_t shared, unsigned schedule, void** args, size_t count) {
    if (count != sizeof...(A) && count != ANY_COUNT) return "another number of arguments than the kernel has";
    auto run = [=] { call(kernel, args, std::index_sequence_for<A...>{}); };
    body = [](void* data) { (*static_cast<decltype(run)*>(data))(); };
    body_data = &run;
    grid_size = {grid[0], grid[1], grid[2]}, block_size = {threads, 1, 1};
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    for (uint64_t k = 0; k < blocks; k++) {
        const uint64_t block = schedule == 1 ? blocks - 1 - k : k;
        block_index = {unsigned(block % grid[0]), unsigned(block / grid[0] % grid[1]), unsigned(block / grid[0] / grid[1])};
        dynamic_shared.assign(shared / sizeof(float), NAN);
        if (const char* error = run_block(schedule)) return error;
    }
    return nullptr;
}

} // namespace simulator

#define threadIdx (simulator::Index{simulator::current->id, 0, 0})
#define blockIdx simulator::block_index
#define blockDim simulator::block_size
#define gridDim simulator::grid_size
#define __syncthreads() simulator::wait(simulator::Fiber::AT_BLOCK)
#define __syncwarp() simulator::wait(simulator::Fiber::AT_WARP)
#define __shfl_xor_sync(mask, value, lanes) simulator::shuffle(value, (simulator::current->id % simulator::LANES) ^ (lanes))

inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Behind the kernels comes the table: SIMULATE(element, kernel) for each.
#define SIMULATE_BEGIN                                                                                                             \
    extern "C" const char* simulate(const char* name, const unsigned* grid, unsigned threads, size_t shared, unsigned schedule,    \
                                    void** args, size_t count) {
#define SIMULATE(element, kernel)                                                                                                  \
    if (!strcmp(name, #kernel "_" #element))                                                                                       \
        return simulator::launch(in_##element::kernel##_##element, grid, threads, shared, schedule, args, count);
#define SIMULATE_END                                                                                                               \
    return "no kernel has this name";                                                                                              \
    }
