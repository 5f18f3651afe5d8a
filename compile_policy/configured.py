"""From the configuration to the options of a region."""

from __future__ import annotations

from compile_policy.config import CompilationConfig
from compile_policy.options import RegionOptions


def region_options(config: CompilationConfig) -> RegionOptions:
    """Options of every region under ``config``; its dump writes to ``debug_dump_path``."""
    if config.debug_dump_path is None:
        return RegionOptions.from_config(config)
    from compile_policy.graphs.dump import GraphDump  # depyf and its kin are loaded for those who dump

    return RegionOptions.from_config(config, GraphDump(config.debug_dump_path))
