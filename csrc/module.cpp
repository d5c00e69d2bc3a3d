// mfops._C: importing it loads the kernels that the other files register with torch, and
// build_info() says what they were built with.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/version.h>

#include <string>

#include "cpu/common/bf16.h"

#ifdef MFOPS_WITH_CUDA
#include "cuda/common/probe.h"
#endif

namespace py = pybind11;

namespace {

std::string version(unsigned major, unsigned minor) {
    return std::to_string(major) + "." + std::to_string(minor);
}

py::dict build_info() {
    py::dict info;
    info["torch"] = TORCH_VERSION;
    info["torch_stable_abi"] =
        version((TORCH_TARGET_VERSION >> 56) & 0xff, (TORCH_TARGET_VERSION >> 48) & 0xff);
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
#ifdef MFOPS_WITH_CUDA
    const unsigned toolkit = mfops::cuda_toolkit_version();
    py::list archs;
    for (const int arch : mfops::cuda_archs()) archs.append("sm_" + std::to_string(arch));
    info["cuda"] = version(toolkit / 1000, toolkit % 1000 / 10);
    info["cuda_archs"] = archs;
    info["cuda_missing"] = py::none();
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = py::list();
    info["cuda_missing"] = MFOPS_CUDA_MISSING;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("build_info", &build_info,
               "What this extension was built with: torch, torch_stable_abi (the oldest torch it "
               "runs on), compiler, cuda (toolkit version or None), cuda_archs, cuda_missing (why "
               "there are no CUDA kernels, or None).");
    module.def("cpu_bfloat16_missing", &mfops::cpu::bf16::unavailable_reason,
               "Why products of bfloat16 features are made in float32 on this CPU; empty where the "
               "processor's own bfloat16 units make them.");
    module.def("cpu_bfloat16_units", &mfops::cpu::bf16::units_name,
               "Which of the processor's units those are: AMX, AVX512-BF16 or, where there are "
               "none, an empty string.");
#ifdef MFOPS_WITH_CUDA
    module.def("cuda_unavailable_reason", &mfops::cuda_unavailable_reason, py::arg("device_index"),
               "Why this build has no code for the device, in CUDA's words; empty where it has.");
    module.def(
        "cuda_probe", &mfops::cuda_probe, py::arg("device_index"),
        py::call_guard<py::gil_scoped_release>(),
        "Runs a CUDA kernel of this build on the device; returns the architecture whose code "
        "ran, e.g. 90. Raises RuntimeError with CUDA's message where that fails.");
#endif
}
