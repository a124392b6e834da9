"""The options of ``moe-ep demo``: the command line, its defaults, what a checkpoint remembers, and what is refused."""

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

CHECK_LIMIT = 1e-4
# On GPUs sums have other orders in the two runs, and 30 steps make of rounding what fp32 and fp64 differ by: 0.02 nats.
GPU_CHECK_LIMIT = 0.1
GPU_CHECK_STEPS = 10
CHECK_STEPS = 30
CHECKPOINT_NAME = "checkpoint.safetensors"
DEFAULT_STEPS = 300
Backend = Literal["auto", "torch", "cuda"]
DTYPES = ("float32", "bfloat16", "float64")


class UsageError(ValueError):
    """What the user can mend: a wrong option, an unreadable text, a bad checkpoint. Exit code 2, no traceback."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Shape of the model; every field is fixed by a checkpoint.

    Attributes:
        layers: number of transformer blocks.
        hidden: size of the residual stream, H.
        heads: attention heads; the head size ``hidden / heads`` is even because of rotary embeddings.
        experts: routed experts per layer, E.
        top_k: experts chosen per token, K.
        expert_hidden: inner size of one routed expert and of the shared expert.
        seq: longest context, in bytes.
        dtype: "float32", "float64", or "bfloat16" (fp32 parameters under autocast).
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    expert_hidden: int = 128
    seq: int = 128
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How the model is trained; remembered by a checkpoint, and each may be changed when it is resumed.

    Attributes:
        batch: sequences per step over all ranks: the same whatever the number of ranks.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        decay_steps: step at which the cosine has brought the learning rate to a tenth of its peak.
        seed: seeds parameters and the order of the text.
        text: absolute paths of the text, or empty for the standard library of the running Python.
        max_bytes: longest text used, in bytes.
    """

    batch: int = 16
    lr: float = 3e-3
    warmup: int = 20
    decay_steps: int = DEFAULT_STEPS
    seed: int = 0
    text: tuple[str, ...] = ()
    max_bytes: int = 8_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """One run.

    Attributes:
        model: shape of the model.
        train: how it is trained.
        steps: the run ends after this step, counted from the start of the training and not from ``resume``.
        ranks: processes that the experts are spread over.
        device: "cpu" or "cuda".
        backend: "auto", "torch" or "cuda".
        out: folder of plots, metrics and checkpoint.
        resume: checkpoint to continue from, or None.
        check: steps repeated unsharded in one process, 0 for none.
        json: file for the summary, or None.
        save_every, eval_every, log_every: intervals in steps.
        prompt, sample_bytes, temperature: of the sample at the end.
        quiet: print errors only.
    """

    model: ModelOptions = ModelOptions()
    train: TrainOptions = TrainOptions()
    steps: int = DEFAULT_STEPS
    ranks: int = 2
    device: str = "cpu"
    backend: Backend = "auto"
    out: Path = Path("moe-ep-demo")
    resume: Path | None = None
    check: int = 0
    json: Path | None = None
    save_every: int = 100
    eval_every: int = 50
    log_every: int = 20
    prompt: str = "def "
    sample_bytes: int = 300
    temperature: float = 0.8
    quiet: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``moe-ep demo``. None stands for "not given": the checkpoint's value, else the default."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--steps", type=_positive, help=f"train up to this step (default {DEFAULT_STEPS}, resumed: as before)"
    )
    run.add_argument("--ranks", type=_positive, help="processes that share the experts (default 2, or one per GPU)")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPUs if there are any")
    run.add_argument("--backend", choices=get_args(Backend), default="auto", help="backend of the exchanges")
    run.add_argument("--out", type=Path, default=DemoOptions.out, metavar="FOLDER", help="default %(default)s")
    run.add_argument(
        "--resume", nargs="?", const=True, metavar="FILE", help="continue from a checkpoint (default: the one in --out)"
    )
    run.add_argument(
        "--check", nargs="?", const=CHECK_STEPS, default=0, type=_positive, metavar="N",
        help=f"repeat the first N steps unsharded in one process and compare the losses (default {CHECK_STEPS})",
    )  # fmt: skip
    run.add_argument("--json", type=Path, metavar="FILE", help="write the summary of the run to this file")
    run.add_argument("--save-every", type=_positive, default=DemoOptions.save_every, metavar="STEPS")
    run.add_argument("--eval-every", type=_positive, default=DemoOptions.eval_every, metavar="STEPS")
    run.add_argument("--log-every", type=_positive, default=DemoOptions.log_every, metavar="STEPS")
    run.add_argument("--quiet", action="store_true", help="print errors only")
    _add_sample_arguments(run)
    text = parser.add_argument_group("text and training")
    text.add_argument("--text", nargs="+", metavar="PATH", help="files or folders (default: Python's standard library)")
    text.add_argument("--max-bytes", type=_positive, help=f"longest text used (default {TrainOptions.max_bytes})")
    text.add_argument("--batch", type=_positive, help=f"sequences per step, all ranks (default {TrainOptions.batch})")
    text.add_argument("--lr", type=_positive_float, help=f"peak learning rate (default {TrainOptions.lr})")
    text.add_argument("--warmup", type=int, help=f"steps of warm-up (default {TrainOptions.warmup})")
    text.add_argument(
        "--decay-steps", type=_positive, help=f"length of the cosine (default --steps, >= {DEFAULT_STEPS})"
    )
    text.add_argument("--seed", type=int, help="default 0")
    model = parser.add_argument_group("model")
    for field in dataclasses.fields(ModelOptions):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "dtype":
            model.add_argument(flag, choices=DTYPES, help=f"default {field.default}")
        else:
            model.add_argument(flag, type=_positive, help=f"default {field.default}")


