"""The text that the demo learns: real files, read as bytes, split into a training and a held-out part."""

import hashlib
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ep.cli.demo.options import UsageError

HELDOUT_SHARE = 0.1
# Folders of the standard library that hold other people's packages, or tests that repeat it.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text as bytes.

    Attributes:
        train: uint8 [n], the part that is learned.
        heldout: uint8 [m], the part that is only measured.
        num_files: files it was read from.
        source: one phrase that says where it came from.
        fingerprint: hex digest of both parts.
    """

    train: torch.Tensor
    heldout: torch.Tensor
    num_files: int
    source: str
    fingerprint: str

    def unigram_entropy(self) -> float:
        """Entropy of a single byte of the held-out part, in nats: no model without context can have a lower loss."""
        counts = torch.bincount(self.heldout.long(), minlength=256).double()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * p.log()).sum())


def load_corpus(paths: Sequence[str], *, max_bytes: int, seq: int) -> Corpus:
    """Read the text, whole files in an order that depends on their names alone.

    Args:
        paths: files and folders; empty for the source files of the running Python's standard library.
        max_bytes: reading stops after this many bytes.
        seq: length of a training sequence, in bytes.

    Raises:
        UsageError: when something cannot be read, is not text, or is too short for one sequence in either part.
    """
    files = _named_files(paths) if paths else _standard_library()
    # Ordered by a digest of the name: a capped text, and its last tenth, are then samples of the whole.
    files.sort(key=lambda item: hashlib.sha256(item[0].encode()).digest())
    pieces: list[bytes] = []
    num_bytes = 0
    for _, path in files:
        if num_bytes >= max_bytes:
            break
        pieces.append(_read(path)[: max_bytes - num_bytes])
        num_bytes += len(pieces[-1])
    data = b"".join(pieces)
    cut = math.ceil(len(data) * (1 - HELDOUT_SHARE))
    if len(data) - cut < seq + 1:
        raise UsageError(
            f"the text has {len(data)} bytes, and its held-out tenth is shorter than one sequence of {seq + 1}; "
            f"give at least {math.ceil((seq + 1) / HELDOUT_SHARE)} bytes with --text, or a smaller --seq"
        )
    everything = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Corpus(
        train=everything[:cut],
        heldout=everything[cut:],
        num_files=len(pieces),
        source=", ".join(paths) if paths else "the Python standard library",
        fingerprint=hashlib.sha256(data).hexdigest(),
    )


def draw_batch(text: torch.Tensor, *, batch: int, seq: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Draw ``batch`` random windows of ``text`` (uint8 [n]); returns (inputs, next bytes), both int64 [batch, seq]."""
    starts = torch.randint(len(text) - seq, (batch,), generator=generator)
    windows = text[starts[:, None] + torch.arange(seq + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def heldout_windows(text: torch.Tensor, *, seq: int, limit: int) -> torch.Tensor:
    """At most ``limit`` windows spread evenly over ``text`` (uint8 [n]), not overlapping; int64 [windows, seq + 1]."""
    num_windows = min(limit, len(text) // (seq + 1))
    starts = torch.linspace(0, len(text) - seq - 1, num_windows).long()
    return text[starts[:, None] + torch.arange(seq + 1)].long()


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    files = [(name, path) for name, path in files if not _SKIPPED_FOLDERS.intersection(name.split("/"))]
    if not files:
        raise UsageError(f"no source files of the standard library under {root}; name a text with --text PATH")
    return files


def _named_files(paths: Sequence[str]) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    for name in paths:
        root = Path(name)
        if root.is_dir():
            inside = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.is_file()]
            inside = [(name, path) for name, path in inside if not _is_binary(_read(path))]
            if not inside:
                raise UsageError(f"--text {name}: no text file in this folder; name a folder or file that holds text")
            files += inside
        elif _is_binary(_read(root)):
            raise UsageError(f"--text {name}: not a text file (it holds zero bytes); name a text")
        else:
            files.append((root.name, root))
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read ({error.strerror}); name a readable file or folder") from error


def _is_binary(data: bytes) -> bool:
    return b"\0" in data
