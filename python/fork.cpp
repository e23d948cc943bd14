// What is left of torch's thread pool after fork.
#include <pthread.h>

#include <filesystem>
#include <iterator>
#include <system_error>

#include "python/adapt.h"

namespace qk::seam {

namespace {

// Written while fork runs: by the forking thread before, by the only thread of the child after.
bool parent_has_threads = false;
bool forked_from_threads = false;

bool several_threads() {
  std::error_code error;
  std::filesystem::directory_iterator tasks("/proc/self/task", error);
  if (error) return true;  // not known: one thread is always right
  return std::distance(tasks, std::filesystem::directory_iterator()) > 1;
}

[[maybe_unused]] const int registered =
    pthread_atfork([] { parent_has_threads = several_threads(); }, nullptr,
                   [] { forked_from_threads = forked_from_threads || parent_has_threads; });

}  // namespace

bool pool_is_lost() { return forked_from_threads; }

}  // namespace qk::seam
