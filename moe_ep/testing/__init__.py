"""What tests and benchmarks share: process pools, routings, a gradient check over ranks, a brute-force oracle."""

from moe_ep.testing.gradcheck import distributed_gradcheck
from moe_ep.testing.pool import close_pools, run_ranks
from moe_ep.testing.routing import make_routing, uneven_tokens
from moe_ep.testing.worker import RankContext, RemoteError

__all__ = [
    "RankContext",
    "RemoteError",
    "close_pools",
    "distributed_gradcheck",
    "make_routing",
    "run_ranks",
    "uneven_tokens",
]
