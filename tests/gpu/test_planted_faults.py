"""Mistakes in the kernels are caught by the checks that correct ones pass.

They exist in test builds alone: ``CXXFLAGS=-DMOE_EP_PLANTED_FAULTS NVCC_APPEND_FLAGS=-DMOE_EP_PLANTED_FAULTS python
setup.py build_ext --inplace``.
"""

from __future__ import annotations

import pytest
import torch

from moe_ep.backends.cuda import load_extension
from moe_ep.errors import MoeEpError, NotBuiltError
from moe_ep.testing import run_ranks
from tests.gpu.stress import stress

# Rings as small as they may be: only later laps wait for room.
SMALL_GRANT = 64 * 32768
FAULTS = {"early flag": 1, "wrong slot": 2, "skipped row": 3, "skipped consumed check": 4, "early exit": 5}


def has_faults() -> bool:
    try:
        return hasattr(load_extension().Channel, "plant_fault")
    except (NotBuiltError, AttributeError):
        return False


pytestmark = [
    pytest.mark.multi_gpu(2),
    pytest.mark.skipif(not has_faults(), reason="this build of moe_ep._C has no planted faults"),
]


CAUGHT = (AssertionError, MoeEpError)
# Places that nobody wrote, or that arrive after their flag, may be no places at all: rows that are put there, or read
# from there by a combine, end in an error of the GPU.
CAUGHT_OF = dict.fromkeys(("early exit", "early flag"), (*CAUGHT, torch.AcceleratorError))


@pytest.mark.parametrize("fault", FAULTS)
def test_is_caught(fault: str) -> None:
    granted_bytes = SMALL_GRANT if fault == "skipped consumed check" else 0
    with pytest.raises(CAUGHT_OF.get(fault, CAUGHT)):
        run_ranks(2, stress, 3, 1500, granted_bytes, False, FAULTS[fault], fresh=True)


@pytest.mark.parametrize("fault", ["early flag", "wrong slot", "skipped row", "early exit"])
def test_is_caught_where_rows_stay_in_the_arena(fault: str) -> None:
    arguments = (3, 1500, 0, False, FAULTS[fault], True, True, 1.0)
    with pytest.raises(CAUGHT_OF.get(fault, CAUGHT)):
        run_ranks(2, stress, *arguments, fresh=True)


def test_without_one_nothing_is_wrong() -> None:
    assert run_ranks(2, stress, 3, 300, SMALL_GRANT, False, 0) == [300, 300]
