"""What `import mfops` costs and leaves behind."""

from __future__ import annotations

import subprocess
import sys

import torch

from mfops.exporting import constant_for_the_compiler


def test_the_compiler_is_not_imported():
    """It takes as long as half of torch."""
    code = "import sys, mfops; print(*(m for m in ('torch._dynamo', 'sympy') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_constants_are_marked_as_torch_marks_them():
    def mine() -> None: ...
    def torchs() -> None: ...

    constant_for_the_compiler(mine)
    torch.compiler.assume_constant_result(torchs)
    assert vars(mine) == vars(torchs) != {}
