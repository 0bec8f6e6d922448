"""The bench that judges every kernel: `python -m hybridlm_kernels.bench --help`."""
