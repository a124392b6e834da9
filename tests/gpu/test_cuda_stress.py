"""A short run of the stress program, on GPUs of their own and on shared ones."""

from __future__ import annotations

import pytest

from moe_ep.testing import run_ranks
from tests.gpu.stress import stress

SMALL_GRANT = 64 * 32768


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("granted_bytes", [0, SMALL_GRANT], ids=["one-lap", "laps"])
def test_two_gpus(granted_bytes: int) -> None:
    assert run_ranks(2, stress, 1, 600, granted_bytes, True, 0) == [600, 600]


@pytest.mark.multi_gpu(2)
def test_two_gpus_whose_rows_stay_in_the_arena() -> None:
    assert run_ranks(2, stress, 4, 900, 0, True, 0, True, True, 1.0) == [900, 900]


@pytest.mark.gpu
def test_shared_gpus() -> None:
    assert run_ranks(4, stress, 2, 120, 0, False, 0) == [120] * 4
