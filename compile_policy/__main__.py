"""``python -m compile_policy``."""

from __future__ import annotations

import sys

from compile_policy.cli.app import main

sys.exit(main())
