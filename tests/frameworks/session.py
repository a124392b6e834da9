"""What a run of this suite stands for: packages of each folder, their pinned versions, and no skipped test."""

import re
from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements"

# Folder: packages without which it says nothing. FSDP2, DDP and DCP are torch's own.
FOLDERS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("deepspeed",),
    "fsdp": (),
    "megatron": ("megatron-core",),
    "torchtitan": ("torchtitan", "spmd_types"),
    "transformers": ("transformers", "accelerate", "peft"),
}


def pinned_versions(*, floor: bool = False) -> dict[str, str]:
    """Version of every pinned package; with ``floor`` those of the oldest supported transformers."""
    names = ["frameworks", *(["transformers_floor"] if floor else [])]
    lines = "\n".join((REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8") for name in names)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lines, re.MULTILINE))


def installed_version(package: str) -> str | None:
    """Version of ``package`` in this interpreter, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing_packages(folder: str) -> list[str]:
    """Packages of ``folder`` that this interpreter lacks."""
    return [package for package in FOLDERS[folder] if installed_version(package) is None]


def is_collectable(path: Path) -> bool:
    """Whether this interpreter has what a folder here, or an adapter in ``integrations``, imports."""
    if path.parent not in (HERE, HERE.parents[1] / "moe_ep" / "integrations"):
        return True
    folders = [folder for folder in FOLDERS if path.name.startswith(folder)]
    return not any(missing_packages(folder) for folder in folders)


def problems_of(folder: str, *, floor: bool = False) -> list[str]:
    """What keeps this interpreter from standing for the frameworks of ``folder``."""
    pins = pinned_versions(floor=floor)
    found = {package: installed_version(package) for package in FOLDERS[folder]}
    return [
        f"{package} is {found[package]}, not {pins[package]}" for package in found if found[package] != pins[package]
    ]


class FailOnSkip:
    """pytest plugin: a session with skipped tests fails, unless they were skipped for want of GPUs."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and "GPU(s), found" not in str(report.longrepr):
            self.skipped.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for skipped in self.skipped:
            terminalreporter.write_line(f"skipped where nothing may be: {skipped}", red=True)
