// What one launch gets: the tables of a plan on this device and the options of this step, by value.
#pragma once

#include "../plan.h"
#include "../rules.h"
#include "../scalars.h"

namespace fusedopt {

// A field of the options table that the user keeps in a tensor on the device (a learning rate under
// a captured graph); read there, so that nobody waits for it.
struct DeviceNumber {
  const void* data;  // fp32 or fp64, one element
  int32_t field;     // which double of the options table
  int32_t is_double;
};
static_assert(sizeof(DeviceNumber) == 16, "mirrored by fusedopt/backends/device.py");
constexpr int kDeviceNumbers = 4;  // of a group, at most

// What finalize leaves for the update of one tensor.
template <class R>
struct alignas(32) RowStep {
  typename R::Hyper hyper;
  float step;  // this one, if it is applied
  static_assert(sizeof hyper <= 28, "32 bytes in all, by fusedopt/backends/device.py");
};

struct DeviceStep {
  PlanView plan;  // row_scalars: RowStep<R> for each row
  Rule rule;
  int32_t n_device_numbers;
  void* group_options;  // R::Options for each group
  const DeviceNumber* device_numbers;
  StepOptions step_options;
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: nobody looked
  float* inf_flag;          // null: nobody asked
  StepScalars* scalars;
  double* totals;  // one per device that shares the norm
  int32_t n_totals;
  int32_t own_total;  // the one that reduce writes
  uint32_t* ticket;   // blocks of reduce that are done; zero between launches
  float max_grad_value;
};

}  // namespace fusedopt
