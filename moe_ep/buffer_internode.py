"""The names under which frameworks that tell nodes apart call the exchanges of ``Buffer``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ep.buffer_calls import BufferCalls, DispatchResult
from moe_ep.buffer_checks import Rows
from moe_ep.handle import BufferHandle


class InternodeCalls(BufferCalls):
    """Methods of ``Buffer`` for ranks on several nodes."""

    def internode_dispatch(
        self,
        x: Rows,
        handle: BufferHandle | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> DispatchResult:
        """:meth:`dispatch`, with its arguments, results and errors.

        Rows go to every rank the same way, whatever its node, so both names do the same, also where all ranks are on
        one node.
        """
        return self.dispatch(x, handle, *args, **kwargs)

    def internode_combine(
        self,
        x: Tensor,
        handle: BufferHandle,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor | None, Any]:
        """:meth:`combine`, with its arguments, results and errors; see :meth:`internode_dispatch`."""
        return self.combine(x, handle, *args, **kwargs)
