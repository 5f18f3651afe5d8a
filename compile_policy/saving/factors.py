"""What tells two artifacts apart, by name, so that a miss can say which of it differs.

This is an allow-list: nothing of the process takes part unless it stands here. Each factor is a short text or, where
it is long, the digest of one.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from compile_policy import compat
from compile_policy.artifacts.key import JSON
from compile_policy.call_key import Call, metadata_of
from compile_policy.layers.registry import registry_state
from compile_policy.saving.machine import inductor, machine, numerics, versions
from compile_policy.saving.replicas import rank_factor
from compile_policy.saving.sources import text_digest
from compile_policy.saving.stable import Stable, digest
from compile_policy.saving.structure import first_places, structure
from compile_policy.shapes import Labels, pattern
from compile_policy.tensors import OWN_ATTRIBUTES

#: Changes when files of an older form can no longer be read.
FORMAT = 3
#: The factor that holds the values of arguments without tensors; of an entry's key only those that it depends on.
VALUES = "value"
_SHORT = 60


def entry_factors(module: torch.nn.Module, call: Call, options: Mapping[str, Any], binder: object) -> dict[str, JSON]:
    """Every factor of an entry for ``call``, but for those of `label_factors`.

    Args:
        options: how the entry would be lowered: backend, level and the like.
        binder: what made the call canonical; its package's sources count as the policy's.

    Raises:
        Unstable: something about the component or the call that cannot be recognised in another process.
    """
    stable = Stable(first_places(module))
    classes = {type(m) for m in module.modules()} | set(_types(call.spec))
    devices = {t.device for t in [*module.parameters(), *module.buffers(), *call.leaves]}
    modes = (*compat.modes(), ("training flag", module.training))
    return {
        "format": FORMAT,
        "component": f"{type(module).__module__}:{type(module).__qualname__}",
        "version": versions(classes, binder),
        "source": _sources(classes),
        **_structure(module, stable),
        "argument": {name: _argument(spec, stable) for name, spec in call.spec},
        VALUES: {name: _text(stable(s)) for name, s in call.constants().items() if s[0] == "const"},
        "mode": {name: _text(stable(value)) for name, value in modes},
        "option": {name: _text(stable(value)) for name, value in options.items()},
        "machine": machine(devices),
        "numerics": numerics(),
        "inductor": inductor(),
        "layers": digest(stable(registry_state())),
        "rank": rank_factor(module),
    }


def _argument(spec: Any, stable: Stable) -> str:
    """An argument as far as every graph depends on it: of one without tensors, its class (`Index.read`)."""
    if spec[0] in ("const", "object"):
        return f"a {_text(stable(spec[1] if spec[0] == 'const' else spec[1].cls))}"
    return _text(stable(spec))


def label_factors(call: Call, labels: Sequence[Labels]) -> dict[str, JSON]:
    """Factors of the example that an entry is traced on: which dims vary, which are equal, sizes of the others."""
    stable = Stable()
    metadata = [stable(metadata_of(t, names)) for t, names in zip(call.leaves, labels, strict=True)]
    tensors: dict[str, list[Any]] = {}
    for path, form in zip(call.paths, metadata, strict=True):
        tensors.setdefault(re.split(r"[.\[]", path)[0], []).append([path, form])
    return {"dynamic dims": digest(stable(pattern(labels))), "tensors": {n: digest(f) for n, f in tensors.items()}}


def variants(call: Call) -> list[Sequence[Labels]]:
    """The labels under which an entry for ``call`` may have been made: all dims free, or sizes 0 and 1 constant."""
    given = [
        tuple(n if s > 1 else None for s, n in zip(t.shape, names, strict=True))
        for t, names in zip(call.leaves, call.labels, strict=True)
    ]
    return [call.labels] if call.example is not None or given == list(call.labels) else [call.labels, given]


def _structure(module: torch.nn.Module, stable: Stable) -> dict[str, JSON]:
    """The module tree in parts; an object that the component itself holds, such as its configuration, by field."""
    parts = structure(module, stable)
    factors: dict[str, JSON] = {
        "structure": {
            "modules": digest([[path, cls, training] for path, (cls, training, *_) in parts.items()]),
            "hooks": digest([[path, part[2]] for path, part in parts.items() if part[2]]),
            "attributes": digest([[path, part[3]] for path, part in parts.items()]),
            "weights": digest([[path, part[4]] for path, part in parts.items()]),
        }
    }
    for name, value in vars(module).items():
        if name in OWN_ATTRIBUTES:
            continue
        if hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, torch.Tensor, type, *_CALLABLE)):
            factors[name] = {field: _text(form) for field, form in stable.attributes(value)}
    return factors


_CALLABLE = (types.FunctionType, types.MethodType, types.ModuleType)


def _sources(classes: Iterable[type]) -> dict[str, JSON]:
    modules = sorted({cls.__module__ for cls in classes if cls.__module__.split(".")[0] not in ("torch", "builtins")})
    return {m: text for m in modules if (text := text_digest(m)) is not None}


def _types(spec: Any) -> Iterable[type]:
    if isinstance(spec, type):
        yield spec
    elif isinstance(spec, tuple):
        for part in spec:
            yield from _types(part)


def _text(form: Any) -> str:
    text = form if isinstance(form, str) else json.dumps(form, sort_keys=True)
    return text if len(text) <= _SHORT else digest(form)
