// Fields of a struct by name, so that Python can compare what it packs with what a kernel reads.
#pragma once

#include <cstddef>
#include <type_traits>

namespace fusedopt {

struct Field {
  const char* name;
  size_t offset, bytes;
  char kind;  // as in Python's struct: d double, f float; q for anything else
};

template <class T>
constexpr char kind_of_field() {
  return std::is_same_v<T, double> ? 'd' : std::is_same_v<T, float> ? 'f' : 'q';
}

}  // namespace fusedopt

#define FUSEDOPT_FIELD(Struct, name)                        \
  ::fusedopt::Field {                                       \
    #name, offsetof(Struct, name), sizeof(Struct::name),    \
        ::fusedopt::kind_of_field<decltype(Struct::name)>() \
  }
