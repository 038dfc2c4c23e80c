// Runs a CUDA kernel on a CPU: every thread of a block is a fiber, blocks run one after another, those of a cluster
// together.
//
// A fiber runs until it reaches something it must wait for (a barrier, a shuffle, an mbarrier) and then hands over to
// the scheduler, which resumes fibers in one of several orders. Code that is right on a GPU gives the same answer in
// all of them; code that leans on an order the hardware does not promise (a missing __syncthreads, a buffer reused too
// early) gives different answers in some. To make such mistakes show
//   - shared memory starts every block as 0xFF bytes, which read as NaN, and becomes them again when the block ends;
//   - asynchronous operations can be put off to the last moment the program allows (settings.completion);
//   - a block in which nothing can run, a barrier left half full, or a misused primitive stops the launch with a
//     message naming block and cause, which the caller receives as a CUDA error.
// What it cannot see: memory ordering between proxies and scopes, bank conflicts, speed.
#pragma once
#include <functional>
#include <vector>

#include "types.h"

namespace ff::emulation {

// The first three resume threads one by one; the others finish all a warp can do before going to the next warp.
enum class Order { forward, reversed, shuffled, warps, warps_reversed, warps_shuffled };
constexpr const char* kOrderNames[] = {"forward", "reversed", "shuffled", "warps", "warps_reversed", "warps_shuffled"};

// When asynchronous operations happen: at once, at the last moment, or each as a coin falls.
enum class Completion { at_once, late, mixed };
constexpr const char* kCompletionNames[] = {"at_once", "late", "mixed"};

struct Settings {
  Order order = Order::forward;
  Completion completion = Completion::at_once;
  unsigned seed = 1;               // of the shuffled orders and of what happens late
  int multiprocessors = 3;         // what cudaDeviceGetAttribute reports: small, so that persistent grids loop
};
extern Settings settings;
bool set_order(const char* name);       // false: no such name
bool set_completion(const char* name);
// How many operations were ever put off, so that a test can tell that it happened.
extern uint64_t late_operations;

// ---- launching ------------------------------------------------------------------------------------------------------
constexpr size_t kDefaultShared = 48 << 10, kMaxShared = 227 << 10;
constexpr int kPortableCluster = 8, kMaxCluster = 16;  // blocks; more than 8 only for a kernel that allows it

void launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared,
            const std::function<void()>& body, int cluster = 1);
cudaError_t allow_dynamic_shared(const void* kernel, size_t bytes);
cudaError_t allow_large_clusters(const void* kernel);
cudaError_t take_error();          // the last launch's error; resets it
const char* error_message();

// ---- what the primitives are made of --------------------------------------------------------------------------------
struct Barrier {
  uint32_t arrived = 0, generation = 0;
  int expected = 0;
};

struct Block {
  dim3 grid_size, block_size;
  uint3 index{};
  int size = 0, current = 0;       // threads, and the linear index of the running one
  int cluster = 1, rank = 0;       // blocks of a cluster, and which of them this is
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

// Whether the asynchronous operation that is about to start shall happen late.
bool put_off();
// Runs an asynchronous operation now or, if put off, when no thread can run any more, in random order.
void complete_asynchronously(std::function<void()> operation);
// Called with the message's context when a block has ended; used by primitives that must not be left unfinished.
void at_block_end(void (*check)());
// Called before every block, to reset a primitive's state.
void at_block_start(void (*reset)());

// Address of a shared variable, the same for all threads of the block; `key` identifies the declaration.
void* shared_variable(const void* key, size_t bytes, size_t alignment);
// Offset of an address in the block's shared memory, as a 32-bit shared address on a GPU; faults outside of it.
uint32_t shared_offset(const void* pointer, size_t bytes);

// ---- clusters -------------------------------------------------------------------------------------------------------
// All threads of the cluster that have not ended arrive before any returns from waiting.
void cluster_arrive();
void cluster_wait();
// A shared address of this block as one of block `rank` of the cluster, which must have started and not ended.
void* remote_address(const void* pointer, size_t bytes, int rank);
// Runs `store`, a store to another block's shared memory, now or, if put off, when this thread arrives at the barrier.
void store_remotely(std::function<void()> store);

}  // namespace ff::emulation
