"""Tests of moe_ep.integrations.transformers with the real packages, on CPU processes."""
