"""What is said where packages that mfnet needs are not installed, and what is imported without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Each case in a fork of one process that has imported what takes long and is not missing. The first
# finder stands in for an environment without the packages: it says that there are none.
FORKS = """
import json, os, sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for code, names, file in json.loads(sys.argv[1]):
    for package in {"torch", "torchvision"} - set(names):
        __import__(package)
    assert not set(names) & set(sys.modules)
    if not (child := os.fork()):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = ["-c"]
        sys.meta_path.insert(0, Missing)
        exec(code)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
COMMAND = "pip install 'mfops[mfnet]'"
IN_PYTHON = [("import mfnet", "torchvision"), ("from mfnet import load", "huggingface_hub")]
IN_THE_COMMAND_LINE = [
    ("sys.argv = ['-m']; import runpy; runpy.run_module('mfnet', run_name='__main__')", "timm"),
    ("sys.argv = ['bin/mfnet', '--help']; from mfnet.__main__ import main; main()", "timm"),
    ("from mfnet.__main__ import main; main(['--help'])", "lightning"),
]
NETWORK = 'import mfnet; mfnet.create_model("mfnet", backbone="test_resnet")'
TRAINERS = ("lightning", "torchmetrics", "jsonargparse", "tensorboard", "matplotlib")
Ends = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    """The exit status and the stderr of each code."""
    folder = tmp_path_factory.mktemp("stderr")
    missing = {code: (name,) for code, name in (*IN_PYTHON, *IN_THE_COMMAND_LINE)}
    missing[NETWORK] = TRAINERS
    cases = [(*case, f"{folder}/{number}") for number, case in enumerate(missing.items())]
    command = [sys.executable, "-c", FORKS, json.dumps(cases)]
    statuses = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return {
        code: (status, Path(file).read_text())
        for (code, _, file), status in zip(cases, statuses.stdout.splitlines(), strict=True)
    }


@pytest.mark.parametrize(("code", "missing"), IN_PYTHON)
def test_python_names_the_command_that_installs_a_package(
    code: str, missing: str, ends: Ends
) -> None:
    status, stderr = ends[code]
    assert status == "1"
    last = stderr.splitlines()[-1]
    assert last == f"ModuleNotFoundError: mfnet needs {missing}: {COMMAND}"


@pytest.mark.parametrize(("start", "missing"), IN_THE_COMMAND_LINE)
def test_the_command_line_says_so_in_one_line(start: str, missing: str, ends: Ends) -> None:
    assert ends[start] == ("1", f"mfnet: error: mfnet needs {missing}: {COMMAND}\n")


def test_networks_need_no_trainer(ends: Ends) -> None:
    """Neither Lightning nor what only it needs is imported, which would take seconds."""
    assert ends[NETWORK][0] == "0", ends[NETWORK][1]
