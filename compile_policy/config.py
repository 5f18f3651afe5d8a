"""The configuration: one frozen object, and where each of its values came from.

Sources, later wins: default, file, environment, flag, argument. Nothing here reads the environment or the command
line; whoever does hands the mapping in (`compile_policy.cli` does).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from compile_policy import settings as sources
from compile_policy.errors import ConfigError
from compile_policy.settings import Flags, Setting

#: Fields that are paths.
_PATHS = ("debug_dump_path", "cache_dir", "cache_key_file")
ArgDims = int | list[int] | dict[int, str]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_arg_dims(value: Any) -> Any:
    """Accept one dim, a list of dims or dims with names; the keys of a JSON mapping arrive as strings."""
    if isinstance(value, dict):
        value = {int(k) if isinstance(k, str) and k.lstrip("-").isdigit() else k: v for k, v in value.items()}
        good = all(_is_int(k) and isinstance(v, str) for k, v in value.items())
    else:
        good = _is_int(value) or (isinstance(value, list) and all(map(_is_int, value)))
    if not good:
        raise ValueError("should be a dim (an integer), a list of dims, or a mapping of dim to name")
    return value


def _as_path(value: Any) -> Any:
    return sources.expand_home(value) if isinstance(value, str) and value else value


def _check_cache_dir(value: Any) -> Any:
    """A folder, or ``False`` or ``None``, which no path stands for."""
    value = _as_path(value)
    if value is None or value is False or isinstance(value, Path):
        return value
    raise ValueError("should be a directory, or false to keep nothing on disk")


def _as_bytes(value: Any) -> Any:
    return sources.bytes_in(value) if isinstance(value, str) else value


_ArgDims = Annotated[ArgDims, BeforeValidator(_check_arg_dims)]
_OptionalPath = Annotated[Path | None, BeforeValidator(_as_path)]


class CompilationConfig(BaseModel):
    """What is compiled, how, and what happens when it does not work. Frozen; see the docstring of each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    enabled: bool = True
    """False: the policy leaves the model alone. ``COMPILE_POLICY_DISABLE=1`` sets this, whatever other sources say."""

    mode: int = Field(default=2, ge=0, le=3)
    """Optimisation level, also spelled ``-O0`` to ``-O3``: 0 eager, 1 repeated blocks alone, 2 whole components whose
    equal blocks are compiled once, 3 each graph in one piece with autotuned kernels.

    At every level but 0 a component is captured as one graph. Level 1 compiles least: what surrounds the blocks runs
    operator by operator. A graph without repeated blocks, or one for Inductor's JIT, is compiled whole there too.
    """

    backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """What lowers a captured graph. The two eager ones run the graph as it was captured, which helps to find faults."""

    compile_mm_encoder: bool = False
    """Compile vision and audio encoders too. Experimental; a model without such an encoder is refused."""

    dynamic_arg_dims: dict[str, dict[str, _ArgDims]] = Field(default_factory=dict)
    """Dynamic dims per class name or component path, then per argument; replaces what annotations say."""

    custom_ops: list[str] = Field(default_factory=list)
    """Which custom operators are on: ``all`` or ``none``, then ``+name`` and ``-name`` as exceptions."""

    splitting_ops: list[str] = Field(default_factory=list)
    """Operators at which a captured graph is cut into pieces. Reserved: no effect yet, and setting it warns."""

    debug_dump_path: _OptionalPath = None
    """Directory for graphs written for people; ``None`` writes none."""

    cache_dir: Annotated[Path | Literal[False] | None, PlainValidator(_check_cache_dir)] = None
    """Directory for compiled code, which the next process loads instead of compiling; ``None`` is the user's own cache
    directory, ``False`` keeps nothing on disk."""

    cache_key_file: _OptionalPath = None
    """Secret for a cache directory that is shared: what is not signed with it isn't loaded. None: the user's own, for a
    private directory."""

    cache_limit: Annotated[int, BeforeValidator(_as_bytes), Field(ge=0)] = 10 << 30
    """Bytes that the cache directory may hold, also written ``500MB`` or ``10GiB``; beyond it the least recently used
    goes. What this process uses stays."""

    cache_wait: float = Field(default=600.0, ge=0)
    """Seconds to wait for another process that compiles the same component; afterwards it is compiled here too."""

    compiler_timeout: float = Field(default=300.0, gt=0)
    """Seconds that one run of a compiler may take. One that hangs is ended then, and the compile has failed."""

    on_fault: Literal["eager", "error"] = "eager"
    """What a failed compile does: run the component eager, or raise `CompileFault`."""

    max_entries: int = Field(default=8, ge=1)
    """The budget: how many entries one region may compile."""

    on_budget: Literal["eager", "error", "warn"] = "warn"
    """What happens beyond the budget: new calls run eager, raise `BudgetExceeded`, or compile with a warning."""

    check_structure: Literal["sequence", "call"] = "sequence"
    """When a component's structure is looked at as a whole: where a sequence starts, or at every call. The second sees
    attributes that change between two tokens too, and costs a tenth of a millisecond to one for each token."""

    verify_calls: float = Field(default=0.0, ge=0)
    """The sentinel: a number of calls (1 or more), or a rate (below 1), that are compared with eager while in use."""

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    if not TYPE_CHECKING:  # type checkers keep the signature that they derive from the fields

        def __init__(self, /, _origins: Mapping[str, str] | None = None, **values: Any) -> None:
            origins = dict.fromkeys(values, "argument") if _origins is None else dict(_origins)
            _refuse_unknown(values, origins)
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _explained(error, origins) from None
            self._origins = origins

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> CompilationConfig:
        found = "; ".join(_contradictions(self))
        if found:
            raise ValueError(found)
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> CompilationConfig:
        """Read a YAML or JSON mapping of fields."""
        return cls.from_sources(file=path)

    @classmethod
    def from_sources(
        cls,
        file: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Flags | None = None,
        home: Path | None = None,
        **kwargs: Any,
    ) -> CompilationConfig:
        """Merge the sources; later wins: default, file, ``environ``, ``flags``, keyword arguments, kill switch.

        A file named by the flags replaces ``file``. Mappings in `dynamic_arg_dims` merge per argument. ``home`` is what
        ``~`` means in a path; the home in the password database where not given.
        """
        environ, flags = environ or {}, flags or Flags()
        merged: dict[str, Setting] = {}
        for source in (
            sources.file_settings(flags.file or file),
            sources.environment_settings(environ, cls.model_fields),
            flags.settings,
            {name: Setting(value, "argument") for name, value in kwargs.items()},
            sources.kill_switch(environ),
        ):
            merged |= {name: sources.merge(merged.get(name), setting) for name, setting in source.items()}
        for name in _PATHS:
            if home is not None and name in merged and isinstance(merged[name].value, str):
                merged[name] = merged[name]._replace(value=str(sources.expand_home(merged[name].value, home)))
        return cls._from_settings(merged)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompilationConfig:
        """The inverse of `to_dict`."""
        return cls(**values)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Setting]) -> CompilationConfig:
        values: dict[str, Any] = {name: setting.value for name, setting in settings.items()}
        values["_origins"] = {name: setting.origin for name, setting in settings.items()}
        return cls(**values)

    def replace(self, **changes: Any) -> CompilationConfig:
        """A copy with ``changes``, checked again; the other values keep their origin."""
        kept = {name: Setting(getattr(self, name), origin) for name, origin in self._origins.items()}
        return self._from_settings(kept | {name: Setting(value, "argument") for name, value in changes.items()})

    def origin(self, name: str) -> str:
        """Where a value came from: ``default``, ``file <path>``, ``environment <VARIABLE>``, ``flag <flag>`` or
        ``argument``; several, in order, where mappings were merged."""
        _refuse_unknown({name: None}, {})
        return self._origins.get(name, "default")

    def describe(self) -> list[tuple[str, Any, str]]:
        """Rows of field, value, origin."""
        return [(name, value, self.origin(name)) for name, value in self.to_dict().items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and YAML; `from_dict` reads them back."""
        values = self.model_dump()
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def __eq__(self, other: object) -> bool:
        """Equal values are equal configurations, wherever the values came from."""
        return isinstance(other, CompilationConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))


def _contradictions(config: CompilationConfig) -> Iterator[str]:
    """What cannot be meant together, both fields named."""
    if config.mode == 0 and config.compile_mm_encoder:
        yield "mode=0 runs everything eager, but compile_mm_encoder=True asks to compile the encoder"
    if config.mode == 3 and config.backend != "inductor":
        yield f"mode=3 autotunes kernels, but backend={config.backend!r} makes none"
    if config.mode < 2 and config.splitting_ops:
        yield f"splitting_ops cuts the graph of a whole component, but mode={config.mode} makes no such graph"
    if config.debug_dump_path is not None and config.debug_dump_path == config.cache_dir:
        yield f"debug_dump_path and cache_dir are both {config.cache_dir}, but a dump is no artifact"
    yield from _bad_custom_ops(config.custom_ops)
    if config.verify_calls > 1 and not config.verify_calls.is_integer():
        yield f"verify_calls={config.verify_calls} is neither a number of calls nor a rate below 1"


def _bad_custom_ops(custom_ops: list[str]) -> Iterator[str]:
    if {"all", "none"} <= set(custom_ops):
        yield "custom_ops holds both 'all' and 'none'"
    for index, op in enumerate(custom_ops):
        if op not in ("all", "none") and not (op[:1] in "+-" and op[1:]):
            yield f"custom_ops[{index}]={op!r} is none of 'all', 'none', '+name', '-name'"
        elif op[0] == "+" and f"-{op[1:]}" in custom_ops:
            yield f"custom_ops holds both {op!r} and '-{op[1:]}'"


def _refuse_unknown(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    for name in values:
        if name not in CompilationConfig.model_fields:
            where = _source(name, origins)
            hint = sources.near_match(name, CompilationConfig.model_fields)
            raise ConfigError(f"unknown configuration field {name!r}{where}.", remedy=hint)


def _source(name: str, origins: Mapping[str, str]) -> str:
    origin = origins.get(name, "argument")
    return "" if origin == "argument" else f" (from {origin})"


def _explained(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    """Pydantic's findings in one line: path of the field, what it should be, what it got, and from where."""
    said = []
    for found in error.errors():
        message = found["msg"].removeprefix("Value error, ")
        if not found["loc"]:  # a contradiction: the message names the fields
            said.append(message)
            continue
        path = ".".join(str(part) for part in found["loc"])
        source = _source(str(found["loc"][0]), origins)
        said.append(f"{path}: {message[0].lower()}{message[1:]}, got {found['input']!r}{source}")
    return ConfigError(f"{'; '.join(said)}.", remedy="See `compile-policy config` for fields, values and origins.")
