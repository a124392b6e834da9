"""Thousands of exchanges among ranks that start them at random times, each checked; also a program of its own.

``python -m tests.gpu.stress --exchanges 20000 --ranks 2`` ends with a line of JSON, or raises at the first mismatch.
Every rank takes a GPU of its own as long as there are enough; otherwise ranks share them, and take turns.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep import Buffer
from moe_ep.backends.control import Call
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.config import Capacity, ExchangeSpec
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext

_SKEW_CYCLES = 200_000
_KINDS = ("uniform", "zipf", "one", "empty", "holes")
_SETTINGS = 7
# Largest T, and where rings are granted, so that they are gone round several times.
_MAX_TOKENS, _MAX_TOKENS_GRANTED = 64, 256
_HIDDEN, _HIDDEN_GRANTED = (8, 64, 520, 2048, 7168), (2048, 7168)


class Exchanges:
    """Calls of a Buffer's CUDA backend with headers of their own, on the current stream or on the communication stream.

    Args:
        buffer: whose exchanges they are.
        draw: decides which, differently on every rank.
    """

    def __init__(self, buffer: Buffer, draw: random.Random) -> None:
        assert isinstance(buffer.backend, CudaBackend)
        self.backend = buffer.backend
        self._draw = draw

    def _inline(self) -> bool:
        return self._draw.random() < 0.5

    def _header(self, kind: str, serial: int = 0) -> list[int]:
        return self.backend.link.header(Call(kind, _SETTINGS, serial))

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, weights: Tensor, spec: ExchangeSpec, max_tokens: int, lends: bool
    ) -> Any:  # noqa: ANN401
        record = (x.shape[1] * x.itemsize, 3 * spec.top_k + x.shape[1] // 128)
        self.backend.ensure(x.shape[0], *record)
        # A grant may have no room for a fixed number of rows.
        lends = lends and self.backend.ensure_direct(spec, max_tokens, record) is None
        header = self._header("dispatch")
        return self.backend.dispatch(
            x, None, topk_idx, weights, spec, header, 1, max_tokens=max_tokens, lends=lends, inline=self._inline()
        ).result()

    def combine(self, y: Tensor, plan: Any) -> Tensor:  # noqa: ANN401
        header = self._header("combine", plan.serial)
        return self.backend.combine(y, None, plan, header, inline=self._inline()).result()[0]

    def replay(self, x: Tensor, plan: Any) -> Tensor:  # noqa: ANN401
        header = self._header("replayed dispatch", plan.serial)
        return self.backend.replay(x, plan, header, inline=self._inline()).result()[0]


def expected_rows(spec: ExchangeSpec, rank: int, ids: list[Tensor], xs: list[Tensor]) -> Tensor:
    """Expanded rows without padding, in the promised order: local expert, source rank, token."""
    local = spec.num_local_experts
    parts = [
        xs[source][(ids[source] == expert).nonzero()[:, 0]]
        for expert in range(rank * local, (rank + 1) * local)
        for source in range(spec.num_ranks)
    ]
    return torch.cat(parts)


def expected_compact(spec: ExchangeSpec, rank: int, ids: list[Tensor], xs: list[Tensor]) -> Tensor:
    """Compact rows in the promised order: source rank, token."""
    here = [(topk_idx // spec.num_local_experts == rank).any(1) for topk_idx in ids]
    return torch.cat([x[mask] for x, mask in zip(xs, here, strict=True)])


def draw_spec(draw: random.Random, size: int, most: int, granted: bool) -> ExchangeSpec:
    """Settings of exchanges of at most ``most`` tokens per rank, same on all ranks; ``granted``: of long rows alone."""
    hidden = draw.choice(_HIDDEN_GRANTED if granted else _HIDDEN)
    num_experts = draw.choice((1, 2, 8)) * size
    compact, room = draw.random() < 0.3, size * most
    return ExchangeSpec(
        num_experts=num_experts,
        hidden_size=hidden,
        top_k=min(draw.choice((1, 2, 4)), num_experts),
        num_ranks=size,
        dtype=torch.float32 if hidden < 2048 else torch.bfloat16,
        layout="compact" if compact else "expanded",
        weights="experts",
        capacity=(Capacity(rows=room) if compact else Capacity(per_expert=room)) if draw.random() < 0.5 else None,
    )


def stress(
    ctx: RankContext,
    seed: int,
    num_exchanges: int,
    granted_bytes: int,
    beside_nccl: bool,
    fault: int,
    beside_gemm: bool = True,
    bulk: bool = True,
    lending: float = 0.3,
    most: int | None = None,
) -> int:
    """Rounds of dispatch, combine and replay over changing shapes, each after a delay that differs between ranks.

    Args:
        ctx: of the rank.
        seed: of everything that is drawn.
        num_exchanges: to make at least.
        granted_bytes: rings of one rank; 0 for as much as is needed.
        beside_nccl: whether all-reduces run beside some exchanges.
        fault: planted in the kernels, 0 for none.
        beside_gemm: whether GEMMs do.
        bulk: whether some exchanges copy by the copy engine.
        lending: share of dispatches whose rows stay in the arena.
        most: largest T; None for few.
    """
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    # A group of its own; NCCL cannot share a GPU between ranks.
    other = dist.new_group(backend="nccl") if beside_nccl else None
    buffer = Buffer(ctx.group, granted_bytes * ctx.world_size, backend="cuda", timeout_s=20 if fault == 0 else 2)
    draw, skew = random.Random(seed), random.Random(seed * 100 + ctx.rank)
    me, size = Exchanges(buffer, skew), ctx.world_size
    most = most or (_MAX_TOKENS_GRANTED if granted_bytes else _MAX_TOKENS)
    side, reduced = torch.cuda.Stream(), torch.ones(1 << 20, device="cuda")
    left = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    done = 0
    with torch.no_grad():
        while done < num_exchanges:
            spec = draw_spec(draw, size, most, granted_bytes > 0)
            tokens = [draw.choice((0, 1, 5, 33, most)) for _ in range(size)]
            me.backend.settings.bulk = draw.random() < 0.7 and bulk and torch.cuda.get_device_capability() >= (9, 0)
            kind, routing_seed = draw.choice(_KINDS), draw.randrange(1 << 30)
            ids, xs = [], []
            for source, count in enumerate(tokens):
                topk_idx, _ = make_routing(count, spec.top_k, spec.num_experts, kind=kind, seed=routing_seed + source)
                ids.append(topk_idx.cuda())
                generator = torch.Generator().manual_seed(routing_seed + source)
                values = torch.randint(-4, 5, (count, spec.hidden_size), generator=generator)
                xs.append(values.to("cuda", spec.dtype))
            compact, lends = spec.layout == "compact", draw.random() < lending
            want = (expected_compact if compact else expected_rows)(spec, ctx.rank, ids, xs)
            about = (f"rank {ctx.rank}", f"bulk {me.backend.settings.bulk}", f"lends {lends}", spec, tokens, kind)
            x, topk_idx = xs[ctx.rank], ids[ctx.rank]
            homes = topk_idx // spec.num_local_experts
            visits = (homes.unsqueeze(2) == torch.arange(size, device="cuda")).any(1)
            counts = (visits if compact else topk_idx >= 0).sum(1, keepdim=True).to(spec.dtype)
            sums = x * counts
            weights = torch.ones(topk_idx.shape, device="cuda")
            if fault and done == 0:
                me.backend.ensure(tokens[ctx.rank], spec.hidden_size * spec.dtype.itemsize, 3 * spec.top_k)
            if fault:
                me.backend.link.channel.plant_fault(fault)
            # NOTE: every rank repeats a shape equally often, so that all issue the same exchanges.
            for turn in range(10):
                done += 3
                # What an exchange before has left anywhere is not what this one has to bring.
                now, rows_now, sums_now = x + turn, want + turn, sums + turn * counts
                if skew.random() < 0.5:
                    torch.cuda._sleep(skew.randrange(_SKEW_CYCLES))
                if draw.random() < 0.2:
                    with torch.cuda.stream(side):
                        if other is not None:
                            dist.all_reduce(reduced, dist.ReduceOp.MAX, group=other)
                        if beside_gemm:
                            left @ left
                result = me.dispatch(now, topk_idx, weights, spec, 0 if spec.capacity is None else most, lends)
                # What lies in the arena is over before the host has looked at it, and written by what comes next.
                rows = result.rows.clone() if result.in_arena else result.rows
                sent_home = me.combine(rows, result.plan)
                _check(me, real_rows(rows, result, spec, len(want)), rows_now, "rows", about)
                _check(me, sent_home, sums_now, "sums", about)
                again = me.replay(-now, result.plan)
                _check(me, real_rows(again, result, spec, len(want)), -rows_now, "replayed rows", about)
    torch.cuda.synchronize()
    me.backend.link.check()
    return done


def real_rows(rows: Tensor, result: Any, spec: ExchangeSpec, num_rows: int) -> Tensor:  # noqa: ANN401
    """Layout rows without what nobody wrote behind each expert's last one, or behind ``num_rows`` compact ones."""
    if spec.capacity is None:
        return rows
    if spec.layout == "compact":
        return rows[:num_rows]
    per_expert = spec.capacity.per_expert
    places = torch.arange(rows.shape[0], device=rows.device) % per_expert
    return rows[places < result.tokens_per_expert.repeat_interleave(per_expert)]


