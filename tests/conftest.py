"""What holds for every test: no network, and no configuration from the machine that runs the tests."""

from __future__ import annotations

import os

# Before Transformers is imported: a hub id in a test must fail at once instead of waiting for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in [name for name in os.environ if name.startswith("COMPILE_POLICY_")]:
    del os.environ[name]
