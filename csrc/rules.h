// The list of update rules, and the parts that each rule has.
//
// A rule is a struct of pure functions of register values (rules/<rule>.h), the one source that
// every C++ and CUDA backend compiles. fusedopt/rules/<rule>.py declares it for Python. It has
//   kName         its name in Python
//   kStates       the most states that a tensor may have
//   kAlways       the number of states that every tensor has; the others depend on its group
//   kVariants     ways to update that differ by more than numbers; variant() is the way of a group,
//                 and states() the number of states of a way
//   absent()      the value that a kernel for several variants reads in place of a missing state
//   Options       one param group as the user gave it, eight words: lr, weight_decay, decoupled and
//                 maximize come first, then the rule's own
//   Hyper         the floats that a kernel needs for a tensor
//   prepare()     Options and the number of this step -> Hyper; computed once a step and tensor
//   update()      one element: grad in, param and states in and out, all fp32 registers. Only the
//                 first kStates states exist. Kind is the same for a whole tensor. It is a value,
//                 so that a CPU loop can make it a constant and a CUDA block a uniform branch
// Loads, stores, conversions and tails belong to the drivers, which know no rule by its name.
#pragma once

#include "rules/adamw.h"
#include "rules/lion.h"
#include "rules/sgd.h"

namespace fusedopt {

using Rules = RuleList<AdamW, SGD, Lion>;

}  // namespace fusedopt
