"""Accounts for every guard that Dynamo would have kept: what covers it, or how it is checked.

A guard says something about an object at a *place*, reached from a root by attributes and items. Every step of the way
can change, so every step needs a cover; the object's own property that the guard asks for is one more. Covers, weakest
first:

- ``construction``: cannot change, or is made by this package for the entry alone;
- ``key``: part of the call key, or of the modes beside it;
- ``fingerprint``: read by the walk over the module, which `Coverage` has written down while walking;
- ``sizes``: kept as the entry's `ShapeConditions`;
- ``check``: none of these, so the value is watched (`Watched`) and read again with every look at the structure.

A guard counts under the strongest cover that one of its steps needs. One that nothing can cover refuses the capture.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.modules import module as registration

from compile_policy.compat_guards import (
    GuardFacts,
    Place,
    Step,
    guard_facts,
    inlined_saved_tensor_hooks,
    is_immutable_type,
)
from compile_policy.errors import NotCompilable
from compile_policy.fingerprint import Coverage, is_read, reads_attribute
from compile_policy.watched import Watched

COVERS = ("construction", "key", "sizes", "fingerprint", "check")
_OWN_PACKAGES = ("compile_policy", "compile_policy_transformers")
#: Guards on the process: what stands for them in the key.
_MODES = {
    "GRAD_MODE": "grad mode is in the key",
    "DETERMINISTIC_ALGORITHMS": "deterministic algorithms are in the key",
    "DEFAULT_DEVICE": "the default device is in the key",
    "TORCH_FUNCTION_STATE": "a call under a function mode runs eager",
    "FUNCTORCH_STACK_MATCH": "a call inside a torch.func transformation runs eager",
    "DUAL_LEVEL": "a call under forward-mode differentiation runs eager",
}
#: Guards that ask nothing beyond which object stands at the place.
_IDENTITY = frozenset(
    (
        *("ID_MATCH", "EQUALS_MATCH", "CONSTANT_MATCH", "BOOL_MATCH", "NONE_MATCH", "NOT_NONE_MATCH", "FUNCTION_MATCH"),
        *("CLASS_MATCH", "MODULE_MATCH", "BUILTIN_MATCH", "NN_MODULE", "WEAKREF_ALIVE", "DUPLICATE_INPUT"),
    )
)
_LENGTH = frozenset(("SEQUENCE_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"))
_KEYS = frozenset(("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK", "DICT_VERSION"))
_MEMBER = frozenset(("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"))
_TENSOR = frozenset(
    ("TENSOR_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH", "DISPATCH_KEY_SET_MATCH", "DTENSOR_SPEC_MATCH")
)


#: (module, global) -> why only the items matter that a graph has looked up, not how many there are or in which order.
_lookup_tables: dict[tuple[str, str], str] = {
    ("compile_policy.adapters", "_adapters"): "adapters are looked up by type",
    ("torch.utils._pytree", "SUPPORTED_NODES"): "containers are looked up by type",
}


def register_lookup_table(module: str, name: str, why: str) -> None:
    """Declare that a global dictionary is only ever looked up by key, so that it may grow.

    Dynamo guards on all keys of a dictionary that is looked into. Only for one that nothing in a forward iterates over.
    """
    _lookup_tables[module, name] = why


@dataclass(frozen=True)
class GuardRecord:
    """A guard that Dynamo would have evaluated at every call, and what stands for it.

    Attributes:
        kind: Dynamo's name for the kind of guard.
        name: the guarded expression; empty for settings of the process.
        covered_by: one of `COVERS`.
        rule: why that covers it, in words.
        detail: the test as Dynamo writes it out.
    """

    kind: str
    name: str
    covered_by: str = ""
    rule: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Account:
    """All guards of one capture.

    Attributes:
        records: one a guard, in Dynamo's order.
        watched: what only a check covers, each place once.
        refusal: why the capture cannot be used; empty when every guard is covered.
    """

    records: tuple[GuardRecord, ...]
    watched: tuple[Watched, ...]
    refusal: str = ""

    def check(self) -> None:
        """Raises NotCompilable for a guard that nothing covers."""
        if self.refusal:
            raise NotCompilable(self.refusal, remedy="Report the model; the component runs eager until then.")


class _Uncovered(Exception):
    """No rule and no check fits."""


@dataclass(frozen=True)
class _Node:
    """An object on the way of a guard.

    Attributes:
        value: the object.
        cover, rule: the strongest cover that a step up to here needed.
        watched: the checks that these steps need.
        closed: made for this entry or fixed by its key, containers included: nothing in it can change.
        class_dict: the value stands for the own attributes of this class.
    """

    value: Any
    cover: str
    rule: str
    watched: tuple[Watched, ...] = ()
    closed: bool = False
    class_dict: type | None = None

    def then(self, value: Any, cover: str, rule: str, watched: Sequence[Watched] = ()) -> _Node:
        """The object one step on."""
        stronger = COVERS.index(cover) >= COVERS.index(self.cover)
        return _Node(
            value, cover if stronger else self.cover, rule if stronger else self.rule, (*self.watched, *watched)
        )


def account_for(
    entries: Sequence[Any], fn: types.FunctionType, leaves: Sequence[torch.Tensor], module: torch.nn.Module | None
) -> Account:
    """Classify the guards of a capture, while what was traced is still in place.

    Args:
        entries: Dynamo's ``GuardFilterEntry`` objects.
        fn: the function that was traced; its closure holds the component's ``forward``.
        leaves: its arguments.
        module: the component; ``None`` where no fingerprint stands behind the entry, so that all is watched.
    """
    audit = _Audit(fn, leaves, module)
    records: list[GuardRecord] = []
    watched: dict[tuple[Any, ...], Watched] = {}
    refusal = ""
    for entry in entries:
        facts = guard_facts(entry)
        try:
            node = audit.guard(facts)
        except Exception as error:
            where = f" ({facts.line})" if facts.line else ""
            reason = str(error) if isinstance(error, _Uncovered) else f"{type(error).__name__}: {error}"
            refusal = refusal or f"the graph depends on {facts.name or facts.kind}{where}, and nothing covers it: {reason}"
            continue
        records.append(GuardRecord(facts.kind, facts.name, node.cover, node.rule, facts.detail[:300]))
        for w in node.watched:
            watched.setdefault(w.place, replace(w, line=w.line or facts.line))
    return Account(tuple(records), tuple(watched.values()), refusal)


class _Audit:
    """One capture's objects by their places, and which rule covers each."""

    def __init__(
        self, fn: types.FunctionType, leaves: Sequence[torch.Tensor], module: torch.nn.Module | None
    ) -> None:
        self.globals = fn.__globals__
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        self.locals = {"leaves": tuple(leaves), **{name: cell.cell_contents for name, cell in cells}}
        self.module = module
        self.coverage = Coverage(module)
        self.nodes: dict[Place, _Node] = {}
        self.tables: dict[int, str] = {}

    # -- what a guard asks for ------------------------------------------------------------------------------------

    def guard(self, facts: GuardFacts) -> _Node:
        if facts.kind == "SHAPE_ENV":
            return _Node(None, "sizes", "kept as conditions on the sizes of the call")
        if facts.kind in _MODES:
            return _Node(None, "key", _MODES[facts.kind])
        if facts.kind == "GLOBAL_STATE":
            watched = Watched.now("settings of torch's kernels", "settings", torch)
            return _Node(None, "check", "modes are in the key, the other settings are watched", (watched,))
        if facts.kind == "AUTOGRAD_SAVED_TENSORS_HOOKS":
            if inlined_saved_tensor_hooks():
                raise _Uncovered("saved-tensor hooks became part of the graph")
            return _Node(None, "construction", "saved-tensor hooks act outside the graph")
        node = self.node(facts.place)
        if facts.other is not None:
            node = _both(node, self.node(facts.other))
        return node if node.closed else self._property(facts, node)

    def _property(self, facts: GuardFacts, node: _Node) -> _Node:
        kind = facts.kind
        if kind in _IDENTITY:
            return self._content(facts.name, node)
        if kind == "TYPE_MATCH":
            return self._type(facts.name, node)
        if kind == "CLOSURE_MATCH":
            is_function = isinstance(node.value, types.FunctionType)
            return self._attribute(facts.name, node, "__code__") if is_function else node
        if kind in _LENGTH:
            return self._about_container(facts.name, node, "length", "the number of its items")
        if kind in _KEYS:
            return self._about_container(facts.name, node, "keys", "its keys")
        if kind in _MEMBER:
            return self._member(facts.name, node, facts.word)
        if kind == "HASATTR":
            return self._has_attribute(facts.name, node, facts.word)
        if kind == "NOT_PRESENT_IN_GENERIC_DICT":
            return self._no_own_attribute(facts.name, node, facts.word)
        if kind in _TENSOR:
            return self._tensor(facts.name, node)
        raise _Uncovered(f"guards of the kind {kind} are unknown")

    def _content(self, name: str, node: _Node) -> _Node:
        """A container that is compared by value is all its items."""
        if isinstance(node.value, dict):
            return self._about_container(name, node, "keys", "its keys")
        if isinstance(node.value, (list, set)):
            return self._about_container(name, node, "members" if isinstance(node.value, set) else "length", "its items")
        return node

    def _about_container(self, name: str, node: _Node, how: str, what: str) -> _Node:
        value = node.value
        if isinstance(value, (tuple, frozenset, str, bytes, range)):
            return node
        if id(value) in self.tables:
            return node.then(value, "construction", self.tables[id(value)])
        if node.class_dict is None and id(value) in self.coverage.containers:
            return node.then(value, "fingerprint", f"{what} are read by the walk")
        if isinstance(value, torch.nn.Module) and id(value) in self.coverage.modules:
            return node.then(value, "fingerprint", "the module tree is walked")
        return node.then(value, "check", f"{what} are watched", [Watched.now(f"{what} in {name}", how, value)])

    def _member(self, name: str, node: _Node, key: Any) -> _Node:
        if node.class_dict is not None:
            return self._class_item(name, node, key)
        if isinstance(node.value, (tuple, frozenset)):
            return node
        if id(node.value) in self.coverage.containers:
            return node.then(node.value, "fingerprint", "its keys are read by the walk")
        watched = Watched.now(f"{key!r} in {name}", "contains", node.value, key)
        return node.then(node.value, "check", "whether the key is there is watched", [watched])

    def _has_attribute(self, name: str, node: _Node, attribute: str) -> _Node:
        if isinstance(node.value, torch.nn.Module) and id(node.value) in self.coverage.modules:
            known = set(self.coverage.classes)
            if known.issuperset(b for b in type(node.value).__mro__ if b not in (torch.nn.Module, object)):
                return node.then(node.value, "fingerprint", "attributes of the module and its class are walked")
        if _is_own(node.value):
            return node
        watched = Watched.now(f"{name}.{attribute}", "has attribute", node.value, attribute)
        return node.then(node.value, "check", "whether the attribute is there is watched", [watched])

    def _no_own_attribute(self, name: str, node: _Node, attribute: str) -> _Node:
        if id(node.value) in self.coverage.modules | self.coverage.objects:
            if attribute != "_compiled_call_impl":
                return node.then(node.value, "fingerprint", "all its own attributes are walked")
        watched = Watched.now(f"{name}.{attribute}", "contains", vars(node.value), attribute)
        return node.then(node.value, "check", "whether it has the attribute itself is watched", [watched])

    def _tensor(self, name: str, node: _Node) -> _Node:
        if id(node.value) in self.coverage.tensors:
            return node.then(node.value, "fingerprint", "class, dtype, device, sizes and layout are walked")
        watched = Watched.now(name, "tensor", node.value)
        return node.then(node.value, "check", "class, dtype, device, sizes and layout are watched", [watched])

    # -- how the guarded object is reached ------------------------------------------------------------------------

    def node(self, place: Place) -> _Node:
        known = self.nodes.get(place)
        if known is None:
            if len(place) == 1:
                known = self._root(place[0])
            else:
                known = self._step(self.node(place[:-1]), place[-1], place)
            self.nodes[place] = known
        return known

    def _root(self, root: Step) -> _Node:
        kind, name = (*root, "")[:2]
        if kind == "local" and name in self.locals:
            return self._local(name, self.locals[name])
        if kind == "global" and name in self.globals:
            value = self.globals[name]
            if isinstance(value, types.ModuleType) or name.startswith("__builtins_dict__"):
                return _Node(value, "construction", "the namespace in which traced code was written")
            if _is_own(value):
                return _Node(value, "construction", "code of this package")
            if name.startswith("___"):  # a namespace without a module, which Dynamo put there
                return _Node(value, "construction", "the namespace in which traced code was written")
            return _Node(None, "construction", "").then(
                value, "check", "the global is watched", [Watched.now(name, "item", self.globals, name)]
            )
        if kind == "module":
            return _Node(__import__(name), "construction", "an imported module")
        raise _Uncovered(f"it starts from {name or kind}, which has no rule")

    def _local(self, name: str, value: Any) -> _Node:
        if name == "leaves":
            rule = "a tensor of the call: dtype, device, static sizes and requires_grad are in the key"
            return _Node(value, "key", rule, closed=True)
        if name == "spec":
            return _Node(value, "key", "arguments that are no tensors are in the key", closed=True)
        if name == "forward" and self.module is not None:
            component = _Node(self.module, "construction", "the component itself")
            return replace(self._attribute("forward", component, "forward"), value=value)
        return _Node(value, "construction", "made for this entry", closed=_is_plain_data(value))

    def _step(self, base: _Node, step: Step, place: Place) -> _Node:
        name = expression(place)
        kind = step[0]
        if kind == "attr":
            return self._attribute(name, base, step[1])
        if kind in ("item", "item at", "key", "item of set"):
            return self._item(name, base, kind, step[1])
        if kind == "type":
            return replace(self._type(name, base), value=type(base.value), closed=False)
        if kind == "mro":
            if is_immutable_type(base.value) or _is_own(base.value):
                return base.then(base.value.__mro__, "construction", "bases of a class that cannot change")
            if base.value in self.coverage.classes:
                return base.then(base.value.__mro__, "fingerprint", "the bases of the class are walked")
            watched = Watched.now(name, "attribute", base.value, "__mro__")
            return base.then(base.value.__mro__, "check", "the bases of the class are watched", [watched])
        if kind == "class dict":
            return replace(base, class_dict=base.value, closed=False)
        if kind == "weak":
            return base.then(base.value(), "construction", "what a weak reference refers to does not change")
        raise _Uncovered(f"it is reached through a {step[1] if len(step) > 1 else kind}")

    def _item(self, name: str, base: _Node, kind: str, key: Any) -> _Node:
        container = base.value
        if base.class_dict is not None:
            return self._class_item(name, base, key)
        if kind == "key":
            value = list(dict.keys(container))[key]
        elif kind == "item at":
            key = list(dict.keys(container))[key]
            value = dict.__getitem__(container, key)
        elif kind == "item of set":
            value = list(container)[key]
        else:
            value = _get_item(container, key)
        if base.closed:
            return replace(base, value=value, closed=_stays_closed(value))
        if isinstance(container, (tuple, frozenset, str)):
            return base.then(value, "construction", "a tuple cannot change")
        if id(container) in self.coverage.containers:
            return base.then(value, "fingerprint", "items of the container are walked")
        if kind == "key" and id(container) in self.tables:
            return base.then(value, "construction", self.tables[id(container)])
        how = {"key": "keys", "item of set": "members"}.get(kind, "item")
        watched = Watched.now(name, how, container, key if how == "item" else None)
        return base.then(value, "check", "the item is watched", [watched])

    def _class_item(self, name: str, base: _Node, key: str) -> _Node:
        """One of a class's own attributes, or that it has none of this name."""
        cls = base.class_dict
        assert cls is not None
        value = vars(cls).get(key)
        if is_immutable_type(cls):
            return base.then(value, "construction", "a built-in class cannot change")
        if _is_own(cls):
            return base.then(value, "construction", "code of this package")
        if cls in self.coverage.classes and is_read(key) and type(value) is not int:
            return base.then(value, "fingerprint", "attributes of the class are walked")
        watched = Watched.now(name, "item", vars(cls), key)
        return base.then(value, "check", "the attribute of the class is watched", [watched])

    def _attribute(self, name: str, base: _Node, attribute: str) -> _Node:
        owner = base.value
        if isinstance(owner, types.ModuleType):
            return self._global(name, base, attribute)
        if isinstance(owner, type):
            return self._of_class(name, base, owner, attribute, getattr(owner, attribute))
        fixed = _FIXED.get(type(owner), ())
        if attribute in fixed or (attribute == "cell_contents" and base.closed):
            return base.then(getattr(owner, attribute), "construction", "cannot be set")
        if isinstance(owner, types.FunctionType) and _is_own(owner):
            return base.then(getattr(owner, attribute), "construction", "code of this package")
        if isinstance(owner, types.FunctionType) and attribute in ("__code__", "__defaults__", "__kwdefaults__"):
            watched = Watched.now(name, "attribute", owner, attribute)
            return base.then(watched.value, "check", "the function's code and defaults are watched", [watched])
        if attribute == "__class__":
            return replace(self._type(name, base), value=type(owner))
        if isinstance(getattr(type(owner), "__dict__", None), Mapping) and hasattr(owner, "__dict__"):
            return self._of_instance(name, base, owner, attribute)
        watched = Watched.now(name, "attribute", owner, attribute)
        return base.then(getattr(owner, attribute), "check", "the attribute is watched", [watched])

    def _global(self, name: str, base: _Node, attribute: str) -> _Node:
        module = base.value
        value = getattr(module, attribute)
        if _is_own(module) and isinstance(value, (types.FunctionType, type, types.ModuleType)):
            return base.then(value, "construction", "code of this package")
        if module is registration and attribute.endswith("_registration_hooks"):
            rule = "hooks on registration see what is registered, which a graph does not do"
            return replace(base.then(value, "construction", rule), closed=True)
        if (module.__name__, attribute) in _lookup_tables:
            self.tables[id(value)] = _lookup_tables[module.__name__, attribute]
        inside = attribute in vars(module)
        watched = Watched.now(name, "item" if inside else "attribute", vars(module) if inside else module, attribute)
        return base.then(value, "check", "the global is watched", [watched])

    def _of_instance(self, name: str, base: _Node, owner: Any, attribute: str) -> _Node:
        own = vars(owner)
        whole = id(owner) in self.coverage.modules or id(owner) in self.coverage.objects
        if attribute == "__dict__":
            if whole:
                return base.then(own, "fingerprint", "all its own attributes are walked")
            return base.then(own, "construction", "an object's own dictionary")
        value = getattr(owner, attribute)
        if attribute in own and own[attribute] is value:
            is_module = id(owner) in self.coverage.modules
            if whole and (not is_module or reads_attribute(attribute)):
                return base.then(value, "fingerprint", "attributes of the module or object are walked")
            if owner is self.module and attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                return base.then(value, "construction", "hooks of the component itself run round its graph")
            watched = Watched.now(name, "item", own, attribute)
            return base.then(value, "check", "the attribute is watched", [watched])
        for group in ("_parameters", "_buffers", "_modules"):
            if attribute in own.get(group, ()) and id(own[group]) in self.coverage.containers:
                return base.then(value, "fingerprint", "parameters, buffers and sub-modules are walked")
        return self._of_class(name, base, type(owner), attribute, value, absent=() if whole else (own,))

    def _of_class(
        self, name: str, base: _Node, cls: type, attribute: str, value: Any, absent: tuple[dict[str, Any], ...] = ()
    ) -> _Node:
        """An attribute that is looked up on a class, and that the instance's ``absent`` dictionary must not have."""
        watched = [Watched.now(name, "contains", own, attribute) for own in absent]
        looked: list[type] = []
        for b in cls.__mro__:
            looked.append(b)
            if attribute in vars(b):
                break
        else:  # found by __getattr__ or on the metaclass
            watched.append(Watched.now(name, "attribute", cls, attribute))
            return base.then(value, "check", "the attribute is watched", watched)
        found = vars(looked[-1])[attribute]
        covered: Callable[[type], bool] = lambda b: (  # noqa: E731
            b in self.coverage.classes and is_read(attribute) and type(found) is not int
        )
        if all(is_immutable_type(b) or _is_own(b) for b in looked):
            cover, rule = "construction", "a class of Python or of this package"
        elif all(covered(b) or is_immutable_type(b) for b in looked):
            cover, rule = "fingerprint", "attributes of the class are walked"
        else:
            watched.append(Watched.now(name, "lookup", cls, attribute))
            cover, rule = "check", "the attribute of the class is watched"
        if absent and cover != "check":
            cover, rule = "check", "whether the object has the attribute itself is watched"
        return base.then(value, cover, rule, watched)

    def _type(self, name: str, node: _Node) -> _Node:
        """The class of an object, which can be assigned where the class was written in Python."""
        value = node.value
        if node.closed or is_immutable_type(type(value)) or isinstance(value, (type, types.ModuleType)):
            return node
        if id(value) in self.coverage.modules | self.coverage.objects | self.coverage.tensors:
            return node.then(value, "fingerprint", "its class is walked")
        if id(value) in self.coverage.containers or _is_own(value):
            return node.then(value, "construction" if _is_own(value) else "fingerprint", "its class is walked")
        return node.then(value, "check", "its class is watched", [Watched.now(f"type of {name}", "type", value)])


