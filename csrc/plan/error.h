// What the plan reports: a kind that the caller can act on and a message that names what and why.
// Messages are made only when something is wrong.
#pragma once

#include <string>
#include <utility>

namespace qk::plan {

enum class ErrorKind {
  kNone = 0,
  kDamaged,      // not a plan file, or a damaged one
  kVersion,      // a plan file of another version
  kUnsupported,  // a plan that says something this executor does not do
  kArgument,     // an input of the call does not fit the plan
  kState,        // the plan was packed for another instruction set than the active one
  kMemory,       // no memory for weights or arena
};

struct Error {
  ErrorKind kind = ErrorKind::kNone;
  std::string message;

  bool ok() const { return kind == ErrorKind::kNone; }
};

inline std::string text(const char* value) { return value; }
inline std::string text(const std::string& value) { return value; }
template <typename T>
std::string text(const T& value) {
  return std::to_string(value);
}

template <typename... Parts>
Error error(ErrorKind kind, const Parts&... parts) {
  Error e{kind, {}};
  ((e.message += text(parts)), ...);
  return e;
}

}  // namespace qk::plan