def _add_sample_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", default=DemoOptions.prompt, help="what the sample at the end continues")
    group.add_argument("--sample-bytes", type=int, default=DemoOptions.sample_bytes, help="default %(default)s")
    group.add_argument("--temperature", type=float, default=DemoOptions.temperature, help="default %(default)s")


def resolve(
    args: argparse.Namespace, *, remembered: Mapping[str, Any] | None, num_gpus: int, world_size: int | None
) -> DemoOptions:
    """Turn parsed arguments into checked options.

    Args:
        args: from a parser filled by ``add_arguments``.
        remembered: ``to_dict`` of the run that wrote the checkpoint being resumed, or None.
        num_gpus: CUDA devices of this machine.
        world_size: ranks that torchrun started, or None.

    Raises:
        UsageError: for values that do not fit together, or that differ from the checkpoint's shape.
    """
    remembered = remembered or {}
    model = _merge(ModelOptions, args, remembered.get("model", {}), fixed=True)
    given_text = None if args.text is None else tuple(str(Path(path).absolute()) for path in args.text)
    train = _merge(TrainOptions, args, remembered.get("train", {}), fixed=False, text=given_text)
    steps = args.steps or remembered.get("steps") or DEFAULT_STEPS
    if args.decay_steps is None and "train" not in remembered:
        # At least the default: short runs that are continued later then share one schedule with an uninterrupted run.
        train = dataclasses.replace(train, decay_steps=max(steps, DEFAULT_STEPS))
    device = args.device if args.device != "auto" else ("cuda" if num_gpus else "cpu")
    ranks = _ranks(args.ranks, device=device, num_gpus=num_gpus, world_size=world_size, experts=model.experts)
    same = {name: getattr(args, name) for name in ("backend", "out", "check", "json", "save_every", "eval_every",
            "log_every", "prompt", "sample_bytes", "temperature", "quiet")}  # fmt: skip
    options = DemoOptions(
        model=model, train=train, steps=steps, ranks=ranks, device=device, resume=resume_path(args), **same
    )
    validate(options)
    return options


