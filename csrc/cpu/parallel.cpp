// The threads behind parallel_for.
//
// The process that loads this library has torch in it, and torch an OpenMP pool whose idle threads keep spinning for
// milliseconds after each operation. A pool of our own would fight with it for the cores. So no OpenMP is linked here:
// the entry point of the one already loaded (GOMP_parallel, whose signature GCC and LLVM both keep) is looked up at
// run time, and our jobs run on torch's own threads. Where there is none, and in a forked child, whose pool did not
// survive the fork, threads are started for the call, at some 20 us each.
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

struct Team {
  std::atomic<int64_t> next{0};
  int64_t jobs;
  Job job;
  const void* context;
};

void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  for (int64_t index; (index = team.next.fetch_add(1, std::memory_order_relaxed)) < team.jobs;) {
    team.job(team.context, index);
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

void work_on_new_threads(Team* team, int threads) {
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work, team);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are, and the caller, do all the jobs.
  }
  work(team);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void run_jobs(int64_t jobs, int threads, Job job, const void* context) {
  Team team;
  team.jobs = jobs;
  team.job = job;
  team.context = context;
  threads = static_cast<int>(std::min<int64_t>(threads, jobs));
  if (threads <= 1) {
    work(&team);
  } else if (const GompParallel parallel = openmp()) {
    parallel(work, &team, static_cast<unsigned>(threads), 0);
  } else {
    work_on_new_threads(&team, threads);
  }
}

const char* threading_name() { return openmp() ? "openmp" : "std::thread"; }

}  // namespace fastlora
