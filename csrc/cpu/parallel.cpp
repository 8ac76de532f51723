// The threads behind parallel_for.
//
// The process that loads this library contains torch, and torch has an OpenMP pool whose idle threads keep spinning for
// milliseconds after each operation. A pool of our own would compete with it for the cores. So no OpenMP is linked
// here: the entry point of the one already loaded (GOMP_parallel, whose signature GCC and LLVM both keep) is looked up
// at run time, and our jobs run on torch's own threads. Without one, and in a forked child, whose pool did not survive
// the fork, threads are started for the call, at about 20 us each.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace fastlora {
namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
using OmpThreadNumber = int (*)();

constexpr int kMaxThreads = 256;

// Each thread begins with a stretch of jobs of its own and then helps the others with theirs. So a thread writes the
// same rows that torch's static schedule gives it in the next operation, which finds them in that core's cache.
struct alignas(64) Stretch {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Team {
  Stretch stretches[2][kMaxThreads];  // of the jobs, then of the fillers
  int threads;
  std::atomic<int> arrivals{0};
  OmpThreadNumber thread_number;
  Job job;
  const void* context;
};

void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  const int self = (team.thread_number ? team.thread_number() : team.arrivals.fetch_add(1)) % team.threads;
  for (Stretch(&stretches)[kMaxThreads] : team.stretches) {
    for (int i = 0; i < team.threads; ++i) {
      Stretch& stretch = stretches[(self + i) % team.threads];
      for (int64_t job; (job = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) {
        team.job(team.context, job);
      }
    }
  }
}

std::atomic<bool> forked{false};

GompParallel openmp() {
  static const GompParallel entry = [] {
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return forked.load(std::memory_order_relaxed) ? nullptr : entry;
}

OmpThreadNumber openmp_thread_number() {
  static const OmpThreadNumber entry = reinterpret_cast<OmpThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  return entry;
}

void work_on_new_threads(Team* team) {
  std::vector<std::thread> helpers;
  helpers.reserve(team->threads - 1);
  try {
    for (int i = 1; i < team->threads; ++i) helpers.emplace_back(work, team);
  } catch (const std::system_error&) {
    // No more threads are available: those already started, and the caller, do all the jobs.
  }
  work(team);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void run_jobs(int64_t jobs, int64_t fillers, int threads, Job job, const void* context) {
  threads = static_cast<int>(std::min<int64_t>(std::min(threads, kMaxThreads), jobs + fillers));
  if (threads <= 1) {
    for (int64_t index = 0; index < jobs + fillers; ++index) job(context, index);
    return;
  }
  Team team;
  team.threads = threads;
  team.job = job;
  team.context = context;
  for (int i = 0; i < threads; ++i) {
    team.stretches[0][i].next = jobs * i / threads;
    team.stretches[0][i].end = jobs * (i + 1) / threads;
    team.stretches[1][i].next = jobs + fillers * i / threads;
    team.stretches[1][i].end = jobs + fillers * (i + 1) / threads;
  }
  const GompParallel parallel = openmp();
  team.thread_number = parallel ? openmp_thread_number() : nullptr;
  if (parallel) {
    parallel(work, &team, static_cast<unsigned>(threads), 0);
  } else {
    work_on_new_threads(&team);
  }
}

const char* threading_name() { return openmp() ? "openmp" : "std::thread"; }

}  // namespace fastlora
