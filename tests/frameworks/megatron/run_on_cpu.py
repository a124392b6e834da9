"""Runs a script that needs Megatron-Core and GPUs on a CPU: ``python -m ....run_on_cpu SCRIPT ARGUMENTS``."""

import runpy
import sys

from tests.frameworks.megatron.shim import cpu_megatron

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with cpu_megatron():
        runpy.run_path(sys.argv[0], run_name="__main__")
