"""Runs `fluid-hf doctor` in a rank that believes to be on the node of its launcher. Started by test_nodes.py."""

import os
import socket
import sys

socket.gethostname = lambda: f"node{os.environ['GROUP_RANK']}"

from fluid_hf import cli  # noqa: E402

sys.exit(cli.main(["doctor", "--skip", "packages", "--timeout", "60", "--json", "doctor.json"]))
