"""Entries on disk: what identifies one in every process, its files, and the way from a call to them."""

from __future__ import annotations

from compile_policy.saving.between import Found as Found
from compile_policy.saving.between import entry_between_ranks as entry_between_ranks
from compile_policy.saving.shelf import Place as Place
from compile_policy.saving.shelf import Shelf as Shelf
from compile_policy.saving.stable import ignore_attributes as ignore_attributes
