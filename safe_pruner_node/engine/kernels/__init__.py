"""Triton kernels; everything that imports Triton is in here."""
