"""Profiles: from a torch.profiler trace to what was hidden and what was exposed, as numbers and as a picture."""
