"""Compiled code kept on disk: found by a key, verified before anything uses it, and never trusted for being there.

The store knows bytes, names and JSON; what they mean is for the caller.
"""

from __future__ import annotations

from compile_policy.artifacts.key import JSON as JSON
from compile_policy.artifacts.key import ArtifactKey as ArtifactKey
from compile_policy.artifacts.locations import open_store as open_store
from compile_policy.artifacts.locations import user_directories as user_directories
from compile_policy.artifacts.manifest import Miss as Miss
from compile_policy.artifacts.reading import Artifact as Artifact
from compile_policy.artifacts.store import LOCK_SECONDS as LOCK_SECONDS
from compile_policy.artifacts.store import Store as Store
