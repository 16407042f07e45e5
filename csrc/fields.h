// Fields of a record by name, so that Python can compare what it packs with what a kernel reads.
#pragma once

#include "platform.h"

// Stands in the record: with_fields(visit) calls visit("one, other, ...", one, other, ...).
#define FUSEDOPT_FIELDS(...)                                   \
  template <class Visit>                                       \
  FUSEDOPT_MEMBER void with_fields(const Visit& visit) const { \
    visit(#__VA_ARGS__, __VA_ARGS__);                          \
  }
