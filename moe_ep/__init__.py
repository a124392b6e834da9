"""Expert parallelism for PyTorch: MoE layers whose experts live on many ranks."""

from moe_ep.buffer import Buffer
from moe_ep.config import Capacity, Config
from moe_ep.dispatcher import Dispatched, TokenDispatcher
from moe_ep.events import EventHandle, EventOverlap
from moe_ep.handle import DispatchHandle
from moe_ep.hooks import PhaseEvent

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "Capacity",
    "Config",
    "DispatchHandle",
    "Dispatched",
    "EventHandle",
    "EventOverlap",
    "PhaseEvent",
    "TokenDispatcher",
]
