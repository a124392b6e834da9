import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_ep.cli import demo
from moe_ep.cli.demo import checkpoint as checkpoints
from moe_ep.cli.demo.options import DemoOptions
from moe_ep.cli.demo.report import describe
from moe_ep.cli.demo.sampling import load_unsharded
from tests.cli.demo.common import CPU, SMALL, parse


@pytest.fixture
def no_launch(monkeypatch):
    monkeypatch.setattr(demo, "launch", lambda *_: pytest.fail("a process was started"))


def refused(capsys, *arguments):
    assert demo.run(parse(*arguments)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_unreadable_text(capsys, no_launch, tmp_path):
    assert "cannot be read" in refused(capsys, "--text", tmp_path / "none", "--out", tmp_path)


def test_unwritable_folders(capsys, no_launch, tmp_path, text):
    (tmp_path / "file").write_text("")
    assert "--out: cannot write" in refused(capsys, *SMALL, "--text", text, "--out", tmp_path / "file" / "out")
    gone = tmp_path / "gone" / "summary.json"
    assert "--json: cannot write" in refused(capsys, *SMALL, "--text", text, "--out", tmp_path, "--json", gone)


def test_a_folder_or_a_locked_file_for_the_summary(capsys, no_launch, tmp_path, text, monkeypatch):
    arguments = [*SMALL, "--text", text, "--out", tmp_path / "out", "--json"]
    assert f"--json: {tmp_path} is a folder; name a file" in refused(capsys, *arguments, tmp_path)
    locked = tmp_path / "summary.json"
    locked.write_text("")
    # Root may write everywhere: the answer of the system is made up.
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)
    assert f"--json: {locked} is there and may not be written" in refused(capsys, *arguments, locked)


def test_a_temperature_that_is_no_number(capsys, no_launch, tmp_path, text):
    wrong = refused(capsys, *SMALL, "--text", text, "--out", tmp_path, "--temperature", "nan")
    assert "--temperature nan must be a finite number" in wrong
    args = parse_generate("--temperature", "nan")
    assert demo.run_generate(args) == 2
    assert "--temperature nan must be a finite number" in capsys.readouterr().err


def test_bad_checkpoints(capsys, no_launch, tmp_path):
    assert "no checkpoint" in refused(capsys, "--out", tmp_path, "--resume")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x10")
    assert "half-written" in refused(capsys, "--out", tmp_path, "--resume")
    assert "is a folder; name the checkpoint" in refused(capsys, "--out", tmp_path, "--resume", tmp_path)


def test_a_finished_run_is_not_continued_unless_more_steps_are_asked_for(capsys, no_launch, tmp_path, text):
    options = {"model": {}, "train": {"text": [str(text)]}, "steps": 100}
    done = checkpoints.Checkpoint(step=100, tensors={}, options=options, fingerprint="")
    checkpoints.save(tmp_path / "checkpoint.safetensors", done)
    assert "--steps 100: the checkpoint" in refused(capsys, "--out", tmp_path, "--resume")


def start(text, out, *arguments):
    command = [sys.executable, "-m", "moe_ep", "demo", *SMALL, "--text", text, "--out", out, "--log-every", "1"]
    process = subprocess.Popen(
        [str(part) for part in (*command, *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for line in process.stdout:
        if line.startswith("step"):
            return process, children_of(process.pid)
    pytest.fail(f"no step was shown: {process.communicate()[1]}")


def test_from_the_command_line_to_the_last_file(text, tmp_path, capfd):
    out, summary_path = tmp_path / "out", tmp_path / "summary.json"
    arguments = [*SMALL, "--text", text, "--out", out, "--json", summary_path, "--steps", 30, "--check", "--ranks", 2]
    arguments += ["--prompt", os.fsdecode(b"\xff")]
    assert demo.run(parse(*arguments)) == 0
    summary = json.loads(summary_path.read_text())
    assert {"initial_loss", "final_loss", "heldout_loss", "unigram_entropy", "check_max_loss_diff",
            "tokens_per_second", "expert_load_cv", "ranks", "backend"} <= summary.keys()  # fmt: skip
    assert summary["check_max_loss_diff"] < 1e-4
    assert summary["final_loss"] < summary["initial_loss"]
    assert 0 < summary["exchange_time_share"] < 1
    assert summary["expert_load_cv"] > 0
    assert summary["sample"].startswith("\ufffd")
    assert (summary["ranks"], summary["backend"], summary["check_passed"]) == (2, "torch", True)
    files = {"loss.png", "expert_load.png", "timeline.png", "metrics.json", "checkpoint.safetensors"}
    assert {path.name for path in out.iterdir()} == files
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["history"]["loss"]) == 30
    printed = capfd.readouterr().out
    assert "unigram entropy" in printed
    assert "step 30/30" in printed
    assert describe(DemoOptions(out=out), summary) in printed

    checkpoint = str(out / "checkpoint.safetensors")
    args = parse_generate("--checkpoint", checkpoint, "--prompt", "router", "--bytes", "12")
    assert demo.run_generate(args) == 0
    assert capfd.readouterr().out.startswith("router")
    args.prompt = os.fsdecode(b"\xff")
    assert demo.run_generate(args) == 0
    assert capfd.readouterr().out.startswith("\ufffd")
    args.checkpoint = out / "loss.png"
    assert demo.run_generate(args) == 2
    # The checkpoint holds every expert, whatever the ranks.
    assert load_unsharded(checkpoints.load(Path(checkpoint)), CPU).moe_layers()[0].experts.num_local_experts == 4


def test_under_torchrun(text, tmp_path):
    out, summary_path = tmp_path / "out", tmp_path / "summary.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moe_ep"]
    command += ["demo", *SMALL, "--text", text, "--out", out, "--json", summary_path, "--steps", "3", "--check", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    summary = json.loads(summary_path.read_text())
    assert (summary["ranks"], summary["step"], summary["check_passed"]) == (2, 3, True)
    # Rank 0 alone speaks.
    assert done.stdout.count("step 3/3") == 1
    assert (out / "timeline.png").exists()


def test_ctrl_c_ends_every_process_and_keeps_a_checkpoint(text, tmp_path):
    process, children = start(text, tmp_path, "--steps", 1_000_000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert_gone(children)
    assert checkpoints.load(tmp_path / "checkpoint.safetensors").step >= 1


def test_a_killed_rank_ends_all_and_is_named(text, tmp_path):
    process, children = start(text, tmp_path, "--steps", 1_000_000)
    # Ranks are started in order, after the helper process of multiprocessing.
    victim = children[-1]
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"rank 1 (process {victim}) was killed by SIGKILL" in errors
    assert_gone(children)


def test_ranks_end_when_their_parent_is_killed(text, tmp_path):
    process, children = start(text, tmp_path, "--steps", 1_000_000)
    process.kill()
    process.communicate(timeout=60)
    assert_gone(children)


def parse_generate(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_generate_arguments(parser)
    return parser.parse_args(arguments)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids):
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids
    assert not any(map(is_alive, pids))
