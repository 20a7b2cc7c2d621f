"""The Triton kernels behind `Ops`."""
