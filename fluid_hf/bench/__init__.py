"""Benchmarks of one layer beside its peers, and the single-GPU link they run on."""
