"""How an object that a guard is about is reached, and what covers every step of the way.

Each step from a root can change: an attribute set, an item replaced, a class given another method. `Places.node`
follows a place of `compat_guards` and keeps the strongest cover that a step needed (see `audit`). A step that is
neither fixed, nor in the call key, nor read by the fingerprint's walk leaves a `Watched` value.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules import module as registration

from compile_policy.compat_guards import Place, Step, is_immutable_type
from compile_policy.cover import Node, Uncovered, is_own, lookup_tables
from compile_policy.walk import Coverage, is_read, reads_attribute
from compile_policy.watched import Watched


class Places:
    """One capture's objects by their places, and which rule covers each."""

    def __init__(self, fn: types.FunctionType, leaves: Sequence[torch.Tensor], module: torch.nn.Module | None) -> None:
        self.globals = fn.__globals__
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        self.locals = {"leaves": tuple(leaves), **{name: cell.cell_contents for name, cell in cells}}
        self.module = module
        self.coverage = Coverage(module)
        self.nodes: dict[Place, Node] = {}
        self.tables: dict[int, str] = {}

    def node(self, place: Place) -> Node:
        known = self.nodes.get(place)
        if known is None:
            if len(place) == 1:
                known = self._root(place[0])
            else:
                known = self._step(self.node(place[:-1]), place[-1], place)
            self.nodes[place] = known
        return known

    def _root(self, root: Step) -> Node:
        kind, name = (*root, "")[:2]
        if kind == "local" and name in self.locals:
            return self._local(name, self.locals[name])
        if kind == "global" and name in self.globals:
            value = self.globals[name]
            if isinstance(value, types.ModuleType) or name.startswith("__builtins_dict__"):
                return Node(value, "construction", "the namespace in which traced code was written")
            if is_own(value):
                return Node(value, "construction", "code of this package")
            if name.startswith("___"):  # a namespace without a module, which Dynamo put there
                return Node(value, "construction", "the namespace in which traced code was written")
            return Node(None, "construction", "").then(
                value, "check", "the global is watched", [Watched.now(name, "item", self.globals, name)]
            )
        if kind == "module":
            return Node(__import__(name), "construction", "an imported module")
        raise Uncovered(f"it starts from {name or kind}, which has no rule")

    def _local(self, name: str, value: Any) -> Node:
        if name == "leaves":
            rule = "a tensor of the call: dtype, device, static sizes and requires_grad are in the key"
            return Node(value, "key", rule, closed=True)
        if name == "spec":
            return Node(value, "key", "arguments that are no tensors are in the key", closed=True)
        if name == "forward" and self.module is not None:
            component = Node(self.module, "construction", "the component itself")
            return replace(self.attribute("forward", component, "forward"), value=value)
        return Node(value, "construction", "made for this entry", closed=_is_plain_data(value))

    def _step(self, base: Node, step: Step, place: Place) -> Node:
        name = expression(place)
        kind = step[0]
        if kind == "attr":
            return self.attribute(name, base, step[1])
        if kind in ("item", "item at", "key", "item of set"):
            return self._item(name, base, kind, step[1])
        if kind == "type":
            return replace(self.class_of(name, base), value=type(base.value), closed=False)
        if kind == "mro":
            if is_immutable_type(base.value) or is_own(base.value):
                return base.then(base.value.__mro__, "construction", "bases of a class that cannot change")
            if base.value in self.coverage.classes:
                return base.then(base.value.__mro__, "fingerprint", "the bases of the class are walked")
            watched = Watched.now(name, "attribute", base.value, "__mro__")
            return base.then(base.value.__mro__, "check", "the bases of the class are watched", [watched])
        if kind == "class dict":
            return replace(base, class_dict=base.value, closed=False)
        if kind == "weak":
            return base.then(base.value(), "construction", "what a weak reference refers to does not change")
        if kind == "inner names" and not base.closed:
            names = base.value.__tensor_flatten__()[0]
            watched = Watched.now(name, "tensor", base.value)
            return base.then(names, "check", "the tensor and what is inside it are watched", [watched])
        raise Uncovered(f"it is reached through a {step[1] if len(step) > 1 else kind}")

    def _item(self, name: str, base: Node, kind: str, key: Any) -> Node:
        container = base.value
        if base.class_dict is not None:
            return self.class_item(name, base, key)
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

    def class_item(self, name: str, base: Node, key: str) -> Node:
        """One of a class's own attributes, or that it has none of this name."""
        cls = base.class_dict
        assert cls is not None
        value = vars(cls).get(key)
        if is_immutable_type(cls):
            return base.then(value, "construction", "a built-in class cannot change")
        if is_own(cls):
            return base.then(value, "construction", "code of this package")
        if cls in self.coverage.classes and is_read(key) and type(value) is not int:
            return base.then(value, "fingerprint", "attributes of the class are walked")
        watched = Watched.now(name, "item", vars(cls), key)
        return base.then(value, "check", "the attribute of the class is watched", [watched])

    def attribute(self, name: str, base: Node, attribute: str) -> Node:
        owner = base.value
        if isinstance(owner, torch.Tensor) and base.closed:
            raise Uncovered("an attribute of an argument")
        if isinstance(owner, types.ModuleType):
            return self._global(name, base, attribute)
        if isinstance(owner, type):
            return self._of_class(name, base, owner, attribute, getattr(owner, attribute))
        fixed = _FIXED.get(type(owner), ())
        if attribute in fixed or (attribute == "cell_contents" and base.closed):
            return base.then(getattr(owner, attribute), "construction", "cannot be set")
        if isinstance(owner, types.FunctionType) and is_own(owner):
            return base.then(getattr(owner, attribute), "construction", "code of this package")
        if isinstance(owner, types.FunctionType) and attribute in ("__code__", "__defaults__", "__kwdefaults__"):
            watched = Watched.now(name, "attribute", owner, attribute)
            return base.then(watched.value, "check", "the function's code and defaults are watched", [watched])
        if attribute == "__class__":
            return replace(self.class_of(name, base), value=type(owner))
        if hasattr(owner, "__dict__"):
            return self._of_instance(name, base, owner, attribute)
        watched = Watched.now(name, "attribute", owner, attribute)
        return base.then(getattr(owner, attribute), "check", "the attribute is watched", [watched])

    def _global(self, name: str, base: Node, attribute: str) -> Node:
        module = base.value
        value = getattr(module, attribute)
        if is_own(module) and isinstance(value, (types.FunctionType, type, types.ModuleType)):
            return base.then(value, "construction", "code of this package")
        if module is registration and attribute.endswith("_registration_hooks"):
            rule = "hooks on registration see what is registered, which a graph does not do"
            return replace(base.then(value, "construction", rule), closed=True)
        if (module.__name__, attribute) in lookup_tables:
            self.tables[id(value)] = lookup_tables[module.__name__, attribute]
        inside = attribute in vars(module)
        watched = Watched.now(name, "item" if inside else "attribute", vars(module) if inside else module, attribute)
        return base.then(value, "check", "the global is watched", [watched])

    def _of_instance(self, name: str, base: Node, owner: Any, attribute: str) -> Node:
        own = vars(owner)
        whole = self.coverage.reads_all_of(owner)
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
        self, name: str, base: Node, cls: type, attribute: str, value: Any, absent: tuple[dict[str, Any], ...] = ()
    ) -> Node:
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
        walked = is_read(attribute) and type(found) is not int
        if all(is_immutable_type(b) or is_own(b) for b in looked):
            cover, rule = "construction", "a class of Python or of this package"
        elif walked and all(b in self.coverage.classes or is_immutable_type(b) for b in looked):
            cover, rule = "fingerprint", "attributes of the class are walked"
        else:
            watched.append(Watched.now(name, "lookup", cls, attribute))
            cover, rule = "check", "the attribute of the class is watched"
        if absent and cover != "check":
            cover, rule = "check", "whether the object has the attribute itself is watched"
        return base.then(value, cover, rule, watched)

    def class_of(self, name: str, node: Node) -> Node:
        """The class of an object, which can be assigned where the class was written in Python."""
        value = node.value
        if node.closed or is_immutable_type(type(value)) or isinstance(value, (type, types.ModuleType)):
            return node
        if self.coverage.reads_all_of(value) or id(value) in self.coverage.tensors:
            return node.then(value, "fingerprint", "its class is walked")
        if id(value) in self.coverage.containers or is_own(value):
            return node.then(value, "construction" if is_own(value) else "fingerprint", "its class is walked")
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
