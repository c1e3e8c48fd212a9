"""Multiplication by MARLIN weights on NVIDIA GPUs, and the plain torch that it is compared with."""
