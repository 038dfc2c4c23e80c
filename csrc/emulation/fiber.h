// Switching stacks: what a fiber is made of. Assembler where it is known, else ucontext, which costs a system call.
#pragma once
#include <cstddef>
#include <cstdint>

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
