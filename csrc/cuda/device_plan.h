// The host's side of a plan on one device: what its launches get, and when its table is written
// anew.
#pragma once

#include <vector>

#include "launch.h"

namespace fusedopt {

// The table of inputs, which Python fills before every step: the step's record, and then what the
// device has to be given where it has changed.
struct Inputs {
  const StepRecord* host;
  void* device;
  size_t bytes;
};

class DevicePlan {
 public:
  // All memory is Python's; of `step` everything but the record. Throws std::runtime_error with
  // CUDA's words, as every method does; an error leaves the plan usable.
  DevicePlan(int device, const Inputs& inputs, const DeviceStep& step);

  // Comes before the launches of a step. Writes the pages of the table that have changed, and all
  // of them into a graph that is being captured.
  void begin(cudaStream_t stream, bool capturing);

  void reduce(bool finalizes);
  void finalize();
  void update();

  // Launches of update that did not fail, so far.
  int64_t updates() const { return updates_; }

 private:
  const int device_;
  const Inputs inputs_;
  DeviceStep step_;
  int reduce_blocks_ = 0, update_blocks_ = 0;
  cudaStream_t stream_ = nullptr;
  int64_t updates_ = 0;
  // What the device holds, by pages of kPayloadBytes, where that is known.
  std::vector<char> written_;
  std::vector<bool> known_;
  bool captured_ = false;  // replays write the table too, so what it holds is never known
};

// Devices that CUDA offers. Throws where there is no driver, or one too old for this build.
int device_count();

}  // namespace fusedopt
