// Fibers, scheduling, barriers and faults of the emulator; see emulator.h.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>

// ---- switching stacks -----------------------------------------------------------------------------------------------
#if defined(__x86_64__) && defined(__ELF__) && !defined(FF_EMULATION_UCONTEXT)
// Saves the callee-saved registers and the stack pointer in *save and continues where `to` was saved.
extern "C" void ff_emulation_switch(void** save, void* to) __attribute__((visibility("hidden")));
__asm__(
    ".text\n"
    ".hidden ff_emulation_switch\n"
    ".globl ff_emulation_switch\n"
    ".type ff_emulation_switch, @function\n"
    "ff_emulation_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n"
    ".size ff_emulation_switch, . - ff_emulation_switch\n");
struct Context {
  void* stack_pointer;
};
static void prepare(Context& c, char* stack, size_t bytes, void (*entry)()) {
  uintptr_t* top = (uintptr_t*)(stack + bytes - 64);
  *--top = 0;                 // where entry would return to: it never does
  *--top = (uintptr_t)entry;  // popped by ret
  for (int i = 0; i < 6; i++) *--top = 0;
  c.stack_pointer = top;
}
static void switch_to(Context& from, Context& to) { ff_emulation_switch(&from.stack_pointer, to.stack_pointer); }
#else
#include <ucontext.h>
struct Context {
  ucontext_t context;
};
static void prepare(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}
static void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

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
  bool can_run() const { return !ended && (!word || *word != value); }
};

// Everything one launch needs; there is one launch at a time.
struct Engine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Context scheduler;
  char* stacks = nullptr;
  const std::function<void()>* body = nullptr;
  int running = 0;        // threads that have not ended
  bool faulted = false;
  std::mt19937 random;
  std::vector<std::function<void()>> deferred;
  std::map<const void*, size_t> shared_offsets;
  size_t dynamic_shared = 0, shared_used = 0;
  Barrier named[16];
  Barrier warps[kMaxThreads];     // indexed by the lowest thread of the mask
  uint32_t warp_masks[kMaxThreads];
  Barrier warpgroups[kMaxThreads / 128];
  uint64_t published[2][kMaxThreads], published_partial[kMaxThreads];
  uint8_t parity[kMaxThreads];
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

void suspend() { switch_to(engine.fibers[block.current].context, engine.scheduler); }

void fiber_entry() {
  (*engine.body)();
  engine.fibers[block.current].ended = true;
  engine.running--;
  for (;;) suspend();
}

void report_deadlock() {
  std::map<std::string, std::pair<int, int>> waiting;  // what -> (threads, first of them)
  for (int t = 0; t < block.size; t++) {
    const Fiber& f = engine.fibers[t];
    if (!f.ended) {
      auto& entry = waiting.emplace(f.waits_for, std::make_pair(0, t)).first->second;
      entry.first++;
    }
  }
  std::string text;
  for (auto& [what, entry] : waiting) {
    text += (text.empty() ? "" : ", ") + std::to_string(entry.first) + " threads wait at " + what + " (first: thread " +
            std::to_string(entry.second) + ")";
  }
  stop("deadlock: %s; %d threads have ended", text.c_str(), block.size - engine.running);
}

// Resumes every thread of `members` that can run; again until none can when `sticky`. Returns whether any ran.
bool run_group(const int* members, int count, bool sticky) {
  bool ran = false, again;
  do {
    again = false;
    for (int i = 0; i < count && !engine.faulted; i++) {
      Fiber& f = engine.fibers[members[i]];
      if (!f.can_run()) continue;
      f.word = nullptr;
      block.current = members[i];
      engine.on_fiber = true;
      switch_to(engine.scheduler, f.context);
      engine.on_fiber = false;
      ran = again = true;
    }
  } while (again && sticky && !engine.faulted);
  return ran;
}

void start_block() {
  for (Barrier& b : engine.named) b = {};
  std::fill_n(engine.warps, block.size, Barrier{});
  for (Barrier& b : engine.warpgroups) b = {};
  std::fill_n(engine.parity, block.size, uint8_t(0));
  memset(block.shared, 0xff, engine.shared_used);
  engine.deferred.clear();
  for (auto reset : start_resets()) reset();
  for (int t = 0; t < block.size; t++) {
    Fiber& f = engine.fibers[t];
    f.ended = false;
    f.word = nullptr;
    f.waits_for = "";
    prepare(f.context, engine.stacks + size_t(t) * kStackBytes + kGuardBytes, kStackBytes - kGuardBytes, fiber_entry);
  }
  engine.running = block.size;
}

