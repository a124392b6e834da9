"""``python -m tests.frameworks.deepspeed.without_shm SCRIPT``: run a script, and let DeepSpeed compile nothing.

On CPUs DeepSpeed builds an all-reduce for inference when it starts: over a minute on two cores, behind a lock file that
a killed run leaves for all later ones to wait at. Training does not call it.
"""

import runpy
import sys

import deepspeed.ops

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
