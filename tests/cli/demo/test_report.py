import contextlib
import io
from dataclasses import replace

import pytest
import torch

from moe_ep.cli.demo import plots
from moe_ep.cli.demo.options import DemoOptions, UsageError
from moe_ep.cli.demo.processes import Failure
from moe_ep.cli.demo.progress import ConsoleReporter, StepReport
from moe_ep.cli.demo.report import check_passed, imbalance, load_variation
from moe_ep.cli.demo.tracing import Span, exchange_share
from moe_ep.cli.demo.train import History
from moe_ep.errors import PeerTimeoutError
from tests.cli.demo.common import MODEL

REPORT = StepReport(step=3, steps=40, loss=2.5, tokens_per_second=1234.0, imbalance=1.25, exchange_share=0.125)


def test_plain_lines_come_at_intervals_and_at_the_end():
    out = io.StringIO()
    reporter = ConsoleReporter(every=20, out=out)
    for step in range(1, 31):
        reporter.step(replace(REPORT, step=step, steps=30, heldout=1.5 if step == 5 else None))
    reporter.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["5/30", "20/30", "30/30"]
    for part in ("loss 2.5000", "1,234 tokens/s", "imbalance 1.25", "dispatch+combine 12%", "held-out 1.5000"):
        assert part in lines[0]


def test_a_terminal_gets_a_bar_that_ends(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stdout(out):
        reporter = ConsoleReporter(every=20, out=out)
        reporter.step(REPORT)
        reporter.say("[bold] is not markup")
        reporter.step(replace(REPORT, step=40))
        reporter.close()
    assert "loss 2.5000" in out.getvalue()
    assert "[bold] is not markup" in out.getvalue()


def test_imbalance_is_one_when_even():
    assert imbalance(torch.tensor([[5, 5], [5, 5]])) == 1
    assert imbalance(torch.tensor([[6, 2], [8, 0]])) == 1.75


def test_load_variation_is_of_the_sum_of_the_last_steps():
    # Loads 6 and 2 deviate by 2 from their mean 4, loads 8 and 0 by 4: 0.5 and 1 of it.
    uneven = torch.tensor([[6, 2], [8, 0]], dtype=torch.int32)
    assert load_variation(History(load=[uneven])) == 0.75
    assert load_variation(History(load=[uneven, uneven.flip(1)])) == 0
    # Only the last 50 steps count.
    assert load_variation(History(load=[uneven, *[torch.full((2, 2), 3, dtype=torch.int32)] * 50])) == 0
    assert load_variation(History(load=[torch.full((2, 2), 3, dtype=torch.int32), *[uneven] * 50])) == 0.75


def test_exchange_share_is_the_time_of_the_exchanges_over_that_of_the_step():
    def span(lane, start, end):
        return Span(lane=lane, name="any", backward=False, start=start, end=end)

    spans = [span("compute", 0.0, 3.0), span("exchange", 0.5, 1.0), span("exchange", 2.0, 2.25)]
    assert exchange_share(spans, 3.0) == 0.25
    assert exchange_share(spans[:1], 3.0) == 0


@pytest.mark.parametrize(
    ("device", "dtype", "steps", "difference", "verdict"),
    [
        ("cpu", "float32", 30, 9e-5, True),
        ("cpu", "float32", 30, 1e-4, False),
        ("cpu", "float32", 31, 1.0, None),
        ("cpu", "bfloat16", 30, 1.0, None),
        ("cuda", "float32", 10, 1e-4, False),
        ("cuda", "float32", 30, 0.09, True),
        ("cuda", "float32", 30, 0.1, False),
        ("cuda", "float64", 30, 1e-4, False),
        ("cuda", "bfloat16", 10, 0.09, True),
        ("cuda", "bfloat16", 30, 0.1, False),
        ("cuda", "bfloat16", 31, 1.0, None),
    ],
)
def test_verdict_of_the_check(device, dtype, steps, difference, verdict):
    options = DemoOptions(model=replace(MODEL, dtype=dtype), check=steps, device=device)
    assert check_passed(options, difference) is verdict


def test_plots_of_the_smallest_history(tmp_path):
    history = History(loss=[2.0], load=[torch.tensor([[1, 0], [0, 0]], dtype=torch.int32)])
    plots.plot_loss(tmp_path / "a.png", history, {"unigram_entropy": 3.0, "heldout_loss": 2.0})
    plots.plot_expert_load(tmp_path / "b.png", history)
    span = Span(lane="compute", name="attention", backward=True, start=0.0, end=0.1)
    plots.plot_timeline(tmp_path / "c.png", [[span], []], step=1, device="cpu")
    for name in ("a.png", "b.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_cause_comes_before_its_consequences():
    consequences = [PeerTimeoutError("rank 1 is missing"), RuntimeError("Connection closed by peer")]
    assert Failure.of(UsageError("bad")).severity < min(Failure.of(error).severity for error in consequences)
    assert "Traceback" not in Failure.of(UsageError("bad")).text
    with pytest.raises(KeyError) as caught:
        {}["surprise"]
    assert "Traceback" in Failure.of(caught.value).text
