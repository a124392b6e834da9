import os
import re
import struct

import pytest
import torch
from safetensors.torch import save_file

from moe_ep.cli.demo import checkpoint as checkpoints
from moe_ep.cli.demo.options import UsageError


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    tensors = {"model.a": torch.arange(6.0).view(2, 3), "history.loss": torch.zeros(0, dtype=torch.float64)}
    checkpoints.save(
        path, checkpoints.Checkpoint(step=3, tensors=tensors, options={"model": {"hidden": 8}}, fingerprint="f")
    )
    return path


def test_round_trip(saved):
    loaded = checkpoints.load(saved)
    assert (loaded.step, loaded.options, loaded.fingerprint) == (3, {"model": {"hidden": 8}}, "f")
    assert torch.equal(loaded.section("model")["a"], torch.arange(6.0).view(2, 3))
    assert os.listdir(saved.parent) == [saved.name]


def test_every_truncation_is_noticed(saved):
    whole = saved.read_bytes()
    for length in (0, 4, 8, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="half-written"):
            checkpoints.load(saved)


def test_a_flipped_bit_of_a_tensor_or_of_the_metadata_is_noticed(saved):
    whole = saved.read_bytes()
    for place in (len(whole) - 1, whole.index(b'"step":"3"') + 8):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UsageError, match="damaged"):
            checkpoints.load(saved)


def test_foreign_and_missing_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("not a checkpoint at all")
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    expected = {"other": "another program", "text": "no safetensors", "huge": "no safetensors", "none": "no checkpoint"}
    expected["."] = re.escape(f"is a folder; name the checkpoint in it, such as {tmp_path / 'checkpoint.safetensors'}")
    for name, message in expected.items():
        with pytest.raises(UsageError, match=message):
            checkpoints.load(tmp_path / name)


def test_a_failing_write_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(saved, checkpoints.Checkpoint(step=4, tensors={}, options={}, fingerprint=""))
    assert saved.read_bytes() == before