#: Attributes that Python does not let anybody set.
_FIXED: dict[type, tuple[str, ...]] = {
    types.FunctionType: ("__closure__", "__globals__"),
    types.MethodType: ("__func__", "__self__"),
    functools.partial: ("func", "args", "keywords"),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}


def _both(a: _Node, b: _Node) -> _Node:
    stronger = a if COVERS.index(a.cover) >= COVERS.index(b.cover) else b
    return replace(stronger, watched=(*a.watched, *b.watched), closed=a.closed and b.closed)


def _is_own(value: Any) -> bool:
    """A function, class or module of this package."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    if not isinstance(value, (types.ModuleType, types.FunctionType, type)) or not isinstance(name, str):
        return False
    return name.split(".")[0] in _OWN_PACKAGES


def _is_plain_data(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, str, int, float, bool, type(None)))


def _stays_closed(value: Any) -> bool:
    """Whether nothing in an item of closed data can change: a class, an object or a function in it can."""
    return _is_plain_data(value) or isinstance(value, torch.Tensor)


def _get_item(container: Any, key: Any) -> Any:
    if isinstance(key, tuple) and len(key) == 2 and key[0] is slice:
        return container[slice(*key[1])]
    if isinstance(container, dict):
        return dict.__getitem__(container, key)
    return list.__getitem__(container, key) if isinstance(container, list) else container[key]


def expression(place: Place) -> str:
    """A place as people write it."""
    text = _ROOT_NAMES.get(place[0], str(place[0][-1]))
    if text.startswith("__import_"):
        text = text.removeprefix("__import_").replace("_dot_", ".")
    elif text.startswith("__builtins_dict__"):
        text = "builtins"
    for step in place[1:]:
        kind = step[0]
        if kind == "attr":
            text = f"{text}.{step[1]}"
        elif kind == "type":
            text = f"type({text})"
        elif kind in ("mro", "class dict"):
            text += ".__mro__" if kind == "mro" else ""
        elif kind == "key":
            text = f"key {step[1]} of {text}"
        else:
            text = f"{text}[{step[1]!r}]" if len(step) > 1 else text
    return text.replace("forward.__self__", "self")


_ROOT_NAMES: dict[Step, str] = {("process",): "torch"}
