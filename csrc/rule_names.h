// The names by which Python asks for a rule.
#pragma once

#include <string>

#include "check.h"
#include "rules.h"

namespace fusedopt {

inline Rule rule_named(const std::string& name) {
  if (name == "adamw") return Rule::kAdamW;
  if (name == "sgd") return Rule::kSGD;
  fail("unknown rule ", name);
}

}  // namespace fusedopt
