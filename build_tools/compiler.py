"""Compiles and links only what changed, several sources at a time.

An output is kept with a record of the command that made it and of the content of every file of ours that went in.
Contents, not times: pip's ever new build folder, with its own copy of pybind11, does not compile anew what is there.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One command that makes one file.

    Attributes:
        name: file name of the output; a hash of the command is put in front of its suffix.
        command: arguments without the output; the builder's ``aliases`` replace what differs between equal builds.
        inputs: files that go in. A compiler adds the headers it reads through ``depfile_flag``.
        versions: names the versions of whatever goes in from outside the tree: compilers, toolkits.
        depfile_flag: -MMD for compilers, None for linking.
    """

    name: str
    command: Sequence[str]
    inputs: Sequence[Path]
    versions: str
    depfile_flag: str | None = None


class CompileError(RuntimeError):
    """A compiler failed; the text is its command and its output."""


class Builder:
    """Runs steps into ``folder``, skipping those whose record still holds.

    Args:
        folder: where outputs and records live.
        root: files below it are tracked by content, others by the versions that a step states.
        aliases: strings in commands to be replaced for comparison.
        jobs: commands that run at once.
    """

    def __init__(self, folder: Path, *, root: Path, aliases: dict[str, str], jobs: int) -> None:
        self.folder = folder
        self.root = root
        self.aliases = aliases
        self.jobs = jobs
        self._digests: dict[Path, str] = {}

    def run(self, steps: Iterable[Step]) -> list[Path]:
        """Runs the steps beside each other and returns their outputs in order; the first failure is raised."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(self._run_one, steps))

    def _run_one(self, step: Step) -> Path:
        text = "\0".join([step.versions, *step.command, *map(str, step.inputs)])
        for volatile, alias in self.aliases.items():
            text = text.replace(volatile, alias)
        stem, suffix = step.name.split(".", 1)
        output = self.folder / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.{suffix}"
        record = output.with_name(output.name + ".json")
        if output.exists() and self._holds(record):
            return output
        depfile = output.with_name(output.name + ".d")
        extra = [step.depfile_flag, "-MF", str(depfile)] if step.depfile_flag else []
        command = [*step.command, *extra, "-o", str(output), *map(str, step.inputs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            output.unlink(missing_ok=True)
            raise CompileError(f"{' '.join(command)}\n{done.stdout}")
        inputs = _read_depfile(depfile) if step.depfile_flag else step.inputs
        tracked = sorted({path.resolve() for path in inputs if path.resolve().is_relative_to(self.root)})
        contents = {os.path.relpath(path, self.root): self._digest(path) for path in tracked}
        record.write_text(json.dumps(contents, indent=1), encoding="utf-8")
        return output

    def _holds(self, record: Path) -> bool:
        if not record.exists():
            return False
        contents = json.loads(record.read_text(encoding="utf-8"))
        paths = {self.root / name: digest for name, digest in contents.items()}
        return all(path.exists() and self._digest(path) == digest for path, digest in paths.items())

    def _digest(self, path: Path) -> str:
        # Sources do not change during a build, and every object names the same few headers.
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[path]


def _read_depfile(depfile: Path) -> list[Path]:
    # Make's syntax: "output: input input \<newline> input", blanks in names escaped.
    text = depfile.read_text(encoding="utf-8").replace("\\\n", " ").split(":", 1)[1]
    return [Path(name.replace("\0", " ")) for name in text.replace("\\ ", "\0").split()]