void run_block() {
  start_block();
  const Order order = settings.order;
  const bool by_warp = order >= Order::warps;
  const int group = by_warp ? 32 : 1, groups = (block.size + group - 1) / group;
  std::vector<int> threads(block.size), sequence(groups);
  std::iota(threads.begin(), threads.end(), 0);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == Order::reversed || order == Order::warps_reversed) std::reverse(sequence.begin(), sequence.end());
  while (engine.running && !engine.faulted) {
    if (order == Order::shuffled || order == Order::warps_shuffled)
      std::shuffle(sequence.begin(), sequence.end(), engine.random);
    bool ran = false;
    for (int g : sequence) ran |= run_group(&threads[g * group], std::min(group, block.size - g * group), by_warp);
    if (ran || engine.faulted) continue;
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
  for (int i = 0; i < 16; i++)
    if (engine.named[i].arrived)
      return stop("ended with %u arrivals left at barrier %d, which expects %d", engine.named[i].arrived, i,
                  engine.named[i].expected);
  try {
    for (auto check : end_checks()) check();
  } catch (Fault) {
  }
}

void prepare_memory() {
  if (engine.stacks) return;
  engine.stacks = (char*)mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (int t = 0; t < kMaxThreads; t++) mprotect(engine.stacks + t * kStackBytes, kGuardBytes, PROT_NONE);
  block.shared = (char*)aligned_alloc(1024, 256 << 10);
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
            const std::function<void()>& body) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  prepare_memory();
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

  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> sequence;
  const bool shuffled = settings.order == Order::shuffled || settings.order == Order::warps_shuffled;
  const bool reversed = settings.order == Order::reversed || settings.order == Order::warps_reversed;
  if (shuffled) {
    sequence.resize(blocks);
    std::iota(sequence.begin(), sequence.end(), 0);
    std::shuffle(sequence.begin(), sequence.end(), engine.random);
  }
  for (uint64_t i = 0; i < blocks && !engine.faulted; i++) {
    const uint64_t b = shuffled ? sequence[i] : reversed ? blocks - 1 - i : i;
    block.index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block();
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
  Fiber& f = engine.fibers[block.current];
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
  return engine.named[id];
}

void warp_barrier(uint32_t mask, const char* what) {
  if (!(mask >> lane() & 1)) fault("%s: mask %08x lacks the calling lane %d", what, mask, lane());
  const int slot = (thread() & ~31) + __builtin_ctz(mask);
  Barrier& barrier = engine.warps[slot];
  if (barrier.arrived && engine.warp_masks[slot] != mask)
    fault("%s: mask %08x here and %08x in another lane", what, mask, engine.warp_masks[slot]);
  engine.warp_masks[slot] = mask;
  arrive_and_wait(barrier, __builtin_popcount(mask), what);
}

void warpgroup_barrier(const char* what) { arrive_and_wait(engine.warpgroups[thread() / 128], 128, what); }

const uint64_t* warp_exchange(uint32_t mask, uint64_t value, const char* what) {
  const int t = thread();
  if (mask == ~0u) {
    // Two buffers in turn: who writes one again has passed the exchange through the other, so all have read the first.
    uint64_t* slots = engine.published[engine.parity[t] ^= 1];
    slots[t] = value;
    warp_barrier(mask, what);
    return slots + (t & ~31);
  }
  warp_barrier(mask, what);
  engine.published_partial[t] = value;
  warp_barrier(mask, what);
  return engine.published_partial + (t & ~31);
}

bool put_off() {
  const bool late = settings.completion == Completion::late ||
                    (settings.completion == Completion::mixed && engine.random() % 2 == 0);
  late_operations += late;
  return late;
}

void complete_asynchronously(std::function<void()> operation) {
  if (!put_off()) return operation();
  engine.deferred.push_back(std::move(operation));
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
    memset(block.shared + it->second, 0xff, bytes);
  }
  return block.shared + it->second;
}

uint32_t shared_offset(const void* pointer, size_t bytes) {
  const char* p = (const char*)pointer;
  if (p < block.shared || p + bytes > block.shared + engine.shared_used)
    fault("an address that must lie in shared memory does not (%zu bytes)", bytes);
  return uint32_t(p - block.shared);
}

}  // namespace ff::emulation
