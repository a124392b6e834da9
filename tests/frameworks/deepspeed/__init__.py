"""Tests with DeepSpeed itself, on CPUs."""

import os

# Read once, when deepspeed is first imported; worker processes inherit it.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
