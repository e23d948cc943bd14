// A fault ends the program, so a test that wants one runs it in a child process.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "tests/csrc/check.h"

namespace qk::test {

// What f prints to stderr before it ends the process with an error; fails if it does not.
template <typename F>
std::string fault_of(const F& f) {
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    close(ends[0]);
    dup2(ends[1], STDERR_FILENO);
    f();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, part + n);
  close(ends[0]);
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(status != 0, "nothing was noticed");
  return text;
}

template <typename F>
void expect_fault(const std::string& words, const F& f) {
  const std::string text = fault_of(f);
  CHECK(text.find(words) != std::string::npos, "expected a fault with '", words, "', got:\n", text);
}

}  // namespace qk::test
