// Runs a CUDA kernel on a CPU: every thread of a block is a fiber, blocks run one after another.
//
// A fiber runs until it reaches something it must wait for (a barrier, a shuffle, an mbarrier) and then hands over to
// the scheduler, which resumes fibers in one of several orders. Code that is right on a GPU gives the same answer in
// all of them; code that leans on an order the hardware does not promise (a missing __syncthreads, a buffer reused too
// early) gives different answers in some. To make such mistakes show
//   - shared memory starts every block as 0xFF bytes, which read as NaN;
//   - asynchronous operations can be deferred to the last moment the program allows (settings.deferred);
//   - a block in which nothing can run, a barrier left half full, or a misused primitive stops the launch with a
//     message naming kernel, block and cause, which the caller receives as a CUDA error.
// What it cannot see: memory ordering between proxies and scopes, bank conflicts, speed.
#pragma once
#include <functional>
#include <vector>

#include "types.h"

namespace ff::emulation {

// The first three resume threads one by one; the others finish all a warp can do before going to the next warp.
enum class Order { forward, reversed, shuffled, warps, warps_reversed, warps_shuffled };
constexpr const char* kOrderNames[] = {"forward", "reversed", "shuffled", "warps", "warps_reversed", "warps_shuffled"};

struct Settings {
  Order order = Order::forward;
  bool deferred = false;
  unsigned seed = 1;               // of the shuffled orders and of the choice among deferred operations
  int multiprocessors = 3;         // what cudaDeviceGetAttribute reports: small, so that persistent grids loop
};
extern Settings settings;
bool set_order(const char* name);  // false: no such order
extern uint64_t deferred_operations;  // how many were ever put off, so that a test can tell that deferral happened

// ---- launching -------------------------------------------------------------------------------------------------------
constexpr size_t kDefaultShared = 48 << 10, kMaxShared = 227 << 10;

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared,
            const std::function<void()>& body);
cudaError_t allow_dynamic_shared(const void* kernel, size_t bytes);
cudaError_t take_error();          // the last launch's error; resets it
const char* error_message();

// ---- what the primitives are made of ---------------------------------------------------------------------------------
struct Barrier {
  uint32_t arrived = 0, generation = 0;
  int expected = 0;
};

struct Block {
  dim3 grid_size, block_size;
  uint3 index{};
  int size = 0, current = 0;       // threads, and the linear index of the running one
  std::vector<uint3> thread_index;
  char* shared = nullptr;          // dynamic shared memory, then what FF_SHARED declares
};
extern Block block;

inline int thread() { return block.current; }
inline int lane() { return block.current & 31; }
inline int warp() { return block.current >> 5; }

// Ends the launch with a message; callable from a kernel only.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Suspends the running thread while *word == value. `what` describes it in a deadlock message.
void wait_while(const uint32_t* word, uint32_t value, const char* what);
// Lets the other threads run first.
void yield();

void arrive(Barrier& barrier, int expected, const char* what);
void arrive_and_wait(Barrier& barrier, int expected, const char* what);
Barrier& named_barrier(int id);    // 0 is __syncthreads
// Waits for the lanes of `mask` in the running thread's warp.
void warp_barrier(uint32_t mask, const char* what);
// Waits for the 128 threads of the running thread's warpgroup.
void warpgroup_barrier(const char* what);
// Publishes 8 bytes, waits for the lanes of `mask`, and returns the warp's 32 slots, valid until the next exchange.
const uint64_t* warp_exchange(uint32_t mask, uint64_t value, const char* what);

// Runs an asynchronous operation now or, when settings.deferred, at a time of the scheduler's choosing: when no thread
// can run, in random order.
void complete_asynchronously(std::function<void()> operation);
// Called with the message's context when a block has ended; used by primitives that must not be left unfinished.
void at_block_end(void (*check)());
// Called before every block, to reset a primitive's state.
void at_block_start(void (*reset)());

// Address of a shared variable, the same for all threads of the block; `key` identifies the declaration.
void* shared_variable(const void* key, size_t bytes, size_t alignment);
// Offset of an address in the block's shared memory, as a 32-bit shared address on a GPU; faults outside of it.
uint32_t shared_offset(const void* pointer, size_t bytes);

}  // namespace ff::emulation
