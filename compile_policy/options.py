"""What a region does with its captures: how they are lowered, how many there may be, what a fault means."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from compile_policy.artifacts import LOCK_SECONDS, Store
from compile_policy.compat_compiler import COMPILER_SECONDS
from compile_policy.config import CompilationConfig
from compile_policy.entry import Entry
from compile_policy.lowering import Lowering, lower_with
from compile_policy.sentinel import Sentinel


class Dump(Protocol):
    """Writes entries for people."""

    def recording(self) -> AbstractContextManager[None]: ...

    def __call__(self, region: Any, entry: Entry) -> None: ...  # the region's room is below this one


@dataclass(frozen=True)
class RegionOptions:
    """What the configuration says about a region; ``load_only`` takes entries from the store and compiles none.

    ``unsupported`` is a reason to compile nothing, such as a version that failed its self-test.
    """

    backend: str = "inductor"
    max_entries: int = 8
    on_budget: str = "warn"
    on_fault: str = "eager"
    autotune: bool = False
    blocks_only: bool = False
    dump: Dump | None = None
    sentinel: Sentinel | None = None
    check_every_call: bool = False
    store: Store | None = None
    load_only: bool = False
    unsupported: str = ""
    cache_wait: float = LOCK_SECONDS
    compiler_timeout: float = COMPILER_SECONDS

    @classmethod
    def from_config(
        cls, config: CompilationConfig, dump: Dump | None = None, store: Store | None = None
    ) -> RegionOptions:
        return cls(
            backend=config.backend,
            max_entries=config.max_entries,
            on_budget=config.on_budget,
            on_fault=config.on_fault,
            autotune=config.mode == 3,
            blocks_only=config.mode == 1,
            dump=dump,
            sentinel=Sentinel(config.verify_calls) if config.verify_calls else None,
            check_every_call=config.check_structure == "call",
            store=store,
            cache_wait=config.cache_wait,
            compiler_timeout=config.compiler_timeout,
        )

    def recording(self) -> AbstractContextManager[None]:
        """Round a compile: what a dump has to watch while it happens."""
        return nullcontext() if self.dump is None else self.dump.recording()

    def lowered(self) -> dict[str, Any]:
        """What decides how a capture is lowered: a part of what an artifact is found by."""
        return {"backend": self.backend, "autotune": self.autotune, "blocks_only": self.blocks_only}

    def lowering(self) -> Lowering:
        return lower_with(self.backend, autotune=self.autotune, blocks_only=self.blocks_only)
