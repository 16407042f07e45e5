// A record's fields by name: Python compares the record that it packs with the one kernels read.
#pragma once

#include "platform.h"

// Belongs inside the struct: with_fields(visit) calls visit("one, other, ...", one, other, ...).
#define FUSEDOPT_FIELDS(...)                                   \
  template <class Visit>                                       \
  FUSEDOPT_MEMBER void with_fields(const Visit& visit) const { \
    visit(#__VA_ARGS__, __VA_ARGS__);                          \
  }
