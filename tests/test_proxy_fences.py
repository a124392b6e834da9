"""Between the acquire of a flag and bulk copies of what it guards stands a proxy fence, on every path of every kernel.

The copy engine does not see what this thread has acquired until then. No GPU is needed to find a fence missing: the PTX
that nvcc makes is walked.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest

from build_tools.toolkit import find_nvcc, nvcc_host_compiler

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("open", "count", "dispatch", "combine")
ACQUIRE = re.compile(r"\bld\.acquire\.sys\b")
FENCE = re.compile(r"\bfence\.proxy\.async\.global\b")
BULK = re.compile(r"\bcp\.async\.bulk\.(shared|global)")
BRANCH = re.compile(r"^(@\S+\s+)?bra(\.uni)?\s+([\w$]+);")
# Nanoseconds, see csrc/device/faults.cuh.
FAULT_DELAY = re.compile(r"\b(50000|49999)\b")
CALL = re.compile(r"\bcall(\.uni)?\b")

NVCC = find_nvcc(os.environ)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def functions_of(ptx: str) -> dict[str, list[str]]:
    """The instructions and labels of every function, by its name."""
    found = {}
    for match in re.finditer(r"\.(?:entry|func)\b[^{;]*?([\w$]+)\s*\([^)]*\)[^{;]*\{", ptx):
        depth, at = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[at], 0)
            at += 1
        lines = (line.strip() for line in ptx[match.end() : at - 1].splitlines())
        found[match.group(1)] = [line for line in lines if line and not line.startswith(("//", ".loc", ".reg"))]
    return found


def unfenced(lines: list[str], acquirers: set[str]) -> list[str]:
    """Bulk copies that some path reaches after an acquire without a fence in between."""
    labels = {line[:-1]: index for index, line in enumerate(lines) if re.fullmatch(r"[\w$]+:", line)}
    seen: set[tuple[int, bool]] = set()
    todo, found = [(0, False)], []
    while todo:
        index, acquired = todo.pop()
        while index < len(lines) and (index, acquired) not in seen:
            seen.add((index, acquired))
            line = lines[index]
            # NOTE: calls stand on several lines, the name of what is called on one of its own.
            if ACQUIRE.search(line) or any(re.match(rf"{re.escape(name)}\s*,?$", line) for name in acquirers):
                acquired = True
            elif FENCE.search(line):
                acquired = False
            elif BULK.search(line) and "wait_group" not in line and acquired:
                found.append(line)
            branch = BRANCH.match(line)
            if branch and branch.group(3) in labels:
                todo.append((labels[branch.group(3)], acquired))
                if branch.group(1) is None:
                    break
            elif line.startswith("ret"):
                break
            index += 1
    return found


@functools.cache
def compile_to_ptx(kernel: str, *flags: str) -> str:
    assert NVCC is not None
    source = ROOT / "csrc" / "kernels" / f"{kernel}.cu"
    command = [
        NVCC.path,
        "-std=c++20",
        "-O3",
        "-arch=compute_90a",
        f"-I{ROOT / 'csrc'}",
        *flags,
        "-ptx",
        "-o",
        "-",
        str(source),
    ]
    done = subprocess.run([*command, *nvcc_host_compiler(os.environ)], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="module", params=KERNELS)
def functions(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    return functions_of(compile_to_ptx(request.param))


def acquiring(functions: dict[str, list[str]]) -> set[str]:
    return {name for name, lines in functions.items() if any(ACQUIRE.search(line) for line in lines)}


def test_every_acquire_is_fenced_before_bulk_copies(functions: dict[str, list[str]]) -> None:
    acquirers = acquiring(functions)
    assert acquirers
    for name, lines in functions.items():
        assert not unfenced(lines, acquirers), name


def test_a_missing_fence_is_found(functions: dict[str, list[str]]) -> None:
    copying = [name for name, lines in functions.items() if any(BULK.search(line) for line in lines)]
    if not copying:
        # This kernel leaves the copy engine alone, and the walk above had nothing to find.
        assert not any(FENCE.search(line) for lines in functions.values() for line in lines)
    for name in copying:
        fences = [index for index, line in enumerate(functions[name]) if FENCE.search(line)]
        assert fences
        for index in fences:
            planted = functions[name][:index] + functions[name][index + 1 :]
            assert unfenced(planted, acquiring(functions)), (name, index)


@pytest.mark.parametrize("kernel", ["dispatch", "combine"])
def test_planted_faults_are_in_builds_of_their_own(kernel: str) -> None:
    """The delay that widens them tells whether they are there."""
    planted = compile_to_ptx(kernel, "-DMOE_EP_PLANTED_FAULTS")
    assert FAULT_DELAY.search(planted)
    assert not FAULT_DELAY.search(compile_to_ptx(kernel))
