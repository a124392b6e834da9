"""The examples run as they are, on CPU processes that torchrun starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import transformers

from moe_ep.integrations.transformers.versions import has_ep_registry
from tests.frameworks.transformers.training import load

ROOT = Path(__file__).resolve().parents[3]


def run(example: str, *options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / example), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finetuning(tmp_path: Path) -> None:
    output = run("transformers_finetune.py", "--steps", "20", "--output", str(tmp_path), "--lora")
    found = re.search(r"2 ranks, (\d+) parameters of experts on each: loss (\S+) -> (\S+)", output)
    assert found, output
    # Two layers with 4 experts of 3 x 64 x 64 on each rank, and LoRA of rank 8 beside both matrices of each expert.
    assert int(found[1]) == 2 * 4 * (3 * 64 * 64 + 8 * (64 + 128) + 8 * (64 + 64))
    # An even guess among 256 bytes costs log(256) = 5.5.
    assert 4.0 < float(found[2]) < 6.5
    assert float(found[3]) < float(found[2]) - 0.2
    assert (tmp_path / "adapter_model.safetensors").exists()


if has_ep_registry():

    def test_a_sharded_model(tmp_path: Path) -> None:
        output = run("transformers_sharded.py", "--steps", "21", "--output", str(tmp_path))
        losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+),", output)]
        assert len(losses) == 3, output
        assert losses[2] < losses[0] - 1
        assert isinstance(load(str(tmp_path)), transformers.Qwen2MoeForCausalLM)
