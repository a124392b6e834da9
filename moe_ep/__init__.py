"""Expert parallelism for PyTorch: MoE layers whose experts live on many ranks."""

__version__ = "0.1.0"
