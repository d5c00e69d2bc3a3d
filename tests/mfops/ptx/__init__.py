"""Runs the PTX that nvcc made of the CUDA kernels, on the CPU.

Where tests/mfops/emulator compiles the kernels for the CPU, this interprets what the compiler made
of them for GPUs, with numpy, over all threads of a cluster at a time. It fails on matrix
instructions and shuffles in a warp whose lanes have parted, on accesses out of bounds, misaligned
or to another block's memory, and on what one lane, warp or block reads or writes in shared memory
while another writes it, without a barrier in between. What cp.async copies arrives only at its
wait.
"""
