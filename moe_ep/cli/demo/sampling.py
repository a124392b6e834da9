"""Text from a trained model, byte by byte, in one process."""

import torch

from moe_ep.cli.demo import sharding
from moe_ep.cli.demo.checkpoint import Checkpoint
from moe_ep.cli.demo.model import LanguageModel
from moe_ep.cli.demo.options import ModelOptions


def load_unsharded(checkpoint: Checkpoint, device: torch.device) -> LanguageModel:
    """The checkpoint's model with every expert in this process, in evaluation mode."""
    # One process exchanges nothing, so the backend that works on every device will do.
    options = ModelOptions(**checkpoint.options["model"])
    model = LanguageModel(options, None, seed=0, device=device, backend="torch")
    sharding.load_model(model, checkpoint.section("model"), None)
    return model.eval()


@torch.inference_mode()
def generate(
    model: LanguageModel, prompt: bytes, *, num_bytes: int, temperature: float, top_k: int = 0, seed: int = 0
) -> bytes:
    """Continue ``prompt``.

    Args:
        model: unsharded and in evaluation mode. It reads the last ``model.options.seq`` bytes.
        prompt: not empty.
        num_bytes: how many bytes to add.
        temperature: 0 takes the most likely byte each time; 1 samples from the model's own distribution.
        top_k: sample among the ``top_k`` most likely bytes only; 0 for all.
        seed: of the sampling.

    Returns:
        The added bytes.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    for _ in range(num_bytes):
        context = torch.tensor(list(text[-model.options.seq :]), device=device)
        logits = model(context[None])[0, -1].double().cpu()
        text.append(_choose(logits, temperature=temperature, top_k=top_k, generator=generator))
    return bytes(text[len(prompt) :])


def sample(checkpoint: Checkpoint, *, prompt: str, num_bytes: int, temperature: float, seed: int) -> str:
    """``prompt`` and what the checkpoint's model adds to it, as printable text."""
    start = prompt_bytes(prompt)
    model = load_unsharded(checkpoint, torch.device("cpu"))
    return printable(start + generate(model, start, num_bytes=num_bytes, temperature=temperature, seed=seed))


def prompt_bytes(prompt: str) -> bytes:
    """A prompt of the command line as the bytes that were typed, also those that are no UTF-8; never empty."""
    return prompt.encode(errors="surrogateescape") or b"\n"


def printable(text: bytes) -> str:
    """``text`` as UTF-8; what is not, and what could steer a terminal, becomes U+FFFD."""
    decoded = text.decode(errors="replace")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in decoded)


def _choose(logits: torch.Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    # Relative to the likeliest, so that no temperature, however low, makes infinities to subtract.
    logits = (logits - logits.max()) / temperature
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
