"""Faults planted into the exchange, which the tests must notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

from moe_ep import TokenDispatcher

_DISPATCH, _COMBINE = TokenDispatcher.dispatch, TokenDispatcher.combine


def _swap_weights(self: TokenDispatcher, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *rest: Any) -> Any:
    return _DISPATCH(self, x, topk_idx, topk_weights.flip(1).contiguous(), *rest)


def _drop_choice(self: TokenDispatcher, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *rest: Any) -> Any:
    topk_idx = topk_idx.clone()
    topk_idx[:1, 0] = -1
    return _DISPATCH(self, x, topk_idx, topk_weights, *rest)


def _detach_weights(self: TokenDispatcher, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *rest: Any) -> Any:
    return _DISPATCH(self, x, topk_idx, topk_weights.detach(), *rest)


def _swap_rows(self: TokenDispatcher, y: Tensor, *rest: Any) -> Any:
    return _COMBINE(self, y.flip(0).contiguous(), *rest)


FAULTS = {
    "weights swapped": ("dispatch", _swap_weights),
    "a choice dropped": ("dispatch", _drop_choice),
    "weights without gradient": ("dispatch", _detach_weights),
    "rows in another order": ("combine", _swap_rows),
}


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Run with the fault ``name``; None for none."""
    if name is None:
        yield
        return
    method, faulty = FAULTS[name]
    with mock.patch.object(TokenDispatcher, method, faulty):
        yield
