"""Megatron-Core itself, on the CPU."""
