"""Sequence-parallel attention: each rank holds a piece of the sequence, and of the heads while attention runs."""
