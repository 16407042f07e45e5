// The threads of a block and their schedule.
#include "blocks.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "fibers.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

// ---- a block ------------------------------------------------------------------------------------

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kReturned };

struct Fiber {
  Context context;
  unsigned thread;
  State state;
  int line;     // where it waits
  bool fenced;  // since its last atomic
};

struct Meeting {  // of threads of a warp
  unsigned mask;
  unsigned arrived;
  int line;
  unsigned turn;  // meetings so far, modulo 2: no thread is ahead of another by more than one
};

// Runs blocks, one at a time, on the host thread that made it.
struct Block {
  Fiber fibers[kMaxThreads];
  Context scheduler;
  Fiber* running;
  Body body;
  unsigned threads;
  unsigned at_block_barrier;
  unsigned turn;  // as in Meeting
  unsigned returned;
  Outcome outcome;
  Meeting meetings[kMaxThreads / kWarp];
  uint64_t exchanged[2][kMaxThreads];
  char block_order[2], warp_order[2][kMaxThreads / kWarp];
  unsigned count;    // blocks so far
  void* atomics[8];  // addresses of the latest in this block
  unsigned n_atomics;
  char before[2];  // what orders one block after another, for even and odd counts
};

__thread Block* here;

void yield() {
  release(&after_launch);  // each time, since there may be no next
  switch_context(here->running->context, here->scheduler);
}

// Ends the block, whose threads stay where they are for ever.
[[noreturn]] void stop(Outcome outcome) {
  here->outcome = outcome;
  for (;;) yield();
}

void fiber_main(unsigned thread) {
  Block& block = *here;
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.stack, &block.scheduler.stack_bytes);
#endif
  for (;;) {
    acquire(&before_launch);
    acquire(&block.before[block.count % 2]);
    block.body.run(block.body.call);
    release(&block.before[(block.count + 1) % 2]);
    block.fibers[thread].state = State::kReturned;
    ++block.returned;
    yield();
  }
}

Block* make_block() {
  Block* block = new Block{};
  const size_t bytes = kMaxThreads * kStackBytes;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) {
    std::perror("cuda shim: no memory for stacks");
    std::abort();
  }
  for (unsigned t = 0; t < kMaxThreads; ++t) {
    Fiber& fiber = block->fibers[t];
    fiber.thread = t;
    Context& context = fiber.context;
    context.stack = static_cast<char*>(stacks) + t * kStackBytes;
    context.stack_bytes = kStackBytes;
    getcontext(&context.start);
    context.start.uc_stack.ss_sp = const_cast<void*>(context.stack);
    context.start.uc_stack.ss_size = kStackBytes;
    makecontext(&context.start, reinterpret_cast<void (*)()>(fiber_main), 1, t);
#if defined(SHIM_TSAN)
    context.sanitizer = __tsan_create_fiber(0);
#endif
  }
#if defined(SHIM_TSAN)
  block->scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  block->scheduler.started = true;
  return block;
}

unsigned lane_of(const Fiber& fiber) { return fiber.thread % kWarp; }

void resume(Block& block, Fiber& fiber) {
  block.running = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  switch_context(block.scheduler, fiber.context);
}

// Until all threads of the warp have returned or wait for other warps.
void run_warp(Block& block, unsigned first, Order order) {
  for (bool again = true; again;) {
    again = false;
    for (unsigned k = 0; k < kWarp; ++k) {
      const unsigned thread = first + (order == Order::kAscending ? k : kWarp - 1 - k);
      if (thread >= block.threads || block.fibers[thread].state != State::kReady) continue;
      resume(block, block.fibers[thread]);
      if (block.outcome != Outcome::kDone) return;
      again = true;
    }
  }
}

const char* describe(State state) {
  switch (state) {
    case State::kAtBlockBarrier:
      return "in __syncthreads";
    case State::kAtWarpBarrier:
      return "waiting for its warp";
    default:
      return "returned";
  }
}

// Names one thread of each kind.
void report_stuck(const Block& block) {
  std::fprintf(stderr, "cuda shim: block %u is stuck:", blockIdx.x);
  for (unsigned t = 0; t < block.threads; ++t) {
    const Fiber& fiber = block.fibers[t];
    bool seen = false;
    for (unsigned s = 0; s < t; ++s) {
      const Fiber& other = block.fibers[s];
      seen = seen || (other.state == fiber.state &&
                      (other.line == fiber.line || fiber.state == State::kReturned));
    }
    if (seen) continue;
    std::fprintf(stderr, " thread %u is %s (line %d);", t, describe(fiber.state), fiber.line);
  }
  std::fputc('\n', stderr);
}

// Whether all threads had come to it, and to the same one.
bool open_block_barrier(Block& block) {
  if (block.at_block_barrier < block.threads) return false;
  const int line = block.fibers[0].line;
  for (unsigned t = 0; t < block.threads; ++t) {
    if (block.fibers[t].line != line) return false;
  }
  for (unsigned t = 0; t < block.threads; ++t) block.fibers[t].state = State::kReady;
  block.at_block_barrier = 0;
  block.turn ^= 1;
  return true;
}

