"""Fixtures and markers for all tests."""

from collections.abc import Callable

import pytest
import torch

from moe_ep.testing import run_ranks


def pytest_configure() -> None:
    # Small tensors gain nothing from threads, and threads of several processes wait for each other.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    for item in items:
        mark = item.get_closest_marker("multi_gpu")
        needed = mark.args[0] if mark else int(item.get_closest_marker("gpu") is not None)
        if needed > found:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), found {found}"))


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list]:
    """``ranks(4, fn, *args)`` runs ``fn(ctx, *args)`` on the session's pool of four processes."""
    return run_ranks
