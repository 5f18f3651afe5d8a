"""Leaf operators with a forward per platform, and the rule that says which of them are on.

The rule and the switch of its default with the compile mode are vLLM's (``CompilationConfig.custom_ops``).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from compile_policy.errors import ConfigError
from compile_policy.layers import registry
from compile_policy.layers.pluggable import Layer

_GPU_FORWARD = "forward_hip" if torch.version.hip else "forward_cuda"
_FORWARD_ON = {"cuda": _GPU_FORWARD, "xpu": "forward_xpu", "cpu": "forward_cpu", "meta": "forward_native"}
_compiled_natives: WeakKeyDictionary[type, dict[str, Callable[..., Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class CustomOps:
    """Which operators run their platform's forward; the others run ``forward_native``.

    Attributes:
        base: ``all`` or ``none``.
        on: names switched on.
        off: names switched off.
        native_backend: what compiles a native forward by itself (``compile_native``); empty: nothing.
    """

    base: Literal["all", "none"] = "all"
    on: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()
    native_backend: str = ""

    @classmethod
    def of(cls, custom_ops: Sequence[str], *, mode: int, backend: str) -> CustomOps:
        """Read ``["all" | "none", "+name", "-name", ...]``.

        Without ``all`` or ``none`` it is ``none`` where Inductor compiles (``mode`` above 0), as it fuses the native
        forms itself, and ``all`` everywhere else.

        Raises:
            ConfigError: both bases or one twice, both signs for one name, no sign, or a name that is no custom
            operator.
        """
        bases = [entry for entry in custom_ops if entry in ("all", "none")]
        if len(bases) > 1:
            raise ConfigError(f"custom_ops has {' and '.join(bases)}.", remedy="Keep one.")
        signed = [entry for entry in custom_ops if entry not in bases]
        unsigned = [entry for entry in signed if entry[:1] not in ("+", "-") or len(entry) < 2]
        if unsigned:
            raise ConfigError(f"custom_ops has {unsigned[0]!r}.", remedy="Write all, none, +name or -name.")
        on = frozenset(entry[1:] for entry in signed if entry[0] == "+")
        off = frozenset(entry[1:] for entry in signed if entry[0] == "-")
        if on & off:
            raise ConfigError(f"custom_ops switches {', '.join(sorted(on & off))} both on and off.", remedy="Keep one.")
        _refuse_unknown(on | off)
        inductor = backend == "inductor" and mode > 0
        default: Literal["all", "none"] = "none" if inductor else "all"
        base: Literal["all", "none"] = default if not bases else ("all" if bases[0] == "all" else "none")
        return cls(base, on, off, native_backend=backend if mode > 0 and backend != "eager" else "")

    def enabled(self, name: str) -> bool:
        return (self.base == "all" or name in self.on) and name not in self.off

    def unused(self, used: Collection[str]) -> tuple[str, ...]:
        """Signed entries whose operator is not among the ``used`` ones: they had no effect."""
        entries = [f"+{name}" for name in self.on] + [f"-{name}" for name in self.off]
        return tuple(sorted(entry for entry in entries if entry[1:] not in used))


def _refuse_unknown(names: frozenset[str]) -> None:
    kinds = {record.name: record.kind for record in registry.layers()}
    for name in sorted(names):
        if kinds.get(name) == "pluggable":
            raise ConfigError(
                f"custom_ops names {name!r}, a PluggableLayer, which is not switched on or off.",
                remedy="Replace it with register_oot, or leave it out.",
            )
        if name not in kinds:
            known = sorted(n for n, kind in kinds.items() if kind == "custom_op")
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise ConfigError(f"custom_ops names {name!r}, which is no operator.", remedy=f"Known: {', '.join(near)}.")


_EAGER = CustomOps()
_active: ContextVar[CustomOps] = ContextVar("custom_ops", default=_EAGER)


@contextmanager
def use_custom_ops(ops: CustomOps) -> Iterator[None]:
    """Operators that are built inside the block follow ``ops``."""
    token = _active.set(ops)
    try:
        yield
    finally:
        _active.reset(token)


class CustomOp(Layer):
    """Base of leaf operators that have a forward per platform.

    Define ``forward_native``, and ``forward_cuda``, ``_hip``, ``_xpu``, ``_cpu`` or ``_oot`` (any other device) where
    there is something better. Whether the operator is on is decided once, when it is built; which platform's forward
    then runs follows the device of its first tensor, as a model may be moved after it was built.

    Args:
        enforce_enable: on, whatever ``custom_ops`` says.
        compile_native: compile ``forward_native`` by itself while the operator is off, for operators that an outer
            compile cannot see. Does nothing where nothing is compiled, and inside a compiled region.
    """

    layer_kind = "custom_op"

    def __init__(self, *, enforce_enable: bool = False, compile_native: bool = False) -> None:
        super().__init__()
        ops = _active.get()
        self.custom_op_enabled = enforce_enable or self.enabled()
        self.native_backend = ops.native_backend if compile_native and not self.custom_op_enabled else ""

    @classmethod
    def enabled(cls) -> bool:
        """Whether an operator that is built now is on; one without a name follows ``all`` or ``none``."""
        return _active.get().enabled(registry.name_of(cls) or "")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.custom_op_enabled:
            return getattr(self, self.platform_forward(*args, **kwargs))(*args, **kwargs)
        if self.native_backend and not torch.compiler.is_compiling():
            return _compiled_native(type(self), self.native_backend)(self, *args, **kwargs)
        return self.forward_native(*args, **kwargs)

    def platform_forward(self, *args: Any, **kwargs: Any) -> str:
        """Name of the method that runs for these arguments while the operator is on."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                return _FORWARD_ON.get(value.device.type, "forward_oot")
        return "forward_native"

    def forward_native(self, *args: Any, **kwargs: Any) -> Any:
        """The operator in plain torch: the reference for all others, and what a compiler sees while the operator is
        off."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward_native.")

    def forward_cuda(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(*args, **kwargs)

    def forward_hip(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_cuda(*args, **kwargs)

    def forward_xpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(*args, **kwargs)

    def forward_cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(*args, **kwargs)

    def forward_oot(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(*args, **kwargs)


def _compiled_native(cls: type[CustomOp], backend: str) -> Callable[..., Any]:
    # Of the class, not of the instance: an instance that holds a compiled method of itself is wrong once deep-copied.
    compiled = _compiled_natives.setdefault(cls, {})
    if backend not in compiled:
        compiled[backend] = torch.compile(cls.forward_native, dynamic=True, backend=backend)
    return compiled[backend]
