"""What the compiler made of the GPU kernels: what a tile costs in instructions.

python -m benchmarks.machine_code            # writes the table of docs/kernels.md
python -m benchmarks.machine_code --check    # says whether it differs, and writes nothing
"""
