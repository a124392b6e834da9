"""``deep_ep.Buffer``: ``moe_ep.Buffer`` whose handles outlive it."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import moe_ep


class Buffer(moe_ep.Buffer):
    """As :class:`moe_ep.Buffer`, but every Buffer of a group takes the handles of all.

    Frameworks keep one Buffer and make a larger one when longer rows come, while handles of the former still wait for
    their backward. Handles are plans, so that nothing is lost with the Buffer that made them.

    Args:
        group: as for ``moe_ep.Buffer``.
        args: likewise.
        kwargs: likewise.

    Example:
        >>> issubclass(Buffer, moe_ep.Buffer)
        True
    """

    _numbers: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, int]] = weakref.WeakKeyDictionary()

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(group, *args, **kwargs)
        if self.group is not None:
            self.number = self._numbers.setdefault(self.group, self.number)
