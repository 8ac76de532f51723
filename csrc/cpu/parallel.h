// parallel_for: independent jobs handed out one at a time to a few threads.
//
// Each thread begins with a stretch of jobs of its own and then helps the others, so a core that something else also
// uses simply does fewer of them. Which thread runs a job never changes its result.
#pragma once

#include <cstdint>

namespace fastlora {

using Job = void (*)(const void* context, int64_t index);

// Runs job(context, 0) .. job(context, jobs - 1) on up to `threads` threads, the caller among them, and returns when
// all are done. Jobs must not throw.
void run_jobs(int64_t jobs, int threads, Job job, const void* context);

// What run_jobs uses for more than one thread: "openmp" or "std::thread".
const char* threading_name();

template <class Body>
void parallel_for(int64_t jobs, int threads, const Body& body) {
  run_jobs(
      jobs, threads, [](const void* context, int64_t index) { (*static_cast<const Body*>(context))(index); }, &body);
}

}  // namespace fastlora
