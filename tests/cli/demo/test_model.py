from dataclasses import replace

import torch

from moe_ep.cli.demo.model import LanguageModel
from moe_ep.cli.demo.sampling import generate, printable, prompt_bytes
from tests.cli.demo.common import CPU, MODEL


def test_later_bytes_do_not_reach_earlier_logits():
    model = LanguageModel(MODEL, None, seed=1, device=CPU).eval()
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8:] += 1
    with torch.no_grad():
        before, after = model(tokens), model(changed % 256)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_position_matters():
    model = LanguageModel(MODEL, None, seed=1, device=CPU).eval()
    with torch.no_grad():
        one, other = model(torch.tensor([[5, 6, 7]])), model(torch.tensor([[6, 5, 7]]))
    assert not torch.allclose(one[0, 2], other[0, 2])


def test_bfloat16_keeps_parameters_in_float32():
    model = LanguageModel(replace(MODEL, dtype="bfloat16"), None, seed=1, device=CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_sampling_is_deterministic_and_reads_no_more_than_the_context():
    model = LanguageModel(MODEL, None, seed=1, device=CPU).eval()
    prompt = bytes(range(60))
    greedy = generate(model, prompt, num_bytes=6, temperature=0)
    assert len(greedy) == 6
    assert greedy == generate(model, prompt[-MODEL.seq :], num_bytes=6, temperature=0)
    assert greedy == generate(model, prompt, num_bytes=6, temperature=1.0, top_k=1, seed=5)
    warm = [generate(model, prompt, num_bytes=6, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    # The logits over it are beyond what fp64 holds.
    assert greedy == generate(model, prompt, num_bytes=6, temperature=1e-320)


def test_a_prompt_is_the_bytes_that_were_typed():
    # What Python makes of a command line's bytes that are no UTF-8.
    typed = b"d\xff\xc3\xa9".decode(errors="surrogateescape")
    assert prompt_bytes(typed) == b"d\xff\xc3\xa9"
    assert prompt_bytes("") == b"\n"


def test_samples_cannot_steer_the_terminal():
    assert printable(b"a\x1b[2J\r\xff\n\tb") == "a\ufffd[2J\ufffd\ufffd\n\tb"
