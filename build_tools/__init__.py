"""What building the package needs: the PEP 517 hooks, the CUDA toolkit, NVSHMEM, and an incremental compiler driver."""
