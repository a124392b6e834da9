"""What pytest collects: nothing that needs a framework which is not installed, such as doctests of its adapter."""

from pathlib import Path

from tests.frameworks.session import is_collectable


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # None leaves the answer to others.
    return None if is_collectable(collection_path) else True
