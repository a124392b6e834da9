"""Tests with torchtitan itself, on CPUs."""

from tests.frameworks.torchtitan import cpu

cpu.install()
