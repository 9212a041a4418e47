"""Holds kernels for accelerators, each of which has a plain twin that it is tested against."""
