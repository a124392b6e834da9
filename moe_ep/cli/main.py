"""``moe-ep``: finds the sub-command, imports only that one, and turns errors into one line and an exit code."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import moe_ep
from moe_ep.errors import MoeEpError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command: where its code is, without importing it.

    Attributes:
        name: what is typed after ``moe-ep``.
        summary: one line for ``moe-ep --help``.
        module: module that holds the two functions below.
        arguments: name of the function ``(parser) -> None`` that adds the options.
        run: name of the function ``(args) -> int`` that does the work and returns the exit code.
    """

    name: str
    summary: str
    module: str
    arguments: str = "add_arguments"
    run: str = "run"


COMMANDS = (
    Command(
        name="demo",
        summary="train a small MoE language model over local processes",
        module="moe_ep.cli.demo",
    ),
    Command(
        name="generate",
        summary="continue a text with a model the demo trained",
        module="moe_ep.cli.demo",
        arguments="add_generate_arguments",
        run="run_generate",
    ),
    Command(
        name="bench",
        summary="time dispatch, combine and the MoE layer",
        module="moe_ep.cli.bench",
    ),
    Command(
        name="doctor",
        summary="what is installed, what is missing, how to mend it",
        module="moe_ep.cli.doctor",
    ),
    Command(
        name="plan",
        summary="rows, wire bytes and memory of a deployment",
        module="moe_ep.cli.plan",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments without the program name; None takes those of the process.

    Returns:
        The exit code: that of the sub-command, 2 for a wrong argument or an error of moe_ep, 130 after Ctrl-C.

    Raises:
        SystemExit: from argparse, for ``--help``, ``--version`` and arguments it cannot parse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = build_parser(argv)
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return EXIT_USAGE
        return int(args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # NOTE: the reader of our output went away (`| head`); the interpreter must not flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "moe_ep":
            raise
        return _fail(f"{error}: it comes with pip install 'moe_ep[demo]'")
    except (MoeEpError, ValueError) as error:
        return _fail(str(error) or type(error).__name__)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser: it lists every sub-command, and imports only the one that ``argv`` names."""
    parser = argparse.ArgumentParser(prog="moe-ep", description=moe_ep.__doc__)
    parser.add_argument("--version", action="version", version=f"moe-ep {moe_ep.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    # The options of the main parser take no values, so the first bare word is the sub-command.
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        if command.name == chosen:
            module = importlib.import_module(command.module)
            getattr(module, command.arguments)(subparser)
            subparser.set_defaults(run=getattr(module, command.run))
    return parser


def _fail(text: str) -> int:
    print(f"moe-ep: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_USAGE