void start(Block& block, const Grid& grid) {
  block.body = grid.body;
  block.threads = grid.threads;
  block.at_block_barrier = block.returned = 0;
  block.outcome = Outcome::kDone;
  ++block.count;
  block.n_atomics = 0;
  for (unsigned t = 0; t < grid.threads; ++t) block.fibers[t].state = State::kReady;
}

}  // namespace

// ---- what a thread does -------------------------------------------------------------------------

void block_barrier(int line) {
  Block& block = *here;
  Fiber& fiber = *block.running;
  char* order = &block.block_order[block.turn];
  release(order);
  fiber.state = State::kAtBlockBarrier;
  fiber.line = line;
  ++block.at_block_barrier;
  yield();
  acquire(order);
}

namespace {

// Returns once all of `mask` have come.
void meet(unsigned mask, int line) {
  Block& block = *here;
  Fiber& fiber = *block.running;
  const unsigned lane = lane_of(fiber);
  Meeting& meeting = block.meetings[fiber.thread / kWarp];
  if (meeting.arrived == 0) meeting = {mask, 0, line, meeting.turn};
  if (meeting.mask != mask || meeting.line != line || !(mask >> lane & 1)) {
    std::fprintf(stderr,
                 "cuda shim: thread %u of block %u comes to line %d with mask %08x while its warp "
                 "meets at line %d with mask %08x\n",
                 fiber.thread, blockIdx.x, line, mask, meeting.line, meeting.mask);
    stop(Outcome::kStuck);
  }
  meeting.arrived |= 1u << lane;
  fiber.line = line;
  if (meeting.arrived != mask) {
    fiber.state = State::kAtWarpBarrier;
    yield();
    return;
  }
  meeting.arrived = 0;
  meeting.turn ^= 1;
  Fiber* warp = &block.fibers[fiber.thread - lane];
  for (unsigned l = 0; l < kWarp; ++l) {
    if (mask >> l & 1) warp[l].state = State::kReady;
  }
}

}  // namespace

void warp_barrier(unsigned mask, int line) {
  const unsigned warp = here->running->thread / kWarp;
  char* order = &here->warp_order[here->meetings[warp].turn][warp];
  release(order);
  meet(mask, line);
  acquire(order);
}

uint64_t exchange(unsigned mask, uint64_t bits, int source, int line) {
  Fiber& fiber = *here->running;
  const unsigned warp = fiber.thread / kWarp;
  uint64_t* values = here->exchanged[here->meetings[warp].turn] + warp * kWarp;
  values[lane_of(fiber)] = bits;
  meet(mask, line);
  if (source < 0 || source >= static_cast<int>(kWarp) || !(mask >> source & 1)) {
    std::fprintf(stderr,
                 "cuda shim: thread %u of block %u asks lane %d, which is not in mask %08x\n",
                 fiber.thread, blockIdx.x, source, mask);
    stop(Outcome::kStuck);
  }
  return values[source];
}

#if defined(SHIM_TSAN)
void before_atomic(void* address) {
  Fiber& fiber = *here->running;
  if (fiber.fenced) release(address);
  fiber.fenced = false;
}

void after_atomic(void* address) { here->atomics[here->n_atomics++ % 8] = address; }

void device_fence() {
  for (unsigned k = 0; k < 8 && k < here->n_atomics; ++k) acquire(here->atomics[k]);
  here->running->fenced = true;
}
#endif

void misaligned(const volatile void* address, int bytes) {
  std::fprintf(stderr,
               "cuda shim: thread %u of block %u accesses %d bytes at %p, off their boundary\n",
               threadIdx.x, blockIdx.x, bytes, const_cast<const void*>(address));
  stop(Outcome::kMisaligned);
}

void illegal_address(const void* address) {
  std::fprintf(stderr, "cuda shim: thread %u of block %u accesses %p\n", threadIdx.x, blockIdx.x,
               address);
  stop(Outcome::kIllegalAddress);
}

// ---- what a launch does -------------------------------------------------------------------------

Outcome run_block(const Grid& grid, unsigned index) {
  if (!here) here = make_block();
  Block& block = *here;
  const Order order = grid.schedule.threads;
  blockIdx = {index, 0, 0};
  gridDim = {grid.blocks, 1, 1};
  blockDim = {grid.threads, 1, 1};
  start(block, grid);
  const unsigned warps = (grid.threads + kWarp - 1) / kWarp;
  do {
    for (unsigned k = 0; k < warps && block.outcome == Outcome::kDone; ++k) {
      run_warp(block, (order == Order::kAscending ? k : warps - 1 - k) * kWarp, order);
    }
  } while (block.outcome == Outcome::kDone && open_block_barrier(block));
  if (block.outcome == Outcome::kDone && block.returned < grid.threads) {
    report_stuck(block);
    block.outcome = Outcome::kStuck;
  }
  if (block.outcome != Outcome::kDone) here = nullptr;  // abandoned with its fibers
  return block.outcome;
}

}  // namespace shim
