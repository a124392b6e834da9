"""Training: one global batch per step shared out over the ranks, one all-reduce, AdamW on what this rank holds."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_ep.cli.demo import sharding
from moe_ep.cli.demo.checkpoint import Checkpoint
from moe_ep.cli.demo.corpus import Corpus, draw_batch
from moe_ep.cli.demo.model import LanguageModel
from moe_ep.cli.demo.options import DemoOptions, TrainOptions, to_dict
from moe_ep.cli.demo.tracing import Span, StepTracer
from moe_ep.layers import set_loss_scale

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.1
_FINAL_LR_SHARE = 0.1


@dataclass
class History:
    """What was measured in each step since the training began.

    Attributes:
        loss: mean training loss of each step, nats per byte.
        load: int32 [L, E] per step: choices of each expert of each layer, over all ranks.
        heldout: (step, held-out loss) pairs.
    """

    loss: list[float] = field(default_factory=list)
    load: list[torch.Tensor] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)

    def to_tensors(self, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """As float64 [n], int32 [n, L, E] and float64 [m, 2]; ``shape`` is (L, E)."""
        return {
            "loss": torch.tensor(self.loss, dtype=torch.float64),
            "load": torch.stack(self.load) if self.load else torch.zeros((0, *shape), dtype=torch.int32),
            "heldout": torch.tensor(self.heldout, dtype=torch.float64).reshape(-1, 2),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, torch.Tensor]) -> "History":
        """The inverse of ``to_tensors``."""
        return History(
            loss=tensors["loss"].tolist(),
            load=list(tensors["load"]),
            heldout=[(int(step), loss) for step, loss in tensors["heldout"].tolist()],
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One training step, the same on every rank except ``spans``.

    Attributes:
        loss: mean over the global batch, nats per byte.
        load: int32 [L, E], choices per expert over all ranks.
        seconds: duration of the step on this rank.
        spans: what this rank did when; empty unless the step was traced.
        stop: some rank was asked to stop.
    """

    loss: float
    load: torch.Tensor
    seconds: float
    spans: list[Span]
    stop: bool


