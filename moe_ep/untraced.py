"""Where ``torch.compile`` stops: functions that exchange, and so must run as they are written, with all they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(fn: Function) -> Function:
    """Make ``fn`` and whatever it calls run outside of ``torch.compile``: a graph break where a trace reaches it.

    Also where no trace does: the Python code of an operator, a hook or a backward runs by itself, and the compiler
    looks at each function of it while a compiled model is running.
    """
    # NOTE: torch.compiler.disable would load the compiler, and set its environment variables, at import; its lazy twin
    # torch._disable_dynamo would do so at the first call, and costs each call more.
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(fn.__code__, eval_frame._FrameExecStrategy(skip, skip))
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    fn._torchdynamo_disable_msg = "moe_ep exchanges here"  # type: ignore[attr-defined]
    return fn
