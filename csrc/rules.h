// The update rules, and what they have in common.
//
// A rule is a struct of pure functions of register values (rules/<rule>.h), the one text that every
// C++ and CUDA backend runs. fusedopt/rules/<rule>.py declares it for Python. It has
//   kName         what Python calls it
//   kStates       states of a tensor, at most
//   kAlways       so many of them every tensor has; whether it has the others depends on its group
//   kVariants     ways to update that differ by more than numbers; variant() is the way of a group,
//                 and states() how many states it has
//   absent()      what a kernel that serves several variants reads in place of a state
//   Options       one param group as the user gave it, eight words: lr, weight_decay, decoupled and
//                 maximize come first, then the rule's own
//   Hyper         floats: what a kernel needs to know of a tensor
//   prepare()     Options and the number of this step -> Hyper; computed once a step and tensor
//   update()      one element: grad in, param and states in and out, all fp32 registers. kStates of
//                 them are there. Kind is the same for a whole tensor, and comes as a value, so
//                 that a CPU loop can make it a constant and a CUDA block a uniform branch
// Loads, stores, conversions and tails belong to the drivers, which know no rule by its name.
#pragma once

#include "rules/adamw.h"
#include "rules/lion.h"
#include "rules/sgd.h"

namespace fusedopt {

using Rules = RuleList<AdamW, SGD, Lion>;

}  // namespace fusedopt
