"""What kernels report to the host, as errors that say which rank, where, and what to do."""

from __future__ import annotations

from typing import Any

from moe_ep.backends.control import KINDS, ControlPlane
from moe_ep.errors import ExchangeMismatchError, MoeEpError, PeerAbortedError, PeerTimeoutError

_PHASES = (
    "to open exchange {expected}",
    "for rows of exchange {epoch}, group stamp {expected:#x}",
    "for room in its ring in exchange {epoch}, group stamp {expected:#x}",
)
_TIMEOUT, _ABORTED, _MISMATCH, _TOO_MANY_TOKENS = 1, 2, 3, 4
# Words of a header.
_KIND, _DIGEST, _SERIAL, _NOTE = 1, 2, 4, 5


def error_of(trouble: dict[str, Any], control: ControlPlane) -> MoeEpError:
    """The error of what went wrong.

    Args:
        trouble: what ``Channel.trouble`` returned.
        control: of the Buffer, which knows why a peer has raised.
    """
    rank, peer = control.rank, int(trouble["peer"])
    if trouble["kind"] == _ABORTED:
        reason = control.read_note("reason", int(trouble["theirs"][_NOTE]), peer) or "unknown"
        kind = KINDS[int(trouble["mine"][_KIND])]
        text = f"rank {peer} raised instead of taking part in {kind}: {reason}"
        return PeerAbortedError(text, rank=peer, reason=reason)
    if trouble["kind"] == _MISMATCH:
        return ExchangeMismatchError(
            f"ranks announce different exchanges: rank {rank}: {_describe(trouble['mine'])}; rank {peer}: "
            f"{_describe(trouble['theirs'])}; every rank must use the same settings and issue the same exchanges "
            "in the same order"
        )
    if trouble["kind"] == _TOO_MANY_TOKENS:
        return MoeEpError(
            f"rank {peer} sends {trouble['seen']} tokens, {trouble['expected']} fit: pass max_tokens_per_rank, the "
            "largest number of tokens that any rank will send"
        )
    expected, seen = int(trouble["expected"]), int(trouble["seen"])
    what = _PHASES[int(trouble["phase"])].format(expected=expected, epoch=expected >> 24)
    return PeerTimeoutError(
        f"rank {rank} waited {control.timeout_s:g} s for rank {peer} {what}; seen {seen:#x}: rank {peer} is "
        "late, dead, or issued other exchanges; call reset() on all ranks that live, or restart",
        ranks=(peer,),
    )


def _describe(header: list[int]) -> str:
    kind = KINDS[header[_KIND]] if 0 <= header[_KIND] < len(KINDS) else "?"
    replay = f" of plan {header[_SERIAL]}" if header[_SERIAL] else ""
    return f"{kind}{replay} with settings {header[_DIGEST]:#x}"
