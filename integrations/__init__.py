"""Integrations: everything that knows who drives the training loop. Import as `fluid_hf.integrations`."""

if __name__ != "fluid_hf.integrations":
    raise ImportError(f"{__name__!r} is a source folder, not a package: import `fluid_hf.integrations` instead.")
