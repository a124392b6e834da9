"""PEP 517 hooks: setuptools' own, plus the NVSHMEM wheel as a build requirement where the environment asks for it."""

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools.project import nvshmem_requirements

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns what ``pip wheel`` and ``pip install`` put into the build environment."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *nvshmem_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns what ``pip install -e`` puts into the build environment."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *nvshmem_requirements()]
