// Scheduling, barriers, clusters and faults of the emulator; see emulator.h.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>

#include "fiber.h"

namespace ff::emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 16 << 10;
constexpr int kMaxThreads = 1024;

struct Fiber {
  Context context;
  bool ended;
  const uint32_t* word;  // suspended while *word == value; null: can run
  uint32_t value;
  const char* waits_for;
  bool arrived;          // at the cluster's barrier, without having waited yet
  uint32_t generation;   // of that barrier, when it arrived
  std::vector<std::function<void()>> remote_stores;  // put off until it arrives
  bool can_run() const { return !ended && (!word || *word != value); }
};

// A block of the cluster that runs.
struct BlockState {
  uint3 index;
  char* shared;
  char* stacks;
  int guarded = 0;       // stacks with a guard page below them, from the first
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  int running;           // threads that have not ended
  bool started;
  Barrier named[16];
  Barrier warps[kMaxThreads];     // indexed by the lowest thread of the mask
  uint32_t warp_masks[kMaxThreads];
  Barrier warpgroups[kMaxThreads / 128];
  uint64_t published[2][kMaxThreads], published_partial[kMaxThreads];
  uint8_t parity[kMaxThreads];
};

// Everything one launch needs; there is one launch at a time.
struct Engine {
  std::vector<std::unique_ptr<BlockState>> blocks;  // by rank in the cluster
  BlockState* now = nullptr;                        // the one that runs
  Context scheduler;
  const std::function<void()>* body = nullptr;
  int running = 0;        // threads of the cluster that have not ended
  int cluster_arrived = 0;
  uint32_t cluster_generation = 0;
  bool faulted = false;
  std::mt19937 random;
  std::vector<std::function<void()>> deferred;
  std::map<const void*, size_t> shared_offsets;
  size_t dynamic_shared = 0, shared_used = 0;
  bool on_fiber = false;  // false: the scheduler itself is running
};
Engine engine;
struct Fault {};  // thrown by fault() where there is no fiber to abandon

// Filled by static initialisers of other files, so they must exist before this file's own have run.
std::vector<void (*)()>& start_resets() {
  static std::vector<void (*)()> list;
  return list;
}
std::vector<void (*)()>& end_checks() {
  static std::vector<void (*)()> list;
  return list;
}
std::mutex launch_mutex;
std::map<const void*, size_t> dynamic_limits;
std::map<const void*, bool> large_clusters;
thread_local cudaError_t last_error = cudaSuccess;
thread_local char message[512];

void write_message(const char* format, va_list arguments) {
  int n = snprintf(message, sizeof message, "emulator: block (%u, %u, %u): ", block.index.x, block.index.y,
                   block.index.z);
  vsnprintf(message + n, sizeof message - n, format, arguments);
}

void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));
void stop(const char* format, ...) {
  if (engine.faulted) return;
  va_list arguments;
  va_start(arguments, format);
  write_message(format, arguments);
  va_end(arguments);
  engine.faulted = true;
}

// Makes block `rank` of the cluster the one that built-in variables and primitives refer to.
void select(int rank) {
  engine.now = engine.blocks[rank].get();
  block.rank = rank;
  block.index = engine.now->index;
  block.shared = engine.now->shared;
}

Fiber& this_fiber() { return engine.now->fibers[block.current]; }
void suspend() { switch_to(this_fiber().context, engine.scheduler); }

// Threads that have ended are not waited for.
void release_cluster() {
  if (!engine.cluster_arrived || engine.cluster_arrived != engine.running) return;
  engine.cluster_arrived = 0;
  engine.cluster_generation++;
}

void perform_remote_stores(Fiber& f) {
  for (auto& store : f.remote_stores) store();
  f.remote_stores.clear();
}

