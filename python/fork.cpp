// What is left of torch's thread pool after fork.
#include <dirent.h>
#include <pthread.h>

#include "python/adapt.h"

namespace qk::seam {

namespace {

// Written while fork runs: by the forking thread before, by the only thread of the child after.
bool parent_has_threads = false;
bool forked_from_threads = false;

bool several_threads() {
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return true;  // not known: one thread is always right
  int count = 0;
  while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
  closedir(tasks);
  return count > 1;
}

[[maybe_unused]] const int registered =
    pthread_atfork([] { parent_has_threads = several_threads(); }, nullptr,
                   [] { forked_from_threads = forked_from_threads || parent_has_threads; });

}  // namespace

bool pool_is_lost() { return forked_from_threads; }

}  // namespace qk::seam
