// The CUDA language, as far as the kernels of gpu/kernels/ use it, on one thread of the processor: this text, the kernels and a
// table of their names are compiled as C++. Test equipment; slow.
//
// Each CUDA thread is a fiber: a stack of its own that is switched to and from. Blocks run one after the other. Barriers, shuffles
// and __syncwarp are places where a fiber waits for the others; between two of them the order of the threads is the launch's
// `schedule`: 0 forwards, 1 backwards, others shuffled anew in every round and block, with whole warps held back at random. So a missing
// barrier changes results. Dynamic shared memory starts as NaN, in f32 and in bf16. Asynchronous copies land at once under an odd
// schedule, and under an even one when they are waited for.
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
#define DYNAMIC_SHARED(name) float* name = (float*)simulator::dynamic_shared.data()

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

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

// An asynchronous copy; of zeros if `from` is null.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;

    void land() const { from ? memcpy(to, from, bytes) : memset(to, 0, bytes); }
};

struct Fiber {
    enum State { READY, AT_WARP, AT_BLOCK, DONE } state;
    unsigned id;
    Context context;
    std::unique_ptr<char[]> stack;
    unsigned char published[8]; // what a shuffle gives to the other lanes
    bool second; // which of the warp's two Operands is the next
    std::vector<Copy> copies; // that have not landed
};

// What the lanes of a warp bring to an instruction that all of them carry out together. There are two in turn: the first lane to go
// on may come to the next instruction before the last has taken its result from this one.
struct Operands {
    float a[16][16], b[8][16];     // B transposed
    unsigned short rows[LANES][8]; // of four matrices
};

// All that one processor thread simulates: tests launch kernels from several.
thread_local std::vector<Fiber> fibers;
thread_local std::vector<Operands> operands; // two for each warp
thread_local std::vector<uint4> dynamic_shared;
thread_local bool copies_land_late;
thread_local const char* mistake; // of a thread, which ends the launch
thread_local Fiber* current;
thread_local Context scheduler;
thread_local void (*body)(void*);
thread_local void* body_data;
thread_local Index block_index, block_size, grid_size;

inline void wait(Fiber::State state) {
    current->state = state;
    switch_to(current->context, scheduler);
}

[[noreturn]] inline void fail(const char* what) {
    mistake = what;
    wait(Fiber::DONE);
    abort(); // nobody resumes it
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

inline Operands& next_operands() {
    current->second = !current->second;
    return operands[current->id / LANES * 2 + current->second];
}

// Row 8·i + j of what the lanes name is row j of matrix i. It is read when its lane comes: what has not landed by then is missing.
inline void read_blocks(unsigned (&x)[4], const void* row, bool transposed) {
    if ((uintptr_t)row % 16) fail("a row of a matrix begins at no multiple of 16 bytes");
    Operands& all = next_operands();
    const unsigned lane = current->id % LANES, g = lane / 4, t = lane % 4;
    memcpy(all.rows[lane], row, sizeof all.rows[lane]);
    wait(Fiber::AT_WARP);
    for (unsigned i = 0; i < 4; i++) {
        const auto* matrix = all.rows + i * 8;
        const unsigned short first = transposed ? matrix[t * 2][g] : matrix[g][t * 2];
        const unsigned short second = transposed ? matrix[t * 2 + 1][g] : matrix[g][t * 2 + 1];
        x[i] = first | (unsigned)second << 16;
    }
}

struct Random {
    uint64_t state;
    uint64_t next() { // xorshift64*
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545F4914F6CDD1Dull;
    }
};

// One block; a message if it cannot end.
inline const char* run_block(unsigned schedule, uint64_t block) {
    const unsigned n = block_size.x;
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; i++) {
        order[i] = schedule == 1 ? n - 1 - i : i;
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        fiber.id = i, fiber.state = Fiber::READY, fiber.second = false;
        fiber.copies.clear();
        begin_at(fiber.context, start, fiber.stack.get(), STACK);
    }
    Random random = {schedule * 0x9E3779B97F4A7C15ull + block * 0xD1B54A32D192ED03ull + 1};
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
                if (mistake) return mistake;
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

// If set: where a launch leaves its arguments, 8 bytes each, instead of running; for a driver that is made of this, which does not know them.
inline thread_local std::vector<uint64_t>* arguments;

template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, size_t shared, unsigned schedule, void** args, size_t count) {
    if (count != sizeof...(A) && count != ANY_COUNT) return "another number of arguments than the kernel has";
    if (arguments) {
        const size_t bytes[] = {sizeof(A)...};
        arguments->assign(sizeof...(A), 0);
        for (size_t i = 0; i < sizeof...(A); i++) memcpy(&(*arguments)[i], args[i], bytes[i]);
        return nullptr;
    }
    auto run = [=] { call(kernel, args, std::index_sequence_for<A...>{}); };
    body = [](void* data) { (*static_cast<decltype(run)*>(data))(); };
    body_data = &run;
    grid_size = {grid[0], grid[1], grid[2]}, block_size = {threads, 1, 1};
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    operands.resize(threads / LANES * 2);
    copies_land_late = schedule % 2 == 0, mistake = nullptr;
    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    for (uint64_t k = 0; k < blocks; k++) {
        const uint64_t block = schedule == 1 ? blocks - 1 - k : k;
        block_index = {unsigned(block % grid[0]), unsigned(block / grid[0] % grid[1]), unsigned(block / grid[0] / grid[1])};
        dynamic_shared.assign((shared + 15) / 16, {~0u, ~0u, ~0u, ~0u});
        if (const char* error = run_block(schedule, block)) return error;
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

inline float exp2_approx(float x) { return exp2f(x); }

// The instructions for bf16 and tensor cores, as gpu/kernels/common.cuh describes them.
template <unsigned N> void copy_async(void* to, const void* from, bool there) {
    if ((uintptr_t)to % N || (uintptr_t)from % N) simulator::fail("a copy between addresses that are no multiples of its size");
    const simulator::Copy copy = {to, there ? from : nullptr, N};
    simulator::copies_land_late ? simulator::current->copies.push_back(copy) : copy.land();
}

inline void wait_for_copies() {
    for (const simulator::Copy& copy : simulator::current->copies) copy.land();
    simulator::current->copies.clear();
}

inline void read_blocks(unsigned (&x)[4], const void* row) { simulator::read_blocks(x, row, false); }
inline void read_blocks_transposed(unsigned (&x)[4], const void* row) { simulator::read_blocks(x, row, true); }

inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    simulator::Operands& all = simulator::next_operands();
    const unsigned lane = simulator::current->id % simulator::LANES, g = lane / 4, t = lane % 4;
    const auto put = [](float* at, unsigned pair) {
        at[0] = __int_as_float(pair << 16), at[1] = __int_as_float(pair & 0xffff0000u);
    };
    for (unsigned i = 0; i < 4; i++) put(&all.a[g + i % 2 * 8][t * 2 + i / 2 * 8], a[i]);
    put(&all.b[g][t * 2], b0), put(&all.b[g][t * 2 + 8], b1);
    simulator::wait(simulator::Fiber::AT_WARP);
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned i = 0; i < 4; i++) sum[i] += all.a[g + i / 2 * 8][k] * all.b[t * 2 + i % 2][k];
    }
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
