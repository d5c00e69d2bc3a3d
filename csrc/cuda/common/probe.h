// What the CUDA half of this build is, and whether it runs on a given GPU.
#pragma once

#include <string>
#include <vector>

namespace mfops {

// CUDART_VERSION of the toolkit that compiled this build, e.g. 13020 for CUDA 13.2.
int cuda_toolkit_version();

// Architectures compiled for, ascending, e.g. {80, 90}.
std::vector<int> cuda_archs();

// Why this build has no code for the device, in CUDA's own words, or nothing. Launches nothing.
std::string cuda_unavailable_reason(int device_index);

// Launches a kernel on the device and returns the architecture whose code ran, e.g. 90. A smaller
// number than the GPU's own means that its driver compiled our PTX. Throws std::runtime_error with
// CUDA's own words where the device is absent or can't run this build. Leaves the current device.
int cuda_probe(int device_index);

}  // namespace mfops
