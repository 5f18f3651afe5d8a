"""Entries on disk: what identifies one in every process, its files, and the way from a call to them."""

from __future__ import annotations

from compile_policy.saving.shelf import Place as Place
from compile_policy.saving.shelf import Shelf as Shelf
from compile_policy.saving.stable import ignore_attributes as ignore_attributes