void fiber_entry() {
  engine.now->started = true;
  (*engine.body)();
  Fiber& f = this_fiber();
  perform_remote_stores(f);
  if (f.arrived && f.generation == engine.cluster_generation) engine.cluster_arrived--;
  f.ended = true;
  engine.running--;
  release_cluster();
  // Shared memory goes with its block: who reads it later finds poison, and who writes it disturbs the poison.
  if (--engine.now->running == 0) memset(block.shared, 0xff, engine.shared_used);
  for (;;) suspend();
}

void report_deadlock() {
  struct Waiting {
    int count, rank, thread;  // how many, and the first of them
  };
  std::map<std::string, Waiting> waiting;
  int ended = 0;
  for (int rank = 0; rank < block.cluster; rank++)
    for (int t = 0; t < block.size; t++) {
      const Fiber& f = engine.blocks[rank]->fibers[t];
      ended += f.ended;
      if (!f.ended) waiting.emplace(f.waits_for, Waiting{0, rank, t}).first->second.count++;
    }
  std::string text;
  for (auto& [what, entry] : waiting) {
    text += (text.empty() ? "" : ", ") + std::to_string(entry.count) + " threads wait at " + what +
            " (first: thread " + std::to_string(entry.thread);
    text += block.cluster > 1 ? " of block " + std::to_string(entry.rank) + " of the cluster)" : ")";
  }
  stop("deadlock: %s; %d threads have ended", text.c_str(), ended);
}

// Resumes threads [first, first + count) of the selected block that can run; again until none can when `sticky`.
// Returns whether any ran.
bool run_group(int first, int count, bool sticky) {
  bool ran = false, again;
  do {
    again = false;
    for (int t = first; t < first + count && !engine.faulted; t++) {
      Fiber& f = engine.now->fibers[t];
      if (!f.can_run()) continue;
      f.word = nullptr;
      block.current = t;
      engine.on_fiber = true;
      switch_to(engine.scheduler, f.context);
      engine.on_fiber = false;
      ran = again = true;
    }
  } while (again && sticky && !engine.faulted);
  return ran;
}

void start_block() {
  BlockState& b = *engine.now;
  for (Barrier& barrier : b.named) barrier = {};
  std::fill_n(b.warps, block.size, Barrier{});
  for (Barrier& barrier : b.warpgroups) barrier = {};
  std::fill_n(b.parity, block.size, uint8_t(0));
  memset(block.shared, 0xff, engine.shared_used);
  for (auto reset : start_resets()) reset();
  for (int t = 0; t < block.size; t++) {
    Fiber& f = b.fibers[t];
    f.ended = f.arrived = false;
    f.word = nullptr;
    f.waits_for = "";
    f.remote_stores.clear();
    prepare(f.context, b.stacks + size_t(t) * kStackBytes + kGuardBytes, kStackBytes - kGuardBytes, fiber_entry);
  }
  b.running = block.size;
  b.started = false;
}

void check_end_of_block() {
  for (int i = 0; i < 16; i++) {
    const Barrier& barrier = engine.now->named[i];
    if (barrier.arrived)
      return stop("ended with %u arrivals left at barrier %d, which expects %d", barrier.arrived, i, barrier.expected);
  }
  if (block.cluster > 1)
    for (size_t i = 0; i < engine.shared_used; i++)
      if (block.shared[i] != char(0xff)) return stop("its shared memory was written after it had ended");
  try {
    for (auto check : end_checks()) check();
  } catch (Fault) {
  }
}

