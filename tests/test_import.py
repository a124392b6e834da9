"""``import moe_ep`` registers operators and does nothing else."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, threading
import torch, einops  # what the package stands on may do as it likes

environment, threads, modules = dict(os.environ), threading.enumerate(), set(sys.modules)
import {module}

assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert threading.enumerate() == threads, threading.enumerate()
assert not torch.cuda.is_initialized()
assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
loaded = set(sys.modules) - modules
unwanted = ("moe_ep._C", "moe_ep.cli", "moe_ep.testing", "matplotlib", "rich", "safetensors", "megatron")
assert not [name for name in loaded if name.startswith(unwanted)], loaded
"""


@pytest.mark.parametrize("module", ["moe_ep", "moe_ep.layers"])
def test_import_has_no_side_effect(module: str):
    script = SCRIPT.replace("{module}", module)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_operators_are_registered_by_the_import():
    names = ("dispatch", "combine", "dispatch_replay", "combine_grads")
    script = f"import torch, moe_ep; print(*[name for name in {names} if hasattr(torch.ops.moe_ep, name)])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == list(names), done.stdout + done.stderr


def test_top_level_folders_refuse_to_be_imported_by_their_own_name():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in ("layers", "integrations"):
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=root, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"import moe_ep.{name}, not the top-level folder {name}" in done.stderr
