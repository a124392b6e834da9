import math

import pytest
import torch

from moe_ep.cli.demo.corpus import draw_batch, heldout_windows, load_corpus
from moe_ep.cli.demo.options import UsageError


def test_standard_library_is_the_default_in_a_fixed_order():
    one, two = (load_corpus((), max_bytes=200_000, seq=32) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert len(one.train) + len(one.heldout) == 200_000
    assert len(one.heldout) == 20_000
    assert b"def " in bytes(one.train.tolist())
    assert 2 < one.unigram_entropy() < 4


def test_cap_changes_how_much_is_read_but_not_the_order():
    short, long = (load_corpus((), max_bytes=size, seq=32) for size in (50_000, 100_000))
    assert torch.equal(short.train, long.train[: len(short.train)])


def test_entropy_of_two_equally_likely_bytes(tmp_path):
    (tmp_path / "text").write_bytes(b"ab" * 500)
    assert load_corpus([str(tmp_path)], max_bytes=1000, seq=8).unigram_entropy() == pytest.approx(math.log(2))


def test_folder_skips_binaries_and_reads_every_text(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_bytes(b"a" * 300)
    (tmp_path / "inner" / "b.md").write_bytes(b"b" * 300)
    (tmp_path / "picture").write_bytes(b"\0\1\2" * 300)
    corpus = load_corpus([str(tmp_path)], max_bytes=10_000, seq=8)
    assert corpus.num_files == 2
    assert set(torch.cat([corpus.train, corpus.heldout]).tolist()) == {ord("a"), ord("b")}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"\0" * 900, "not a text"), (b"short", "has 5 bytes")]
)
def test_unusable_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_corpus([str(path)], max_bytes=1000, seq=8)


def test_folder_without_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no text file"):
        load_corpus([str(tmp_path)], max_bytes=1000, seq=8)


def test_targets_are_the_next_bytes():
    data = torch.arange(200, dtype=torch.uint8)
    inputs, targets = draw_batch(data, batch=4, seq=10, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (4, 10)
    assert torch.equal(inputs + 1, targets)


def test_heldout_windows_do_not_overlap_and_reach_both_ends():
    windows = heldout_windows(torch.arange(100, dtype=torch.uint8), seq=9, limit=50)
    assert windows.flatten().tolist() == list(range(100))