// Runs the blocks of one cluster, whose indices are set, together. Orders that finish what a warp can do also finish
// what a block can do before they go to the next.
void run_cluster() {
  engine.deferred.clear();
  engine.running = block.size * block.cluster;
  engine.cluster_arrived = 0;
  for (int rank = 0; rank < block.cluster; rank++) select(rank), start_block();
  const Order order = settings.order;
  const bool by_warp = order >= Order::warps;
  const bool shuffled = order == Order::shuffled || order == Order::warps_shuffled;
  const int group = by_warp ? 32 : 1;
  std::vector<int> ranks(block.cluster), groups((block.size + group - 1) / group);
  std::iota(ranks.begin(), ranks.end(), 0);
  std::iota(groups.begin(), groups.end(), 0);
  if (order == Order::reversed || order == Order::warps_reversed) {
    std::reverse(ranks.begin(), ranks.end());
    std::reverse(groups.begin(), groups.end());
  }
  while (engine.running && !engine.faulted) {
    bool ran = false;
    if (shuffled) std::shuffle(ranks.begin(), ranks.end(), engine.random);
    for (int rank : ranks) {
      select(rank);
      bool again;
      do {
        again = false;
        if (shuffled) std::shuffle(groups.begin(), groups.end(), engine.random);
        for (int g : groups) again |= run_group(g * group, std::min(group, block.size - g * group), by_warp);
        ran |= again;
      } while (again && by_warp && block.cluster > 1 && !engine.faulted);
      if (engine.faulted) return;
    }
    if (ran) continue;
    if (engine.deferred.empty()) return report_deadlock();
    size_t chosen = engine.random() % engine.deferred.size();
    auto operation = std::move(engine.deferred[chosen]);
    engine.deferred.erase(engine.deferred.begin() + chosen);
    try {
      operation();
    } catch (Fault) {
    }
  }
  if (engine.faulted) return;
  if (!engine.deferred.empty())
    return stop("ended with %zu asynchronous copies still in flight", engine.deferred.size());
  for (int rank = 0; rank < block.cluster && !engine.faulted; rank++) select(rank), check_end_of_block();
}

// Stacks and shared memory for clusters of this size; pages that nothing touches cost nothing. Guard pages do: each makes
// two mappings, of which Linux allows a process 65,530, so threads get theirs when they first run. Returns whether it could.
bool prepare_memory(int cluster, int threads) {
  const auto reserve = [](size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
  };
  while (int(engine.blocks.size()) < cluster) {
    auto b = std::make_unique<BlockState>();
    b->stacks = reserve(kMaxThreads * kStackBytes);
    b->shared = reserve(256 << 10);
    if (!b->stacks || !b->shared) return false;
    engine.blocks.push_back(std::move(b));
  }
  for (int rank = 0; rank < cluster; rank++)
    for (int& t = engine.blocks[rank]->guarded; t < threads; t++)
      if (mprotect(engine.blocks[rank]->stacks + t * kStackBytes, kGuardBytes, PROT_NONE)) return false;
  return true;
}

}  // namespace

Settings settings;
Block block;
uint64_t late_operations = 0;

template <int count> static int find_name(const char* const (&names)[count], const char* name) {
  for (int i = 0; i < count; i++)
    if (!strcmp(name, names[i])) return i;
  return -1;
}
bool set_order(const char* name) {
  const int found = find_name(kOrderNames, name);
  if (found >= 0) settings.order = Order(found);
  return found >= 0;
}
bool set_completion(const char* name) {
  const int found = find_name(kCompletionNames, name);
  if (found >= 0) settings.completion = Completion(found);
  return found >= 0;
}

