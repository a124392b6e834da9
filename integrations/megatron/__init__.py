"""Megatron-Core with moe_ep as the token dispatcher of its MoE layers.

``patch_model(model)`` changes a model that is built; ``patch_spec(spec)`` changes the spec it is built from.
"""

try:
    from megatron.core import __version__ as _version
except ImportError as error:
    raise ImportError(
        "moe_ep.integrations.megatron needs Megatron-Core: pip install --no-deps megatron-core==0.16.1"
    ) from error

from moe_ep.integrations.megatron.versions import check_version

check_version(_version)

from moe_ep.integrations.megatron.dispatcher import EPTokenDispatcher  # noqa: E402
from moe_ep.integrations.megatron.layer import EPMoELayer, patch_model, patch_spec  # noqa: E402

__all__ = ["EPMoELayer", "EPTokenDispatcher", "patch_model", "patch_spec"]
