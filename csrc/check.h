// One exception type at the native door. Messages say what was wrong with which argument.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fusedopt {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fusedopt: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fusedopt

#define FUSEDOPT_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::fusedopt::fail(__VA_ARGS__); \
  } while (false)