def resume_path(args: argparse.Namespace) -> Path | None:
    """Path of the checkpoint to continue from: the one named, or the one in ``--out``; None without ``--resume``."""
    if args.resume is None:
        return None
    return args.out / CHECKPOINT_NAME if args.resume is True else Path(args.resume)


def validate(options: DemoOptions) -> None:
    """Check what argparse cannot: values that have to fit together.

    Raises:
        UsageError: naming the option, its value, the rule and the remedy.
    """
    model = options.model
    if model.hidden % model.heads or (model.hidden // model.heads) % 2:
        raise UsageError(
            f"--hidden {model.hidden} with --heads {model.heads}: hidden must be a multiple of 2 x heads; "
            f"take --hidden {2 * model.heads * max(1, model.hidden // (2 * model.heads))}"
        )
    if model.top_k > model.experts:
        raise UsageError(f"--top-k {model.top_k}: a token cannot choose more than --experts {model.experts}; lower it")
    if model.experts % options.ranks:
        fitting = [n for n in range(1, model.experts + 1) if model.experts % n == 0]
        raise UsageError(f"--ranks {options.ranks} does not divide --experts {model.experts}; ranks may be {fitting}")
    check_temperature(options.temperature)
    if options.sample_bytes < 0:
        raise UsageError(f"--sample-bytes {options.sample_bytes} is negative; give 0 or more")
    if not 0 <= options.train.seed < 2**31:
        raise UsageError(f"--seed {options.train.seed} is outside 0 .. 2**31 - 1; take another")
    if options.train.warmup < 0:
        raise UsageError(f"--warmup {options.train.warmup} is negative; 0 means none")


def check_temperature(temperature: float) -> None:
    """Raise UsageError unless a byte can be drawn at this temperature; also refuses nan."""
    if not 0 <= temperature < math.inf:
        raise UsageError(
            f"--temperature {temperature} must be a finite number of 0 or more; 0 takes the likeliest byte each time"
        )


def to_dict(options: DemoOptions) -> dict[str, Any]:
    """What a checkpoint remembers of the options, as plain JSON values."""
    return {
        "model": dataclasses.asdict(options.model),
        "train": dataclasses.asdict(options.train),
        "steps": options.steps,
        "ranks": options.ranks,
    }


def torchrun_world_size() -> int | None:
    """Ranks that torchrun (or a launcher that sets the same variables) started, or None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return None


def _merge(kind: type, args: argparse.Namespace, remembered: Mapping[str, Any], *, fixed: bool, **given: Any) -> Any:  # noqa: ANN401
    values = {}
    for field in dataclasses.fields(kind):
        value = given[field.name] if field.name in given else getattr(args, field.name)
        kept = remembered.get(field.name)
        if fixed and value is not None and kept is not None and value != kept:
            flag = "--" + field.name.replace("_", "-")
            raise UsageError(
                f"{flag} {value} differs from the checkpoint's {kept}; leave {flag} out, or start anew without --resume"
            )
        value = kept if value is None else value
        if value is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _ranks(given: int | None, *, device: str, num_gpus: int, world_size: int | None, experts: int) -> int:
    if device == "cuda" and not num_gpus:
        raise UsageError("--device cuda: torch sees no GPU on this machine; take --device cpu")
    if world_size is not None:
        if given not in (None, world_size):
            raise UsageError(f"--ranks {given}: torchrun started {world_size} ranks; leave --ranks out")
        return world_size
    if given is None:
        limit = num_gpus if device == "cuda" else 2
        return max(n for n in range(1, min(limit, experts) + 1) if experts % n == 0)
    if device == "cuda" and given > num_gpus:
        raise UsageError(f"--ranks {given}: one GPU per rank, and there are {num_gpus}; lower it or take --device cpu")
    return given


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more; give one")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0; give one, such as 0.003")
    return value
