import re

import pytest

from moe_ep.cli.demo.options import TrainOptions, UsageError, resolve
from moe_ep.cli.demo.train import learning_rate
from tests.cli.demo.common import parse


def resolved(*arguments, remembered=None, num_gpus=0, world_size=None):
    return resolve(parse(*arguments), remembered=remembered, num_gpus=num_gpus, world_size=world_size)


def test_defaults():
    options = resolved()
    assert (options.ranks, options.device, options.steps, options.resume) == (2, "cpu", 300, None)
    assert options.train.decay_steps == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 3], "--ranks 3 does not divide --experts 8"),
        (["--top-k", 9], "--top-k 9"),
        (["--hidden", 100, "--heads", 8], "--hidden 100"),
        (["--device", "cuda"], "no GPU"),
        (["--temperature", -1], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--sample-bytes", -1], "--sample-bytes -1"),
        (["--seed", -1], "--seed -1"),
        (["--warmup", -1], "--warmup -1"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        resolved(*arguments)


def test_one_gpu_per_rank():
    assert resolved(num_gpus=3).ranks == 2
    assert resolved(num_gpus=4).device == "cuda"
    with pytest.raises(UsageError, match="there are 4"):
        resolved("--ranks", 8, num_gpus=4)


def test_torchrun_decides_the_ranks():
    assert resolved(world_size=4).ranks == 4
    with pytest.raises(UsageError, match="torchrun started 4"):
        resolved("--ranks", 2, world_size=4)


def test_checkpoint_gives_what_is_not_given():
    remembered = {"model": {"hidden": 64}, "train": {"batch": 3, "decay_steps": 500}, "steps": 400}
    options = resolved("--lr", 0.5, remembered=remembered)
    assert (options.model.hidden, options.train.batch, options.train.lr) == (64, 3, 0.5)
    assert (options.steps, options.train.decay_steps) == (400, 500)
    with pytest.raises(UsageError, match="--hidden 32 differs from the checkpoint's 64"):
        resolved("--hidden", 32, remembered=remembered)


def test_a_checkpoint_gives_its_steps_also_where_they_are_below_the_default():
    remembered = {"model": {}, "train": {}, "steps": 100}
    assert resolved(remembered=remembered).steps == 100
    assert resolved("--steps", 150, remembered=remembered).steps == 150


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--steps", "abc"], "argument --steps: 'abc' is not a whole number of 1 or more"),
        (["--steps", "0"], "argument --steps: '0' is not a whole number of 1 or more"),
        (["--check", "1.5"], "argument --check: '1.5' is not a whole number of 1 or more"),
        (["--lr", "fast"], "argument --lr: 'fast' is not a finite number above 0"),
        (["--lr", "0"], "argument --lr: '0' is not a finite number above 0"),
        (["--lr", "inf"], "argument --lr: 'inf' is not a finite number above 0"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_what_is_wanted(capsys, arguments, rule):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert rule in capsys.readouterr().err.splitlines()[-1]


def test_short_runs_share_one_schedule():
    assert resolved("--steps", 10).train == resolved("--steps", 20).train


def test_learning_rate_warms_up_and_decays():
    train = TrainOptions(lr=1.0, warmup=10, decay_steps=110)
    rates = [learning_rate(step, train) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == pytest.approx([0.1] * 90)
