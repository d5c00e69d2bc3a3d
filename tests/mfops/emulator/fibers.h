// Runs a CUDA kernel on the CPU: the threads of a cluster's blocks are fibers of one thread of the
// host, which change only where they wait for one another; clusters (without any: blocks) run one
// by one.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "compile with -U_FORTIFY_SOURCE: its longjmp refuses to change stacks"
#endif

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace mfops::emulator {

using Where = std::source_location;

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCluster = 8;
constexpr unsigned kWarp = 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kRedZone = 4096 + 16;  // the 16: shared memory is aligned to 16 bytes and no more
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPageBytes = 64 * 1024;  // a multiple of every page size
constexpr int kPoison = 0xff;             // bytes that are NaN in every type
constexpr int kFault = 2;                 // what setjmp returns after a fault

// A cp.async that was issued and not yet performed, and the number of its group.
struct Copy {
    void* to;
    const void* from;
    int bytes;
    size_t group;
};

// What all lanes of a warp do together, given each lane's operands.
using Collective = void (*)(void* const* operands);

struct Fiber {
    jmp_buf position;
    char* stack = nullptr;
    bool begun = false;

    const char* waits_at = nullptr;  // the operation's name; null at the kernel's end
    Where where;
    Collective collective = nullptr;  // null at a barrier and at the end
    bool for_cluster = false;         // the barrier, or the end, is the cluster's
    void* operands = nullptr;         // on the fiber's own stack

    std::vector<Copy> copies;  // oldest first
    size_t closed_groups = 0;
};

// The order in which threads run where CUDA leaves it open, from the environment: "ascending" (also
// where it is unset), "descending" or the seed of a shuffle.
struct Order {
    enum { kAscending, kDescending, kShuffled } kind = kAscending;
    std::minstd_rand random;

    Order() {
        const char* variable = std::getenv("MFOPS_EMULATOR_ORDER");
        const std::string setting = variable ? variable : "ascending";
        if (setting == "descending") kind = kDescending;
        if (setting == "ascending" || setting == "descending") return;
        if (setting.empty() || setting.find_first_not_of("0123456789") != std::string::npos) {
            throw std::invalid_argument("MFOPS_EMULATOR_ORDER=" + setting);
        }
        kind = kShuffled;
        random.seed(std::stoul(setting));
    }
    // Fills `sequence` with first .. last - 1, what comes first at the back.
    void arrange(std::vector<unsigned>& sequence, unsigned first, unsigned last) {
        sequence.resize(last - first);
        std::iota(sequence.begin(), sequence.end(), first);
        if (kind == kAscending) std::reverse(sequence.begin(), sequence.end());
        if (kind == kShuffled) std::shuffle(sequence.begin(), sequence.end(), random);
    }
};

inline Fiber fibers[kMaxCluster * kMaxThreads];  // of one block after the other
inline unsigned cluster_size;                    // blocks
inline unsigned first_block;                     // of the cluster
inline Fiber* current = nullptr;                 // null in the scheduler
inline std::vector<unsigned> queue;  // the fibers to run after it, the next one at the back
inline jmp_buf scheduler;
inline std::exception_ptr error;  // thrown in a fiber
inline void* fault_address;
inline void (*kernel)(const void* params);
inline const void* kernel_params;
constexpr size_t kArenaBytes = (kRedZone + kMaxSharedBytes + kRedZone) / 32 * 32;
alignas(32) inline char arenas[kMaxCluster][kArenaBytes];
inline char* shared;  // of the current fiber's block
inline char* shared_of(unsigned block) { return arenas[block] + kRedZone; }
inline size_t shared_bytes;

inline std::string place(const Where& where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

[[noreturn]] inline void fail(const std::string& what) {
    throw std::runtime_error("CUDA emulator: block " + std::to_string(blockIdx.x) + ": " + what);
}
// The same from within a kernel's thread.
[[noreturn]] inline void fail(const std::string& what, const Where& where) {
    fail("thread " + std::to_string(threadIdx.x) + " at " + place(where) + ": " + what);
}

[[noreturn]] inline void next();

// Lets the current fiber wait. Not inlined into code that keeps variables in registers over setjmp;
// nor is run_queue.
[[gnu::noinline]] inline void suspend() {
    if (_setjmp(current->position) == 0) next();
}

inline void wait(const char* operation, const Where& where, Collective collective = nullptr,
                 void* operands = nullptr, bool for_cluster = false) {
    current->for_cluster = for_cluster;
    current->waits_at = operation;
    current->where = where;
    current->collective = collective;
    current->operands = operands;
    suspend();
}

inline void fiber_main() {
    for (;;) {  // once a block
        try {
            kernel(kernel_params);
        } catch (...) {
            error = std::current_exception();
        }
        wait(nullptr, {}, nullptr, nullptr, true);
    }
}

// Enters a fiber that was never run, or was abandoned.
[[noreturn]] inline void start(Fiber& fiber) {
    if (!fiber.stack) {
        void* memory = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kPageBytes, PROT_NONE) != 0) std::abort();
        fiber.stack = static_cast<char*>(memory) + kPageBytes;
    }
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    // not the same offset for all: the tops would share a few of the cache's sets
    context.uc_stack.ss_size = kStackBytes - threadIdx.x % 64 * 512;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
    std::abort();  // it does not return
}

