"""The frameworks' suite fails where it could stand for nothing: a package missing, another version, a skipped test."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.frameworks import session

ROOT = Path(__file__).resolve().parents[1]

PLUGIN = """
import pytest
from tests.frameworks.session import FailOnSkip

def pytest_configure(config):
    config.pluginmanager.register(FailOnSkip())
"""


def run_pytest(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(PLUGIN)
    (folder / "test_one.py").write_text(body)
    script = f"import sys, pytest; sys.path.insert(0, {str(ROOT)!r}); sys.exit(pytest.main(['-p', 'no:cacheprovider']))"
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def test_a(): pass", 0),
        ("import pytest\ndef test_a(): pytest.skip('no megatron')", 1),
        ("import pytest\npytest.importorskip('no_such_package')\ndef test_a(): pass", 1),
        ("import pytest\ndef test_a(): pytest.skip('needs 2 GPU(s), found 0')", 0),
    ],
)
def test_a_skipped_test_fails_the_session(tmp_path: Path, body: str, code: int):
    # A second test that passes: a session of nothing but skips has another exit code of its own.
    (tmp_path / "test_two.py").write_text("def test_b(): pass")
    done = run_pytest(tmp_path, body)
    assert done.returncode == code, done.stdout + done.stderr


def test_every_package_of_a_folder_is_pinned_and_must_match(monkeypatch: pytest.MonkeyPatch):
    pins = session.pinned_versions()
    for folder, packages in session.FOLDERS.items():
        monkeypatch.setattr(session, "installed_version", pins.__getitem__)
        assert session.problems_of(folder) == []
        monkeypatch.setattr(session, "installed_version", lambda package: None)
        assert session.problems_of(folder) == [f"{package} is None, not {pins[package]}" for package in packages]
    floor = session.pinned_versions(floor=True)
    assert floor["transformers"] != pins["transformers"]
    monkeypatch.setattr(session, "installed_version", floor.__getitem__)
    assert session.problems_of("transformers", floor=True) == []
    assert session.problems_of("transformers") == [
        f"transformers is {floor['transformers']}, not {pins['transformers']}"
    ]


def test_no_line_of_what_is_resolved_asks_for_torch():
    lines = (session.REQUIREMENTS / "imports.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    # These bring torch, or packages built for CUDA, unless they are installed --no-deps.
    assert not {"torch", *session.pinned_versions()} & {name.split("=")[0].split(">")[0] for name in names}
