from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in VOC layout, 4 + 2 images of 33 x 33; no test changes it."""
    from mfnet.data import synthetic  # `pytest -m gpu` may run without what this imports

    folder = tmp_path_factory.mktemp("data") / "voc"
    return synthetic.generate(folder, train=4, val=2, size=33)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that ends in a user error, and returns the one line that is said of it."""
    from mfnet.__main__ import main

    def run(arguments: list[str], alone: bool = False) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code in (1, 2)
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        errors = [line for line in stderr.splitlines() if line.startswith("mfnet: error: ")]
        assert len(errors) == 1
        assert stderr.splitlines()[-1] == errors[0]
        if alone:  # no word beside it
            said = [line for line in stderr.splitlines() if not line.startswith("Seed set to")]
            assert said == errors
        return errors[0]

    return run
