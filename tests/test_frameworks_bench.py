"""The benchmark of the frameworks' steps: its verdicts, its tables, and one run of what needs no framework."""

import json
from pathlib import Path

import pytest

from tests.frameworks import bench


def row(**changes: object) -> dict:
    found = {
        "framework": "megatron",
        "dispatcher": "moe_ep",
        "versions": {"megatron-core": "0.16.1"},
        "tokens": 1024,
        "hidden": 512,
        "top_k": 4,
        "experts": 16,
        "dtype": "float32",
        "time_us_max": 123_456.0,
        "baseline_us": 130_000.0,
        "baseline": "alltoall",
        "ratio_median": 0.95,
        "ratio_low": 0.94,
        "ratio_high": 0.96,
        "target": 1.05,
        "met": True,
        "correct": True,
        "max_difference": 0.0,
    }
    return found | changes


def test_losses_agree_within_rounding_only() -> None:
    assert bench.losses_agree([1.0, 2.0], [1.0, 2.0], "float32") == (0.0, True)
    assert bench.losses_agree([1.0 + 5e-7], [1.0], "float32")[1]
    # One token of 1024 that lost one of its four choices.
    assert not bench.losses_agree([1.0 + 1 / 4096], [1.0], "float32")[1]
    assert bench.losses_agree([1.003], [1.0], "bfloat16")[1]
    assert not bench.losses_agree([1.005], [1.0], "bfloat16")[1]
    assert not bench.losses_agree([float("nan")], [1.0], "bfloat16")[1]


def test_table_tells_what_was_promised_and_what_was_not() -> None:
    text = bench.table(
        {
            "rows": [
                row(),
                row(met=False, ratio_high=1.07),
                row(top_k=2, target=None, met=None),
                row(correct=False, max_difference=0.25),
                row(framework="fsdp", dispatcher="ddp", versions={}, target=None, ratio_median=None),
            ]
        }
    )
    met, missed, without, wrong, alone = text.splitlines()[2:]
    assert met == (
        "| megatron 0.16.1 | moe_ep | 1024 | 512 | 4 | 16 | float32 | 123.5 | 130.0 (alltoall) | 0.950 | "
        "0.940 .. 0.960 | <= 1.05, met |"
    )
    assert missed.endswith("| <= 1.05, MISSED |")
    assert without.endswith("| 0.940 .. 0.960 |  |")
    assert wrong.endswith("| LOSSES DIFFER by 0.25 |")
    assert alone == "| fsdp | ddp | 1024 | 512 | 4 | 16 | float32 | 123.5 |  |  |  |  |"


def test_page_is_made_from_the_newest_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = bench.latest_results()
    page = bench.README.read_text()
    if newest is not None:
        assert bench.section(newest) in page
    copy = tmp_path / "README.md"
    copy.write_text(page)
    monkeypatch.setattr(bench, "README", copy)
    results = tmp_path / "2026-01-02-machine-frameworks.json"
    machine = {"cpu": "a processor", "cores": 2}
    report = {"machine": machine, "versions": {"torch": "2.13.0"}, "date": "2026-01-02", "rows": [row()]}
    results.write_text(json.dumps(report))
    for _ in range(2):
        bench.write_section(results)
        assert bench.section(results) in copy.read_text()
        assert copy.read_text().count("| megatron 0.16.1 |") == 1
    copy.write_text("no marks")
    with pytest.raises(ValueError, match="has 0 places"):
        bench.write_section(results)


@pytest.mark.slow
def test_steps_are_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    arguments = ["--framework", "fsdp", "--shapes", "32:2:4", "--tokens", "16", "--pairs", "2", "--json", str(file)]
    assert bench.main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(r["op"], r["dispatcher"], r["correct"]) for r in rows] == [
        ("fsdp2_step", "fsdp2", True),
        ("ddp_step", "ddp", True),
    ]
    assert all(r["time_us_max"] > 0 and r["ratio_median"] is None for r in rows)
    assert "| fsdp | ddp |" in capsys.readouterr().out


def test_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "missing_packages", lambda folder: ["megatron-core"] if folder == "megatron" else [])
    with pytest.raises(ValueError, match="megatron needs megatron-core: run this as make bench-frameworks"):
        bench.main(["--framework", "megatron"])