// ---- launching ------------------------------------------------------------------------------------------------------
void launch(const void* kernel, dim3 grid, dim3 block_size, size_t dynamic_shared,
            const std::function<void()>& body, int cluster) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  const uint64_t threads = uint64_t(block_size.x) * block_size.y * block_size.z;
  const size_t limit = dynamic_limits.count(kernel) ? dynamic_limits[kernel] : kDefaultShared;
  if (threads < 1 || threads > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || dynamic_shared > limit) {
    last_error = cudaErrorInvalidConfiguration;
    snprintf(message, sizeof message,
             "emulator: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of dynamic shared memory (limit %zu)", grid.x,
             grid.y, grid.z, block_size.x, block_size.y, block_size.z, dynamic_shared, limit);
    return;
  }
  const int most = large_clusters.count(kernel) ? kMaxCluster : kPortableCluster;
  if (cluster < 1 || cluster > most || grid.x % cluster) {
    last_error = cudaErrorInvalidClusterSize;
    snprintf(message, sizeof message, "emulator: clusters of %d blocks (at most %d) in a grid of (%u, %u, %u)", cluster,
             most, grid.x, grid.y, grid.z);
    return;
  }
  if (!prepare_memory(cluster, int(threads))) {
    last_error = cudaErrorLaunchFailure;
    snprintf(message, sizeof message, "emulator: no memory for the stacks of %d blocks: %s", cluster, strerror(errno));
    return;
  }
  block.cluster = cluster;
  engine.body = &body;
  engine.faulted = false;
  engine.random.seed(settings.seed);
  engine.shared_offsets.clear();
  engine.dynamic_shared = engine.shared_used = dynamic_shared;
  block.grid_size = grid;
  block.block_size = block_size;
  block.size = int(threads);
  block.thread_index.resize(threads);
  for (unsigned t = 0; t < threads; t++)
    block.thread_index[t] = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};

  const uint64_t clusters = uint64_t(grid.x) / cluster * grid.y * grid.z;
  std::vector<uint64_t> sequence;
  const bool shuffled = settings.order == Order::shuffled || settings.order == Order::warps_shuffled;
  const bool reversed = settings.order == Order::reversed || settings.order == Order::warps_reversed;
  if (shuffled) {
    sequence.resize(clusters);
    std::iota(sequence.begin(), sequence.end(), 0);
    std::shuffle(sequence.begin(), sequence.end(), engine.random);
  }
  for (uint64_t i = 0; i < clusters && !engine.faulted; i++) {
    const uint64_t first = (shuffled ? sequence[i] : reversed ? clusters - 1 - i : i) * cluster;
    for (int rank = 0; rank < cluster; rank++) {
      const uint64_t b = first + rank;
      engine.blocks[rank]->index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                                    unsigned(b / grid.x / grid.y)};
    }
    run_cluster();
  }
  if (engine.faulted) last_error = cudaErrorLaunchFailure;
}

cudaError_t allow_dynamic_shared(const void* kernel, size_t bytes) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  if (bytes > kMaxShared) {
    snprintf(message, sizeof message, "emulator: %zu bytes of shared memory; a block has at most %zu", bytes,
             kMaxShared);
    return last_error = cudaErrorInvalidValue;
  }
  dynamic_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t allow_large_clusters(const void* kernel) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  large_clusters[kernel] = true;
  return cudaSuccess;
}

cudaError_t take_error() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* error_message() { return message; }

// ---- waiting --------------------------------------------------------------------------------------------------------
void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[384];
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (engine.on_fiber) stop("thread %d: %s", block.current, text);
  else stop("%s", text);
  if (!engine.on_fiber) throw Fault{};
  for (;;) suspend();
}

void wait_while(const uint32_t* word, uint32_t value, const char* what) {
  Fiber& f = this_fiber();
  while (*word == value) {
    f.word = word;
    f.value = value;
    f.waits_for = what;
    suspend();
  }
}

void yield() { suspend(); }

void arrive(Barrier& barrier, int expected, const char* what) {
  if (barrier.arrived && barrier.expected != expected)
    fault("%s expects %d threads here and %d elsewhere", what, expected, barrier.expected);
  barrier.expected = expected;
  if (int(++barrier.arrived) == expected) {
    barrier.arrived = 0;
    barrier.generation++;
  }
}

void arrive_and_wait(Barrier& barrier, int expected, const char* what) {
  const uint32_t generation = barrier.generation;
  arrive(barrier, expected, what);
  wait_while(&barrier.generation, generation, what);
}

Barrier& named_barrier(int id) {
  if (id < 0 || id > 15) fault("barrier %d: there are 16", id);
  return engine.now->named[id];
}

