"""Config, Capacity and the settings of an exchange: every rule, with its text."""

import pytest
import torch

from moe_ep import Capacity, Config
from moe_ep.config import ExchangeSpec, expected_ranks_per_token, wire_per_choice


def test_config_keeps_what_it_is_given() -> None:
    config = Config(16, 7, 300, 8, 128)
    assert (config.num_sms, config.num_max_nvl_chunked_send_tokens) == (16, 7)
    assert config.num_max_nvl_chunked_recv_tokens == 300
    assert (config.num_max_rdma_chunked_send_tokens, config.num_max_rdma_chunked_recv_tokens) == (8, 128)
    default = Config()
    assert default.num_sms is None
    assert (default.num_max_nvl_chunked_send_tokens, default.num_max_nvl_chunked_recv_tokens) == (6, 256)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_sms": 3}, "num_sms=3"),
        ({"num_sms": 0}, "num_sms=0"),
        ({"num_sms": -2}, "num_sms=-2"),
        ({"num_max_nvl_chunked_send_tokens": 256}, "num_max_nvl_chunked_send_tokens=256.*smaller"),
        ({"num_max_rdma_chunked_send_tokens": 129}, "num_max_rdma_chunked_send_tokens=129.*half"),
        ({"num_max_nvl_chunked_send_tokens": 0}, "num_max_nvl_chunked_send_tokens=0"),
    ],
)
def test_config_rules(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Config(**arguments)


def test_config_accepts_the_edges_of_its_rules() -> None:
    Config(num_sms=2, num_max_nvl_chunked_send_tokens=255, num_max_rdma_chunked_send_tokens=128)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16])
def test_size_hints_are_multiples_of_128_and_grow(num_ranks: int) -> None:
    small, large = Config(num_sms=8), Config(num_sms=24)
    for hidden_bytes in (16, 4096, 14336):
        for config in (small, large, Config()):
            assert config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) % 128 == 0
            assert config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) % 128 == 0
        least = 256 * 4 * hidden_bytes * num_ranks
        assert small.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) >= least
        assert large.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) >= 3 * least


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "exactly one"),
        ({"rows": 8, "factor": 1.0}, "exactly one"),
        ({"rows": 0}, "rows=0"),
        ({"per_expert": -1}, "per_expert=-1"),
        ({"factor": 0.0}, r"factor=0\.0"),
        ({"rows": 2.5}, r"rows=2\.5"),
    ],
)
def test_capacity_rules(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Capacity(**arguments)


def make_spec(**changes: object) -> ExchangeSpec:
    base = {"num_experts": 8, "hidden_size": 8, "top_k": 2, "num_ranks": 2, "dtype": torch.float32}
    return ExchangeSpec(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_experts": 9}, "num_experts=9.*divisible by the 2 ranks.*use 8 or 10"),
        ({"num_experts": 8192}, "num_experts=8192.*4096"),
        ({"top_k": 9}, "top_k=9.*num_experts=8"),
        ({"num_experts": 128, "top_k": 65}, "top_k=65.*64"),
        ({"top_k": 0}, "top_k=0"),
        ({"hidden_size": 6}, "hidden_size=6.*16 bytes.*multiple of 4"),
        ({"hidden_size": 12, "dtype": torch.bfloat16}, "hidden_size=12.*multiple of 8"),
        ({"dtype": torch.int32}, r"dtype=torch\.int32.*bfloat16"),
        ({"layout": "dense"}, "layout='dense'.*'slab'"),
        ({"weights": "router"}, "weights='router'.*'experts'"),
        ({"on_overflow": "ignore"}, "on_overflow='ignore'.*'drop'"),
        ({"layout": "compact"}, 'weights="combine".*weights="experts"'),
        ({"layout": "compact", "weights": "experts", "alignment": 8}, "alignment=8"),
        ({"alignment": 0}, "alignment=0"),
        ({"layout": "slab"}, "max_tokens_per_rank"),
        ({"layout": "slab", "max_tokens_per_rank": 8, "capacity": Capacity(rows=8)}, "capacity must be None"),
        ({"capacity": 8}, "capacity=8.*Capacity"),
        ({"capacity": Capacity(per_expert=6), "alignment": 4}, "per_expert=6.*alignment=4"),
        ({"capacity": Capacity(rows=12), "alignment": 4}, "rows=12.*at least 13"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank=0"),
        ({"wire_dtype": torch.int8}, r"wire_dtype=torch\.int8"),
        ({"wire_dtype": torch.float8_e4m3fn}, "hidden_size=8.*multiple of 128"),
        ({"combine_dtype": torch.bfloat16}, r"combine_dtype=torch\.bfloat16.*float32"),
        ({"combine_dtype": torch.float32, "dtype": torch.float64, "hidden_size": 8}, r"dtype=torch\.float64"),
        (
            {"combine_dtype": torch.float32, "layout": "compact", "weights": "experts"},
            'combine_dtype.*layout="compact"',
        ),
    ],
)
def test_exchange_rules_name_value_rule_and_remedy(changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_spec(**changes).check()


def test_exchange_accepts_the_edges_of_its_rules() -> None:
    make_spec(num_experts=4096, top_k=64).check()
    make_spec(num_experts=2, top_k=2, hidden_size=4).check()
    make_spec(capacity=Capacity(rows=13), alignment=4).check()


def test_digest_tells_settings_apart() -> None:
    base = make_spec()
    assert base.digest() == make_spec().digest()
    others = [{"num_experts": 6}, {"hidden_size": 16}, {"dtype": torch.float64}, {"capacity": Capacity(rows=9)}]
    others += [{"capacity": Capacity(rows=10)}, {"weights": "experts"}, {"alignment": 2}, {"on_overflow": "drop"}]
    assert len({base.digest(), *(make_spec(**other).digest() for other in others)}) == len(others) + 1


def test_expected_ranks_per_token() -> None:
    # Two experts per rank on two ranks, K = 2: both on one rank with probability 1/3.
    assert expected_ranks_per_token(2, 4, 2) == pytest.approx(2 - 1 / 3)
    assert expected_ranks_per_token(4, 4, 1) == pytest.approx(1)
    assert wire_per_choice(4, 64, 1)
    assert not wire_per_choice(2, 64, 8)
