"""Overlap: weight gradients inside communication windows, and how many waves to use."""
