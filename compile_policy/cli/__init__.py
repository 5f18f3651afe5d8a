"""The command line; the only room that reads ``sys.argv`` and the environment."""

from __future__ import annotations

from compile_policy.cli.app import main as main
