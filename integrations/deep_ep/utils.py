"""``deep_ep.utils``: events."""

from moe_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
