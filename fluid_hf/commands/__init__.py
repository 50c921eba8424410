"""Subcommands of `fluid-hf`, one module each: `add_parser(subparsers)`, and `run(options)` with the exit status."""
