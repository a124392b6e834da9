"""``moe-ep doctor``: what is installed here, what is missing, what that costs, and what mends it."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import moe_ep
from moe_ep.backends.cuda import why_not_cuda
from moe_ep.cli.findings import REBUILD, REBUILD_CUDA, Finding, one_line
from moe_ep.cli.machine import examine_gpus, examine_tools, examine_torch
from moe_ep.cli.tables import print_table
from moe_ep.errors import NotBuiltError

EXIT_BROKEN = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``moe-ep doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.epilog = "Exit code 1 when something installed is broken, 0 otherwise: what is merely absent is no fault."


def run(args: argparse.Namespace) -> int:
    """Print every finding; returns 1 when something that is installed is broken, else 0."""
    findings = examine()
    code = exit_code(findings)
    if args.json:
        print(json.dumps({"exit_code": code, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return code
    rows = [[finding.part, finding.name, finding.state, describe(finding)] for finding in findings]
    print_table(f"moe_ep {moe_ep.__version__}", ("part", "name", "state", "what was found"), rows)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    print(f"broken: {', '.join(broken)}" if broken else "nothing that is installed is broken")
    return code


def exit_code(findings: Iterable[Finding]) -> int:
    return EXIT_BROKEN if any(finding.state == "broken" for finding in findings) else 0


def describe(finding: Finding) -> str:
    """Found, cost and remedy as one sentence each."""
    cost = f". Cost: {finding.cost}" if finding.cost else ""
    remedy = f". Mend: {finding.remedy}" if finding.remedy else ""
    return finding.found + cost + remedy


def examine() -> list[Finding]:
    """Look at everything; touches GPUs only to read their properties. No part's failure hides another's findings."""
    parts: tuple[Callable[[], list[Finding]], ...] = (
        examine_python,
        examine_torch,
        examine_gpus,
        examine_extensions,
        examine_tools,
        examine_packages,
        examine_backend,
        examine_timeouts,
    )
    findings = []
    for part in parts:
        try:
            findings += part()
        except Exception as error:
            name = part.__name__.removeprefix("examine_")
            findings.append(Finding(part=name, name="examination", state="broken", found=one_line(error)))
    return findings


def examine_python() -> list[Finding]:
    where = str(Path(moe_ep.__file__).resolve().parent)
    return [
        Finding(
            part="python", name="python", state="ok", found=f"{platform.python_version()} on {platform.platform()}"
        ),
        Finding(part="python", name="moe_ep", state="ok", found=f"{moe_ep.__version__} in {where}"),
    ]


def examine_extensions() -> list[Finding]:
    """The two extension modules, what they were built with, and what was left out of them."""
    kernels = "the CUDA kernels: the torch backend serves"
    core = examine_extension("moe_ep._C", kernels, REBUILD)
    findings = [core]
    info = _build_info("moe_ep._C") if core.state == "ok" else {}
    if info and not info["cuda"]:
        reason = info["not_built"] or "the extension holds host code only"
        findings.append(
            Finding(
                part="extensions", name="CUDA kernels", state="absent", found=reason, cost=kernels, remedy=REBUILD_CUDA
            )
        )
    internode = examine_extension(
        "moe_ep._C_internode",
        "the CUDA kernels between nodes: several nodes go through the torch backend",
        "MOE_EP_WITH_NVSHMEM=cu13 pip install . (in the source tree; cu12 for CUDA 12)",
    )
    return [*findings, internode]


def examine_extension(name: str, cost: str, remedy: str, folder: Path | None = None) -> Finding:
    """Whether an extension module is built, for this interpreter, and imports.

    Args:
        name: dotted name.
        cost: what its absence costs.
        remedy: how to build it.
        folder: where its file would lie; None is the package's folder.
    """
    stem = name.rpartition(".")[2]
    folder = Path(moe_ep.__file__).parent if folder is None else folder
    files = sorted(path.name for path in folder.glob(f"{stem}.*") if path.suffix in (".so", ".pyd"))
    if not files:
        return Finding(part="extensions", name=name, state="absent", found="not built", cost=cost, remedy=remedy)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if importlib.util.find_spec(name) is None:
        found = f"{', '.join(files)} is built for another Python than this one ({suffix})"
        return Finding(part="extensions", name=name, state="broken", found=found, cost=cost, remedy=remedy)
    try:
        info = _build_info(name)
    except Exception as error:
        found = f"{files[0]} does not work: {one_line(error)}"
        return Finding(part="extensions", name=name, state="broken", found=found, cost=cost, remedy=remedy)
    return Finding(part="extensions", name=name, state="ok", found=describe_build(info))


def _build_info(name: str) -> dict:
    """What an extension module says about itself; importing it is the test that it works.

    Raises:
        ImportError: it does not import.
        NotBuiltError: it meets an NVSHMEM older than the one it was built against, which NVSHMEM does not support.
    """
    info = importlib.import_module(name).build_info()
    built, found = info.get("nvshmem_built", ""), info.get("nvshmem_found", "")
    if _numbers(found) < _numbers(built) or _numbers(found)[:1] != _numbers(built)[:1]:
        raise NotBuiltError(f"built against NVSHMEM {built}, but NVSHMEM {found} is found at run time")
    return info


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def describe_build(info: dict) -> str:
    """What an extension says about its own build, as ``name value`` pairs."""

    def show(value: object) -> str:
        if isinstance(value, (list, tuple)):
            return " ".join(str(part) for part in value) or "none"
        return "none" if value in (None, "") else str(value)

    return ", ".join(f"{name.replace('_', ' ')}: {show(value)}" for name, value in info.items())


# What each optional package is for.
PACKAGES = {
    "matplotlib": "the plots of demo and bench",
    "rich": "tables and live lines in colour; plain text serves",
    "safetensors": "checkpoints of the demo",
}


def examine_packages() -> list[Finding]:
    findings = []
    for name, use in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
            findings.append(Finding(part="packages", name=name, state="ok", found=version))
        except importlib.metadata.PackageNotFoundError:
            remedy = "pip install 'moe_ep[demo]'"
            findings.append(
                Finding(part="packages", name=name, state="absent", found="not installed", cost=use, remedy=remedy)
            )
    return findings


def examine_backend() -> list[Finding]:
    """What ``backend="auto"`` chooses here, as the Buffer does."""
    reason = why_not_cuda()
    found = "cuda for NCCL groups whose GPUs reach each other, torch for others"
    if reason is not None:
        found = f"torch: {reason}"
    return [Finding(part="backend", name="auto", state="ok", found=found)]


def examine_timeouts() -> list[Finding]:
    """Which timeout rules when a peer is missing."""
    try:
        seconds = moe_ep.Buffer(None, backend="torch").timeout_s
    except ValueError as error:
        wrong = Finding(
            part="notes",
            name="timeout",
            state="broken",
            found=f"every Buffer without a timeout_s= of its own raises {one_line(error)}",
            remedy="set MOE_EP_TIMEOUT_S to seconds, such as 600, or unset it",
        )
        return [wrong]
    asked = "MOE_EP_TIMEOUT_S" in os.environ
    default = f"{seconds:g} s ({'set by MOE_EP_TIMEOUT_S' if asked else 'timeout_s= or MOE_EP_TIMEOUT_S change it'})"
    gloo = f"an exchange waits for its peers for {default}, then raises PeerTimeoutError naming those missing"
    nccl = (
        "with an NCCL group its own watchdog rules: it ends the process after the timeout given to init_process_group "
        "(default 600 s), and PeerTimeoutError may not come first"
    )
    return [
        Finding(part="notes", name="timeout", state="note", found=gloo),
        Finding(part="notes", name="timeout, nccl", state="note", found=nccl),
    ]