// Leaves for the next fiber, or for the scheduler.
[[noreturn]] inline void next() {
    if (queue.empty() || error) _longjmp(scheduler, 1);
    const unsigned index = queue.back(), block = index / blockDim.x;
    queue.pop_back();
    threadIdx.x = index % blockDim.x;
    blockIdx.x = first_block + block;
    shared = shared_of(block);
    current = &fibers[index];
    if (!current->begun) start(*current);
    _longjmp(current->position, 1);
}

// Runs each thread of the queue until it waits.
[[gnu::noinline]] inline void run_queue() {
    const int back = _setjmp(scheduler);
    if (back == 0) next();
    current = nullptr;
    if (back == kFault) {
        char address[32];
        std::snprintf(address, sizeof(address), "%p", fault_address);
        fail("thread " + std::to_string(threadIdx.x) + ": no access to memory at " + address);
    }
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
}

// While it lives, a fault in a fiber ends that fiber instead of the process.
class Faults {
   public:
    Faults() {
        stack_t stack{};
        stack.ss_sp = stack_;
        stack.ss_size = sizeof(stack_);
        sigaltstack(&stack, &old_stack_);  // a fiber's own may have overflowed
        struct sigaction action{};
        action.sa_sigaction = [](int, siginfo_t* info, void*) {
            if (!current) {
                std::signal(SIGSEGV, SIG_DFL);
                return;
            }
            fault_address = info->si_addr;
            _longjmp(scheduler, kFault);
        };
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &old_action_);
    }
    ~Faults() {
        sigaction(SIGSEGV, &old_action_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

   private:
    char stack_[64 * 1024];
    stack_t old_stack_;
    struct sigaction old_action_;
};

// Fails unless the fibers first .. last - 1 all wait at the same call.
inline void check_same(unsigned first, unsigned last) {
    const auto text = [](unsigned index) {
        const Fiber& fiber = fibers[index];
        const unsigned block = index / blockDim.x;
        return (cluster_size > 1 ? "block " + std::to_string(first_block + block) + " " : "") +
               "thread " + std::to_string(index % blockDim.x) + " is at " +
               (fiber.waits_at ? fiber.waits_at + (" (" + place(fiber.where) + ")") : "its end");
    };
    const Fiber& one = fibers[first];
    for (unsigned i = first + 1; i < last; ++i) {
        const Fiber& other = fibers[i];
        if (one.collective != other.collective || one.where.line() != other.where.line() ||
            // Names of one place are mostly one string.
            (one.where.file_name() != other.where.file_name() &&
             std::strcmp(one.where.file_name(), other.where.file_name()) != 0)) {
            fail("threads diverge: " + text(first) + ", " + text(i));
        }
    }
}

// Runs each thread of a block's warp until it waits, then their collective if it is one that they
// wait at; false if they wait for the block or the cluster.
inline bool step(unsigned block, unsigned warp, Order& order) {
    const unsigned start = block * blockDim.x, first = start + warp * kWarp;
    const unsigned last = std::min(first + kWarp, start + blockDim.x);
    order.arrange(queue, first, last);
    run_queue();
    bool any = false;
    for (unsigned i = first; i < last; ++i) any |= fibers[i].collective != nullptr;
    if (!any) return false;
    check_same(first, last);
    if (last - first < kWarp) fail(std::string(fibers[first].waits_at) + " in an incomplete warp");
    void* operands[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) operands[lane] = fibers[first + lane].operands;
    fibers[first].collective(operands);
    return true;
}

// Runs a block up to its next barrier; false if that is the cluster's, or the end. One warp runs up
// to the barrier before the next one starts (a shuffle mixes them), so any two are seen in both
// orders, as far apart as the barriers allow.
inline bool run_block(unsigned block, Order& order) {
    blockIdx.x = first_block + block;
    std::vector<unsigned> warps;
    order.arrange(warps, 0, (blockDim.x + kWarp - 1) / kWarp);
    while (!warps.empty()) {
        if (order.kind == Order::kShuffled) {
            std::swap(warps[order.random() % warps.size()], warps.back());
        }
        if (!step(block, warps.back(), order)) warps.pop_back();
    }
    check_same(block * blockDim.x, (block + 1) * blockDim.x);
    return !fibers[block * blockDim.x].for_cluster;
}

// Blocks take turns as warps do: one runs up to the cluster's barrier before the next one starts.
inline void run_cluster(Order& order) {
    for (unsigned block = 0; block < cluster_size; ++block) {
        std::memset(arenas[block], kPoison, kRedZone + shared_bytes + kRedZone);
    }
    for (unsigned i = 0; i < cluster_size * blockDim.x; ++i) {
        fibers[i].copies.clear();
        fibers[i].closed_groups = 0;
    }
    do {
        std::vector<unsigned> blocks;
        order.arrange(blocks, 0, cluster_size);
        while (!blocks.empty()) {
            if (order.kind == Order::kShuffled) {
                std::swap(blocks[order.random() % blocks.size()], blocks.back());
            }
            if (!run_block(blocks.back(), order)) blocks.pop_back();
        }
        check_same(0, cluster_size * blockDim.x);
    } while (fibers[0].waits_at);
    for (unsigned block = 0; block < cluster_size; ++block) {
        for (size_t i = 0; i < kRedZone; ++i) {
            blockIdx.x = first_block + block;
            if (arenas[block][i] != static_cast<char>(kPoison)) fail("write before shared memory");
            if (shared_of(block)[shared_bytes + i] != static_cast<char>(kPoison)) {
                fail("write past shared memory, " + std::to_string(i) + " bytes after its end");
            }
        }
    }
}

inline void run_grid(unsigned blocks, unsigned threads, size_t bytes,
                     void (*call)(const void* params), const void* params, unsigned cluster = 1) {
    if (blocks == 0 || threads == 0 || threads > kMaxThreads || bytes > kMaxSharedBytes ||
        cluster > kMaxCluster || blocks % cluster != 0) {
        throw std::invalid_argument("CUDA emulator: cannot launch " + std::to_string(blocks) +
                                    " blocks of " + std::to_string(threads) + " threads with " +
                                    std::to_string(bytes) + " bytes of shared memory");
    }
    Order order;
    Faults faults;
    gridDim.x = blocks;
    blockDim.x = threads;
    shared_bytes = bytes;
    kernel = call;
    kernel_params = params;
    std::vector<unsigned> sequence;
    cluster_size = cluster;
    order.arrange(sequence, 0, blocks / cluster);
    try {
        for (; !sequence.empty(); sequence.pop_back()) {
            first_block = sequence.back() * cluster;
            run_cluster(order);
        }
    } catch (...) {
        for (Fiber& fiber : fibers) fiber.begun = false;  // what waits is abandoned
        throw;
    }
}

// For an extern "C" entry point: runs f; null, or what went wrong.
template <class F>
const char* error_of(F&& f) {
    static std::string text;
    try {
        f();
        return nullptr;
    } catch (const std::exception& exception) {
        text = exception.what();
        return text.c_str();
    }
}

}  // namespace mfops::emulator
