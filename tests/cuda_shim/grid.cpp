// The blocks of a grid: one after the other, or shared by host threads.
#include <signal.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "blocks.h"
#include "fibers.h"

namespace shim {

char before_launch, after_launch;

namespace {

// Every `stride`-th block, from `first` on, on this host thread.
Outcome run_share(const Grid& grid, unsigned first, unsigned stride) {
  const bool ascending = grid.schedule.blocks == Order::kAscending;
  Outcome outcome = Outcome::kDone;
  for (unsigned k = first; k < grid.blocks && outcome == Outcome::kDone; k += stride) {
    outcome = run_block(grid, ascending ? k : grid.blocks - 1 - k);
  }
  return outcome;
}

// A bad pointer ends the launch with an error, as on a device, and not the process. Sanitizers have
// more to say about it, and keep their own handler.
class BadPointers {
 public:
  BadPointers() {
#if !defined(SHIM_ASAN) && !defined(SHIM_TSAN)
    struct sigaction action = {};
    action.sa_sigaction = [](int, siginfo_t* info, void*) { illegal_address(info->si_addr); };
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_);
#endif
  }
  BadPointers(const BadPointers&) = delete;
  BadPointers& operator=(const BadPointers&) = delete;
  ~BadPointers() {
#if !defined(SHIM_ASAN) && !defined(SHIM_TSAN)
    sigaction(SIGSEGV, &before_, nullptr);
#endif
  }

 private:
  struct sigaction before_ = {};
};

// Host threads that live as long as the process and share the blocks of a grid.
class Team {
 public:
  Outcome run(const Grid& grid, unsigned size) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (; members_ < size; ++members_) std::thread(&Team::serve, this, members_).detach();
    grid_ = &grid;
    size_ = busy_ = size;
    outcome_ = Outcome::kDone;
    ++round_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return busy_ == 0; });
    return outcome_;
  }

 private:
  void serve(unsigned member) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t served = 0;;) {
      changed_.wait(lock, [&] { return round_ != served; });
      served = round_;
      if (member >= size_) continue;
      const Grid grid = *grid_;
      const unsigned size = size_;
      lock.unlock();
      const Outcome outcome = run_share(grid, member, size);
      lock.lock();
      if (outcome != Outcome::kDone) outcome_ = outcome;
      --busy_;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t round_ = 0;
  unsigned members_ = 0, size_ = 0, busy_ = 0;
  const Grid* grid_ = nullptr;
  Outcome outcome_ = Outcome::kDone;
};

}  // namespace

Outcome run_grid(const Grid& grid) {
  const BadPointers caught;
  release(&before_launch);
  Outcome outcome;
  if (grid.schedule.host_threads == 0) {
    outcome = run_share(grid, 0, 1);
  } else {
    static Team& team = *new Team;  // never destroyed: its threads wait on it for ever
    outcome = team.run(grid, static_cast<unsigned>(grid.schedule.host_threads));
  }
  acquire(&after_launch);
  return outcome;
}

}  // namespace shim
