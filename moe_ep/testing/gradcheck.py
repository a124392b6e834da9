"""Finite differences over a function that is spread over ranks."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Tensors = torch.Tensor | Sequence[torch.Tensor]


def distributed_gradcheck(
    fn: Callable[..., Tensors],
    inputs: Sequence[torch.Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-6,
    atol: float = 1e-7,
    rtol: float = 1e-5,
    max_elements: int | None = None,
    seed: int = 0,
) -> bool:
    """Compare the gradients of ``fn`` with central differences, over all ranks of ``group``.

    The function checked is L = the sum over ranks of <v_r, out_r>, with a random v_r per rank. One rank perturbs one
    element at a time while the others repeat their calls in step, so that ranks may differ in sizes, have nothing to
    perturb, or have no tokens at all. Collective: every rank calls it with the same keyword arguments.

    Args:
        fn: called with ``inputs``; deterministic; may exchange data with the other ranks; returns floating tensors.
        inputs: fp64 tensors; those that require grad are checked. Not changed in the end.
        group: ranks that take part; None = this process alone.
        eps: half-width of the difference; its error is about eps^2 L''' / 6 + 1e-16 |L| / eps.
        atol: allowed absolute error.
        rtol: allowed error relative to the difference quotient.
        max_elements: check at most this many elements per rank, drawn at random; None = all.
        seed: of the cotangents and of that draw.

    Returns:
        True.

    Raises:
        AssertionError: on every rank, when a gradient of any rank is wrong; names rank, input, element and both values.
        ValueError: an input that requires grad is not fp64.
    """
    for position, tensor in enumerate(inputs):
        if tensor.requires_grad and tensor.dtype != torch.float64:
            raise ValueError(f"inputs[{position}] is {tensor.dtype}: differences need torch.float64; convert it")
    rank = 0 if group is None else dist.get_rank(group)
    generator = torch.Generator().manual_seed(seed * 7919 + rank)
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    cotangents = _backward(fn, leaves, generator)
    elements = [(i, j) for i, leaf in enumerate(leaves) if leaf.requires_grad for j in range(leaf.numel())]
    if max_elements is not None and len(elements) > max_elements:
        kept = torch.randperm(len(elements), generator=generator)[:max_elements].tolist()
        elements = [elements[k] for k in kept]

    faults = []
    for turn, count in enumerate(_gather(len(elements), group)):
        for step in range(count):
            mine = elements[step] if turn == rank else None
            quotient = _difference(fn, leaves, cotangents, mine, eps, group)
            if mine is not None:
                faults += _compare(rank, leaves, mine, quotient, atol, rtol)
    everyone = [fault for of_rank in _gather(faults, group) for fault in of_rank]
    if everyone:
        raise AssertionError(f"{len(everyone)} gradients are wrong:\n" + "\n".join(everyone[:10]))
    return True


def _backward(fn: Callable[..., Tensors], leaves: list[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    outputs = _as_list(fn(*leaves))
    cotangents = [torch.rand(out.shape, generator=generator, dtype=torch.float64) + 0.5 for out in outputs]
    roots = [(out, v.to(out.dtype)) for out, v in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if roots:
        torch.autograd.backward([out for out, _ in roots], [v for _, v in roots])
    return cotangents


def _difference(
    fn: Callable[..., Tensors],
    leaves: list[torch.Tensor],
    cotangents: list[torch.Tensor],
    element: tuple[int, int] | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> float:
    values = []
    for sign in (1.0, -1.0):
        inputs = [leaf.detach().clone() for leaf in leaves]
        if element is not None:
            inputs[element[0]].view(-1)[element[1]] += sign * eps
        with torch.no_grad():
            outputs = _as_list(fn(*inputs))
        dots = [(out.double() * v).sum() for out, v in zip(outputs, cotangents, strict=True)]
        values.append(torch.stack(dots).sum() if dots else torch.zeros((), dtype=torch.float64))
    # Ranks are summed as differences: the common part would only cost digits.
    change = values[0] - values[1]
    if group is not None:
        dist.all_reduce(change, group=group)
    return float(change) / (2 * eps)


def _compare(
    rank: int, leaves: list[torch.Tensor], element: tuple[int, int], quotient: float, atol: float, rtol: float
) -> list[str]:
    position, index = element
    grad = leaves[position].grad
    gradient = 0.0 if grad is None else float(grad.reshape(-1)[index])
    if abs(gradient - quotient) <= atol + rtol * abs(quotient):
        return []
    return [f"rank {rank}, input {position}, element {index}: gradient {gradient:.9g}, difference {quotient:.9g}"]


def _gather(value: object, group: dist.ProcessGroup | None) -> list:
    if group is None:
        return [value]
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _as_list(outputs: Tensors) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