def _check(me: Exchanges, got: Tensor, want: Tensor, what: str, about: tuple[Any, ...]) -> None:
    if not torch.equal(got, want):
        # Outputs of an exchange that failed are nobody's.
        me.backend.link.check()
        raise AssertionError(f"{what} differ: {about}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exchanges", type=int, default=20_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--granted-bytes", type=int, default=0, help="rings of one rank; small ones need several laps")
    parser.add_argument(
        "--tokens", type=int, help="largest number of tokens per rank; from 1024 on pipes have other shapes"
    )
    parser.add_argument("--alone", action="store_true", help="without NCCL and GEMMs beside, for memory checkers")
    parser.add_argument("--vector", action="store_true", help="by vector loads and stores alone, which checkers see")
    options = parser.parse_args()
    beside_nccl = not options.alone and 1 < options.ranks <= torch.cuda.device_count()
    start = time.monotonic()
    ways = (not options.alone, not options.vector)
    arguments = (options.seed, options.exchanges, options.granted_bytes, beside_nccl, 0, *ways)
    done = run_ranks(options.ranks, stress, *arguments, 0.3, options.tokens, timeout=600.0)
    told = {**vars(options), "done": done[0], "beside_nccl": beside_nccl, "mismatches": 0}
    sys.stdout.write(json.dumps({**told, "seconds": round(time.monotonic() - start, 1)}) + "\n")


if __name__ == "__main__":
    main()
