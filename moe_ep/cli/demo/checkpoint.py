"""One safetensors file holds a whole run: unsharded model and optimizer, random states, history. Written atomically."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from moe_ep.cli.demo.options import CHECKPOINT_NAME, UsageError

FORMAT = "moe_ep.demo"
VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run, independent of the number of ranks that wrote it.

    Attributes:
        step: steps done.
        tensors: "model.*" (the unsharded model), "optimizer.exp_avg.*", "optimizer.exp_avg_sq.*" (same shapes),
            "rng.*" (uint8 generator states) and "history.*"; all on the CPU.
        options: ``options.to_dict`` of the run.
        fingerprint: digest of the text.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    fingerprint: str

    def section(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with ``prefix`` and a dot, named without it."""
        start = prefix + "."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` so that ``path`` holds, at any moment, either the old file or the whole new one.

    Raises:
        OSError: when the folder cannot be written; ``path`` is then unchanged.
    """
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "step": str(checkpoint.step),
        "options": json.dumps(checkpoint.options, sort_keys=True),
        "fingerprint": checkpoint.fingerprint,
    }
    metadata["digest"] = _digest(tensors, metadata)
    write_atomically(path, to_bytes(tensors, metadata))


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        UsageError: when it is missing, a folder, half-written, damaged, or not a checkpoint of this demo.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the checkpoint in it, such as {path / CHECKPOINT_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UsageError(f"no checkpoint at {path}; name one that `moe-ep demo --out FOLDER` has written") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} is half-written, damaged, or no safetensors file ({error}); take another checkpoint"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UsageError(f"{path} is a safetensors file of another program; name a checkpoint of `moe-ep demo`")
    if metadata.get("version") != VERSION:
        raise UsageError(
            f"{path} has checkpoint version {metadata.get('version')}, this program reads {VERSION}; train anew"
        )
    if metadata.get("digest") != _digest(tensors, metadata):
        raise UsageError(f"{path} is damaged: its contents do not match its digest; take another checkpoint")
    return Checkpoint(
        step=int(metadata["step"]),
        tensors=tensors,
        options=json.loads(metadata["options"]),
        fingerprint=metadata["fingerprint"],
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: written beside it, flushed to the disk, then renamed.

    Raises:
        OSError: when the folder cannot be written; ``path`` is then unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    # The rename itself must reach the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(metadata):
        if name != "digest":
            digest.update(f"{name}={metadata[name]}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
