"""``moe-ep plan``: rows, bytes and memory of a deployment, computed from its numbers without running it."""

import argparse
import json
from dataclasses import asdict, dataclass

import torch

from moe_ep.cli.tables import print_table
from moe_ep.config import ExchangeSpec, expected_ranks_per_token, record_bytes
from moe_ep.testing import make_routing

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Tokens drawn for routings that have no closed formula; the error of a mean row count is below 1 %.
SAMPLE_TOKENS = 16384


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Expected rows of one exchange, per token of a source rank.

    Attributes:
        ranks_per_token: distinct ranks that a token's experts live on.
        busiest_visits: the same tokens seen by the busiest rank: visits to it, times R (equals ``ranks_per_token`` when
            balanced).
        busiest_choices: choices of the busiest rank, times R (equals K when balanced).
        busiest_expert: choices of the busiest expert, times E / K (1 when balanced).
    """

    ranks_per_token: float
    busiest_visits: float
    busiest_choices: float
    busiest_expert: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure: what it is, its value, and the formula it comes from."""

    name: str
    value: float | str
    unit: str
    formula: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``moe-ep plan``."""
    parser.add_argument("--ranks", type=int, required=True, metavar="R", help="ranks of the expert-parallel group")
    parser.add_argument("--experts", type=int, required=True, metavar="E", help="experts in all")
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="experts chosen per token")
    parser.add_argument("--hidden", type=int, required=True, metavar="H", help="hidden size")
    parser.add_argument("--tokens", type=int, required=True, metavar="T", help="tokens per rank")
    parser.add_argument("--intermediate", type=int, metavar="I", help="inner size of an expert, for its activations")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the rows (default: bfloat16)")
    parser.add_argument("--routing", choices=("uniform", "zipf"), default="uniform", help="how tokens choose experts")
    parser.add_argument("--layout", choices=("expanded", "compact"), default="expanded", help="of the dispatched rows")
    parser.add_argument("--alignment", type=int, default=1, metavar="A", help="rows that groups are padded to")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    if args.tokens < 0:
        raise ValueError(f"tokens={args.tokens} must not be negative")
    if args.ranks < 1:
        raise ValueError(f"ranks={args.ranks} must be 1 or more")
    if args.intermediate is not None and args.intermediate < 1:
        raise ValueError(f"intermediate={args.intermediate} must be 1 or more")
    spec = ExchangeSpec(
        num_experts=args.experts,
        hidden_size=args.hidden,
        top_k=args.top_k,
        num_ranks=args.ranks,
        dtype=DTYPES[args.dtype],
        layout=args.layout,
        alignment=args.alignment,
        weights="experts",
    )
    spec.check()
    lines = plan_lines(spec, args.tokens, args.routing, args.intermediate)
    if args.json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
        return 0
    title = (
        f"R={args.ranks} E={args.experts} K={args.top_k} H={args.hidden} T={args.tokens} {args.dtype}, "
        f"{args.routing} routing, {args.layout} rows, per rank"
    )
    print_table(
        title, ("figure", "value", "formula"), [[line.name, format_value(line), line.formula] for line in lines]
    )
    return 0


def expect_traffic(spec: ExchangeSpec, routing: str) -> Traffic:
    """Expected visits and choices: by formula for even routing, else by counting a drawn sample."""
    ranks, experts, top_k = spec.num_ranks, spec.num_experts, spec.top_k
    if routing == "uniform":
        mean = expected_ranks_per_token(ranks, experts, top_k)
        return Traffic(ranks_per_token=mean, busiest_visits=mean, busiest_choices=top_k, busiest_expert=1.0)
    topk_idx, _ = make_routing(SAMPLE_TOKENS, top_k, experts, kind=routing, seed=0)
    by_expert = torch.bincount(topk_idx.flatten(), minlength=experts).double() / SAMPLE_TOKENS
    visits = torch.zeros(SAMPLE_TOKENS, ranks, dtype=torch.float64)
    visits.scatter_(1, topk_idx // spec.num_local_experts, 1.0)
    by_rank = visits.mean(0)
    return Traffic(
        ranks_per_token=float(by_rank.sum()),
        busiest_visits=float(by_rank.max()) * ranks,
        busiest_choices=float(by_expert.view(ranks, -1).sum(1).max()) * ranks,
        busiest_expert=float(by_expert.max()) * experts / top_k,
    )


def plan_lines(spec: ExchangeSpec, tokens: int, routing: str, intermediate: int | None) -> list[Line]:
    """Every figure of the plan, in the order in which one needs them.

    Args:
        spec: sizes and choices.
        tokens: T, tokens per rank.
        routing: kind of routing, see ``moe_ep.testing.make_routing``.
        intermediate: inner size of an expert, or None to leave its activations out.
    """
    traffic = expect_traffic(spec, routing)
    return [
        *_row_lines(spec, tokens, traffic, routing),
        *_wire_lines(spec, tokens, traffic),
        *_memory_lines(spec, tokens, traffic, intermediate),
        *_arena_lines(spec, tokens),
    ]


def _row_lines(spec: ExchangeSpec, tokens: int, traffic: Traffic, routing: str) -> list[Line]:
    source = (
        "R (1 - C(E-e, K) / C(E, K)), e = E/R" if routing == "uniform" else f"counted over {SAMPLE_TOKENS} drawn tokens"
    )
    expanded = _expanded_rows(spec, tokens, traffic)
    return [
        Line(name="ranks per token, expected", value=traffic.ranks_per_token, unit="", formula=source),
        Line(
            name="wire mode",
            value="one row per choice" if spec.per_choice else "one row per (token, rank)",
            unit="",
            formula="per choice when layout is expanded and ranks per token > 0.75 K",
        ),
        Line(
            name="compact rows, busiest rank",
            value=tokens * traffic.busiest_visits,
            unit="rows",
            formula="T x ranks per token x imbalance of visits",
        ),
        Line(
            name="expanded rows, busiest rank",
            value=expanded,
            unit="rows",
            formula="T K x imbalance of choices + e (A-1)/2 padding",
        ),
        Line(
            name="rows of the busiest expert",
            value=tokens * spec.num_ranks * spec.top_k / spec.num_experts * traffic.busiest_expert,
            unit="rows",
            formula="R T K / E x imbalance of experts",
        ),
        Line(
            name="imbalance of ranks",
            value=traffic.busiest_choices / spec.top_k,
            unit="x",
            formula="choices of the busiest rank / mean",
        ),
    ]


def _expanded_rows(spec: ExchangeSpec, tokens: int, traffic: Traffic) -> float:
    return tokens * traffic.busiest_choices + spec.num_local_experts * (spec.alignment - 1) / 2


def _wire_rows(spec: ExchangeSpec, tokens: int, traffic: Traffic) -> float:
    """Rows a rank sends in one exchange, its own included."""
    return tokens * (spec.top_k if spec.per_choice else traffic.ranks_per_token)


def _wire_lines(spec: ExchangeSpec, tokens: int, traffic: Traffic) -> list[Line]:
    row_bytes = spec.hidden_size * spec.dtype.itemsize
    logical = _wire_rows(spec, tokens, traffic) * row_bytes
    busiest = (
        traffic.busiest_choices / spec.top_k if spec.per_choice else traffic.busiest_visits / traffic.ranks_per_token
    )
    remote = (spec.num_ranks - 1) / spec.num_ranks
    return [
        Line(
            name="logical bytes of one exchange",
            value=logical,
            unit="bytes",
            formula="wire rows x H x bytes per element",
        ),
        Line(name="wire bytes out", value=logical * remote, unit="bytes", formula="logical bytes x (R-1)/R"),
        Line(
            name="wire bytes in, busiest rank",
            value=logical * remote * busiest,
            unit="bytes",
            formula="wire bytes out x imbalance of the rows' receivers",
        ),
        Line(
            name="wire bytes of a training step",
            value=4 * logical * remote,
            unit="bytes",
            formula="dispatch and combine, forward and backward: 4 exchanges",
        ),
    ]


def _memory_lines(spec: ExchangeSpec, tokens: int, traffic: Traffic, intermediate: int | None) -> list[Line]:
    """Rows that an exchange gives, and what a layer keeps of them for its backward."""
    element = spec.dtype.itemsize
    row_bytes = spec.hidden_size * element
    copies = _expanded_rows(spec, tokens, traffic)
    rows = tokens * traffic.busiest_visits if spec.layout == "compact" else copies

    def line(name: str, value: float, formula: str) -> Line:
        return Line(name=name, value=value, unit="bytes", formula=formula)

    saved = [line("saved: input of the first GEMM", copies * row_bytes, "expanded rows x H x bytes per element")]
    if intermediate is not None:
        inner = copies * 3 * intermediate * element
        saved.append(line("saved: inside the experts", inner, "expanded rows x 3 I x bytes (gate, up, their product)"))
    total = sum(float(part.value) for part in saved)
    lines = [
        line("dispatched rows", rows * row_bytes, "rows of the layout x H x bytes per element"),
        *saved,
        line("saved per layer, weights=experts", total, "sum of the above"),
    ]
    if spec.layout == "expanded":
        formula = "the same + expanded rows x H x bytes per element (combine keeps its input)"
        lines.append(line("saved per layer, weights=combine", total + copies * row_bytes, formula))
    return lines


def _arena_lines(spec: ExchangeSpec, tokens: int) -> list[Line]:
    """Memory of exchanges, shared by all layers of a group; ``Buffer.memory_report`` gives the same worst case."""
    record = record_bytes(spec.hidden_size * spec.dtype.itemsize)
    return [
        Line(
            name="arena, worst case in one round",
            value=2 * spec.num_ranks * tokens * record,
            unit="bytes",
            formula="2 (send, receive) x R T x (row and metadata, rounded up to 128 bytes)",
        ),
        Line(
            name="arena, least grant that works",
            value=spec.num_ranks * 64 * record,
            unit="bytes",
            formula="R x 64 rows x (row and metadata); exchanges then run in rounds",
        ),
    ]


def format_value(line: Line) -> str:
    """A figure for reading: thousands separated, bytes in binary units."""
    if isinstance(line.value, str):
        return line.value
    if line.unit == "rows":
        return f"{line.value:,.0f} rows"
    if line.unit == "bytes":
        return format_bytes(line.value)
    return f"{line.value:.3f} {line.unit}".rstrip()


def format_bytes(count: float) -> str:
    """``count`` bytes with three significant digits, in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