void warp_barrier(uint32_t mask, const char* what) {
  if (!(mask >> lane() & 1)) fault("%s: mask %08x lacks the calling lane %d", what, mask, lane());
  const int slot = (thread() & ~31) + __builtin_ctz(mask);
  Barrier& barrier = engine.now->warps[slot];
  uint32_t& known = engine.now->warp_masks[slot];
  if (barrier.arrived && known != mask)
    fault("%s: mask %08x here and %08x in another lane", what, mask, known);
  known = mask;
  arrive_and_wait(barrier, __builtin_popcount(mask), what);
}

void warpgroup_barrier(const char* what) { arrive_and_wait(engine.now->warpgroups[thread() / 128], 128, what); }

const uint64_t* warp_exchange(uint32_t mask, uint64_t value, const char* what) {
  const int t = thread();
  BlockState& b = *engine.now;
  if (mask == ~0u) {
    // Two buffers in turn: who writes one again has passed the exchange through the other, so all have read the first.
    uint64_t* slots = b.published[b.parity[t] ^= 1];
    slots[t] = value;
    warp_barrier(mask, what);
    return slots + (t & ~31);
  }
  warp_barrier(mask, what);
  b.published_partial[t] = value;
  warp_barrier(mask, what);
  return b.published_partial + (t & ~31);
}

bool put_off() {
  const bool late = settings.completion == Completion::late ||
                    (settings.completion == Completion::mixed && engine.random() % 2 == 0);
  late_operations += late;
  return late;
}

void complete_asynchronously(std::function<void()> operation) {
  if (!put_off()) return operation();
  engine.deferred.push_back([rank = block.rank, operation = std::move(operation)] {
    select(rank);
    operation();
  });
}

void at_block_end(void (*check)()) { end_checks().push_back(check); }
void at_block_start(void (*reset)()) { start_resets().push_back(reset); }

// ---- shared memory --------------------------------------------------------------------------------------------------
void* shared_variable(const void* key, size_t bytes, size_t alignment) {
  auto [it, is_new] = engine.shared_offsets.emplace(key, 0);
  if (is_new) {
    it->second = (engine.shared_used + alignment - 1) / alignment * alignment;
    const size_t end = it->second + bytes;
    if (end > kMaxShared) fault("%zu bytes of shared memory; there are %zu", end, kMaxShared);
    engine.shared_used = end;
    for (int rank = 0; rank < block.cluster; rank++) memset(engine.blocks[rank]->shared + it->second, 0xff, bytes);
  }
  return block.shared + it->second;
}

uint32_t shared_offset(const void* pointer, size_t bytes) {
  const char* p = (const char*)pointer;
  if (p < block.shared || p + bytes > block.shared + engine.shared_used)
    fault("an address that must lie in shared memory does not (%zu bytes)", bytes);
  return uint32_t(p - block.shared);
}

// ---- clusters -------------------------------------------------------------------------------------------------------
void cluster_arrive() {
  Fiber& f = this_fiber();
  if (f.arrived) fault("arrives at the cluster's barrier twice without waiting");
  perform_remote_stores(f);
  f.arrived = true;
  f.generation = engine.cluster_generation;
  engine.cluster_arrived++;
  release_cluster();
}

void cluster_wait() {
  Fiber& f = this_fiber();
  if (!f.arrived) fault("waits at the cluster's barrier without having arrived");
  wait_while(&engine.cluster_generation, f.generation, "the cluster's barrier");
  f.arrived = false;
}

void* remote_address(const void* pointer, size_t bytes, int rank) {
  const uint32_t offset = shared_offset(pointer, bytes);
  if (rank < 0 || rank >= block.cluster) fault("block %d of a cluster of %d", rank, block.cluster);
  const BlockState& b = *engine.blocks[rank];
  if (!b.started || !b.running)
    fault("needs the shared memory of block %d of the cluster, which %s", rank,
          b.started ? "has ended" : "has not started");
  return b.shared + offset;
}

void store_remotely(std::function<void()> store) {
  if (put_off()) this_fiber().remote_stores.push_back(std::move(store));
  else store();
}

}  // namespace ff::emulation
