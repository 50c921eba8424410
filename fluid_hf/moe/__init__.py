"""Mixture of experts: routing plan, permutation, grouped GEMM, the expert-parallel layer."""
