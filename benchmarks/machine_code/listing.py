"""Machine code (SASS) and resource usage of a build, as NVIDIA's cuobjdump lists them."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+) +)?([A-Z][\w.]*)(.*?);?\s*(?:/\*|$)")


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str  # with what modifies it: LDS.U16
    operands: str

    @property
    def target(self) -> int:
        return int(re.findall(r"0x[0-9a-f]+", self.operands)[-1], 16)


def cuobjdump() -> str | None:
    """The one on PATH, or the one that triton carries."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def dump(build: Path, *options: str) -> str:
    """
    Raises:
        OSError: there is no cuobjdump, or it cannot read the build.
    """
    tool = cuobjdump()
    if tool is None:
        raise OSError("no cuobjdump, neither on PATH nor in triton")
    done = subprocess.run([tool, *options, str(build)], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(done.stderr.strip())
    return done.stdout


def resources(build: Path, arch: str) -> dict[str, dict[str, int]]:
    """Registers, stack and local memory of a thread, by the kernel's mangled name."""
    usage = dump(build, "--dump-resource-usage", "--gpu-architecture", arch)
    return {
        name: {kind: int(n) for kind, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", counts)}
        for name, counts in re.findall(r"Function (\S+):\n\s*(.*)", usage)
    }


def archs(build: Path) -> set[str]:
    """Those that there is machine code for."""
    return set(re.findall(r"\.(sm_\d+)\.", dump(build, "--list-elf")))


@functools.cache
def code(build: Path, arch: str) -> dict[str, list[Instruction]]:
    """The machine code of every kernel. To list it takes a minute."""
    return instructions(dump(build, "--dump-sass", "--gpu-architecture", arch))


def instructions(listing: str) -> dict[str, list[Instruction]]:
    """Of each function of a listing."""
    found: dict[str, list[Instruction]] = {}
    own: list[Instruction] = []
    for line in listing.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            own = found[match[1]] = []
        elif match := _LINE.match(line):
            own.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return found


def assembler(build: Path, arch: str, name: str) -> str:
    """The version of ptxas that wrote a kernel's machine code."""
    elf = dump(build, "--dump-elf", "--gpu-architecture", arch, "--function", name)
    found = re.search(r"Tool Version:.*V(\d[\d.]*)", elf)
    return f"ptxas {found[1]}" if found else "an unknown ptxas"
