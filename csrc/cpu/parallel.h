// parallel_for: independent jobs distributed one at a time to a few threads.
//
// Each thread begins with a stretch of jobs of its own and then helps the others, so a core that something else also
// uses simply does fewer of them. Which thread runs a job never changes its result.
#pragma once

#include <cstdint>

namespace fastlora {

using Job = void (*)(const void* context, int64_t index);

// Runs job(context, 0) .. job(context, jobs + fillers - 1) on up to `threads` threads, the caller among them, and
// returns when all are done. A thread that finds none of the first `jobs` left goes on to the fillers. Jobs must not
// throw.
void run_jobs(int64_t jobs, int64_t fillers, int threads, Job job, const void* context);

// What run_jobs uses for more than one thread: "openmp" or "std::thread".
const char* threading_name();

template <class Body>
void parallel_for(int64_t jobs, int64_t fillers, int threads, const Body& body) {
  run_jobs(
      jobs, fillers, threads,
      [](const void* context, int64_t index) { (*static_cast<const Body*>(context))(index); }, &body);
}

template <class Body>
void parallel_for(int64_t jobs, int threads, const Body& body) {
  parallel_for(jobs, 0, threads, body);
}

}  // namespace fastlora
