"""The command line, ``moe-ep`` or ``python -m moe_ep``: a module with ``add_arguments`` and ``run`` per sub-command."""
