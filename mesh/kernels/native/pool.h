// Work in pieces on XLA's own threads.
//
// The caller works too. It waits for pieces that somebody has taken, never for a thread to begin: XLA's threads may all be busy with calls
// that wait in the same way, and calls that waited for each other's threads would never end. A thread that comes when all is taken goes
// away again; the plan it looks at lives as long as the last one that may look.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace kernels {

inline constexpr int kPhases = 3;

// Up to three phases of pieces. A phase begins when all pieces of the one before are done.
class Plan {
 public:
  using Piece = void (*)(void* call, int64_t piece);

  explicit Plan(void* call) : call_(call) {}

  void add(int64_t pieces, Piece run) {
    if (pieces > 0) phases_[count_].pieces = pieces, phases_[count_].run = run, count_++;
  }
  int64_t most() const {
    int64_t most = 0;
    for (int i = 0; i < count_; i++) most = phases_[i].pieces > most ? phases_[i].pieces : most;
    return most;
  }

  // What every thread does, the caller among them. On return all pieces are done, if it was the caller.
  void work() {
    for (int i = 0; i < count_; i++) {
      Phase& phase = phases_[i];
      for (int64_t piece; (piece = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.pieces;) {
        phase.run(call_, piece);
        phase.done.fetch_add(1, std::memory_order_acq_rel);
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < phase.pieces; spins++) pause(spins);
    }
  }

  void share(int holders) { holders_.fetch_add(holders, std::memory_order_relaxed); }
  void drop() {
    if (holders_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 private:
  struct Phase {
    std::atomic<int64_t> next{0}, done{0};
    int64_t pieces = 0;
    Piece run = nullptr;
  };

  static void pause(int spins) {
    if (spins > 2000) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  Phase phases_[kPhases];
  int count_ = 0;
  void* call_;
  std::atomic<int> holders_{1};
};

// Runs the plan; `Threads` has num_threads() and Schedule(function).
template <typename Threads>
void run(Plan* plan, Threads& threads) {
  int64_t helpers = threads.num_threads() - 1;
  if (helpers > plan->most() - 1) helpers = plan->most() - 1;
  if (helpers > 0) plan->share((int)helpers);
  for (int64_t i = 0; i < helpers; i++) {
    threads.Schedule([plan] {
      plan->work();
      plan->drop();
    });
  }
  plan->work();
  plan->drop();
}

}  // namespace kernels
