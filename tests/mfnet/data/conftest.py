from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def camvid():
    """The real data set that stands beside the repository, where there is one."""
    root = Path(__file__).resolve().parents[4] / "shared" / "camvid"
    if not root.is_dir():
        pytest.skip(f"needs CamVid in VOC layout at {root}")
    return root


@pytest.fixture
def folder(tmp_path):
    from made_up import write_voc  # needs PIL, which tests on a GPU do without

    splits = {"train": ["a", "b", "c", "d", "e"], "val": ["x", "y", "z"]}
    return write_voc(tmp_path / "set", splits, classes=["sky", "road", "car"])
