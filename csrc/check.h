// Native code throws one exception type. Its message names the argument that was wrong.
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
