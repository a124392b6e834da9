"""Tests with the training frameworks themselves, one folder and one process per framework.

Frameworks patch torch and read the environment when they are imported, so ``make test-frameworks`` runs each folder in
an interpreter of its own and names it in ``MOE_EP_FRAMEWORK``. That run stands for the framework: a package that is
missing, a version that is not the pinned one, or a skipped test fails it. Any other run of pytest collects the folders
of those frameworks that are installed.
"""

import os
from pathlib import Path

import pytest

from tests.frameworks.session import FOLDERS, FailOnSkip, problems_of

NAMED = os.environ.get("MOE_EP_FRAMEWORK")
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if NAMED is None:
        return
    if NAMED not in FOLDERS:
        raise pytest.UsageError(f"MOE_EP_FRAMEWORK={NAMED!r}: must be one of {', '.join(FOLDERS)}")
    problems = problems_of(NAMED, floor=bool(os.environ.get("MOE_EP_FLOOR")))
    if problems:
        raise pytest.UsageError(f"{'; '.join(problems)}: `make clean`, then `make test-frameworks` installs the pins")
    config.pluginmanager.register(FailOnSkip(), "fail-on-skip")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.frameworks)