class Trainer:
    """Model, optimizer and data order of one rank.

    Args:
        options: the run.
        corpus: the text.
        group: the ranks that share the experts; None trains the whole model in this process.
        device: where this rank computes.
        stop: asked once per step; when it says True on any rank, all ranks see it in the same step's result.
    """

    def __init__(
        self,
        options: DemoOptions,
        corpus: Corpus,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.options = options
        self.corpus = corpus
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group) if group is not None else 0
        self.num_ranks = dist.get_world_size(group) if group is not None else 1
        self.model = LanguageModel(
            options.model, group, seed=options.train.seed, device=device, backend=options.backend
        )
        # The layers' auxiliary losses reckon with gradients averaged over the ranks; here they are summed.
        set_loss_scale(self.model, 1 / self.num_ranks)
        self.optimizer = _make_optimizer(self.model)
        self.generator = torch.Generator().manual_seed(options.train.seed)
        self.history = History()
        self.step = 0
        self.tracer = StepTracer(self.model, device)
        self._stop = stop

    def train_step(self) -> StepResult:
        """Do one step; collective. All ranks draw the same global batch and each takes its share of the sequences."""
        start = time.perf_counter()
        train, seq = self.options.train, self.options.model.seq
        inputs, targets = draw_batch(self.corpus.train, batch=train.batch, seq=seq, generator=self.generator)
        mine = self._share(train.batch)
        self.tracer.begin_step()
        for layer in self.model.moe_layers():
            layer.reset_stats()
        loss = self._loss_sum(inputs[mine], targets[mine]) / targets.numel()
        loss.backward()
        with self.tracer.span("gradient sum"):
            loss_value, load, stop, norm = self._sum_gradients(loss.detach())
        with self.tracer.span("optimizer"):
            self._update(norm)
        spans = self.tracer.end_step()
        self.step += 1
        self.history.loss.append(loss_value)
        self.history.load.append(load)
        seconds = time.perf_counter() - start
        return StepResult(loss=loss_value, load=load, seconds=seconds, spans=spans, stop=stop)

    @torch.no_grad()
    def evaluate(self, windows: torch.Tensor) -> float:
        """Mean loss over ``windows`` (int64 [n, seq + 1]), nats per byte. Collective; the data order is untouched."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for chunk in windows.split(self.options.train.batch):
            mine = chunk[self._share(len(chunk))]
            total += self._loss_sum(mine[:, :-1], mine[:, 1:]).double()
        self.model.train()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return float(total) / (windows.shape[0] * (windows.shape[1] - 1))

    def checkpoint(self) -> Checkpoint:
        """The whole run as one unsharded checkpoint. Collective; every rank gets the same."""
        shape = (self.options.model.layers, self.options.model.experts)
        sections = {
            "model": sharding.gather_model(self.model, self.group),
            "optimizer": sharding.gather_optimizer(self.model, self.optimizer, self.group),
            "rng": {"batches": self.generator.get_state(), **self._torch_states()},
            "history": self.history.to_tensors(shape),
        }
        return Checkpoint(
            step=self.step,
            tensors={f"{name}.{key}": tensor for name, part in sections.items() for key, tensor in part.items()},
            options=to_dict(self.options),
            fingerprint=self.corpus.fingerprint,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``, also when another number of ranks wrote it."""
        sharding.load_model(self.model, checkpoint.section("model"), self.group)
        sharding.load_optimizer(self.model, self.optimizer, checkpoint, self.group)
        states = checkpoint.section("rng")
        self.generator.set_state(states["batches"])
        if f"torch{self.rank}" in states:
            torch.set_rng_state(states[f"torch{self.rank}"])
        self.history = History.from_tensors(checkpoint.section("history"))
        self.step = checkpoint.step

    def _share(self, count: int) -> slice:
        """This rank's part of ``count`` sequences: parts differ by one at most, and may be empty."""
        return slice(self.rank * count // self.num_ranks, (self.rank + 1) * count // self.num_ranks)

    def _loss_sum(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(inputs.to(self.device))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(self.device), reduction="sum")

    def _sum_gradients(self, loss: torch.Tensor) -> tuple[float, torch.Tensor, bool, torch.Tensor]:
        """Sum what the ranks have each a part of, in one all-reduce; returns (loss, load, stop, gradient norm).

        Each rank's loss is its tokens' share of the global mean, so the dense gradients of all ranks add up to the
        gradient of that mean. Expert gradients are whole already: the reversed dispatch brought every rank's part.
        """
        dense = [_gradient(p) for p in self.model.dense_parameters()]
        experts = [_gradient(p) for p in self.model.expert_parameters()]
        dtype = torch.float64 if self.options.model.dtype == "float64" else torch.float32
        load = torch.stack([layer.tokens_per_expert for layer in self.model.moe_layers()])
        pieces = [
            *(gradient.flatten() for gradient in dense),
            load.flatten(),
            _norm_squared(experts, dtype).reshape(1),
            loss.reshape(1),
            torch.tensor([float(self._stop())], device=self.device),
        ]
        flat = torch.cat([piece.to(dtype) for piece in pieces])
        if self.group is not None:
            dist.all_reduce(flat, group=self.group)
        *summed, load_sum, expert_norm, loss_sum, stop = flat.split([piece.numel() for piece in pieces])
        for gradient, total in zip(dense, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
        norm = (_norm_squared(dense, dtype) + expert_norm[0]).sqrt()
        return loss_sum.item(), load_sum.view_as(load).to("cpu", torch.int32), bool(stop.item()), norm

    def _update(self, norm: torch.Tensor) -> None:
        scale = (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.model.parameters():
            _gradient(parameter).mul_(scale.to(parameter.dtype))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options.train)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def _torch_states(self) -> dict[str, torch.Tensor]:
        own = torch.get_rng_state()
        if self.group is None:
            return {"torch0": own}
        states: list[torch.Tensor] = [own] * self.num_ranks
        dist.all_gather_object(states, own, group=self.group)
        return {f"torch{rank}": state for rank, state in enumerate(states)}


def learning_rate(step: int, train: TrainOptions) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak, then constant."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = min(1.0, (step - train.warmup) / max(1, train.decay_steps - train.warmup))
    return train.lr * (_FINAL_LR_SHARE + (1 - _FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


def _make_optimizer(model: LanguageModel) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    # A parameter that this rank's tokens did not reach still takes part in the sum over ranks.
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _norm_squared(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([tensor.to(dtype).square().sum() for tensor in tensors]).sum()
