"""What the tests share. `pytest tests`; `--hypothesis-profile long` for 1000 cases a property."""

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts, and bench as a package

hypothesis.settings.register_profile("short", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("short")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "gpu(count=1, gib=0): needs so many GPUs, memory free on each"
    )


def pytest_runtest_setup(item):
    for mark in item.iter_markers("gpu"):
        count, gib = mark.kwargs.get("count", 1), mark.kwargs.get("gib", 0)
        if torch.cuda.device_count() < count:
            pytest.skip(f"needs {count} GPU(s)")
        if gib and torch.cuda.mem_get_info()[0] < gib * 2**30:
            pytest.skip(f"needs {gib} GiB free on the GPU")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
