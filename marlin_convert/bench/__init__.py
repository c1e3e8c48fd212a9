"""Measuring: the kernels beside cuBLAS and the peers', and the figures of the MARLIN paper's artifact."""
