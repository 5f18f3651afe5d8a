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

import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compile_policy.compat_guards import GuardFacts, Place, guard_facts, inlined_saved_tensor_hooks
from compile_policy.cover import COVERS as COVERS
from compile_policy.cover import Node, Uncovered, both, is_own
from compile_policy.cover import register_lookup_table as register_lookup_table
from compile_policy.errors import NotCompilable
from compile_policy.places import Places
from compile_policy.repeats import Repeats
from compile_policy.representative import Represented
from compile_policy.watched import Watched

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
_REPORT = "Report the model; the component runs eager until then."
_CLASS_OF_ARGUMENT = "the class of an argument is in the key"
_LENGTH = frozenset(("SEQUENCE_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"))
_KEYS = frozenset(("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK", "DICT_VERSION"))
_MEMBER = frozenset(("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"))
_TENSOR = frozenset(("TENSOR_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH", "DISPATCH_KEY_SET_MATCH", "DTENSOR_SPEC_MATCH"))


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
        read: numbers of the arguments whose values the graph depends on, where they are no tensors.
    """

    records: tuple[GuardRecord, ...]
    watched: tuple[Watched, ...]
    refusal: str = ""
    read: frozenset[int] = frozenset()
    remedy: str = _REPORT

    def check(self) -> None:
        """Raises NotCompilable for a guard that nothing covers."""
        if self.refusal:
            refused = NotCompilable(self.refusal, remedy=self.remedy)
            refused.read = self.read
            raise refused


def account_for(
    entries: Sequence[Any],
    fn: types.FunctionType,
    leaves: Sequence[torch.Tensor],
    module: torch.nn.Module | None,
    repeats: Repeats | None = None,
) -> Account:
    """Classify the guards of a capture, while what was traced is still in place.

    Args:
        entries: Dynamo's ``GuardFilterEntry`` objects.
        fn: the function that was traced; its closure holds the component's ``forward``.
        leaves: its arguments.
        module: the component; ``None`` where no fingerprint stands behind the entry, so that all is watched.
        repeats: which layers were traced for others; guards of these are asked again of those.

    Raises:
        NotRepeated: a guard does not hold for a layer that the guarded one stands for.
    """
    audit = _Audit(Places(fn, leaves, module))
    represented = Represented(repeats, module, audit.places) if repeats is not None and module is not None else None
    records: list[GuardRecord] = []
    watched: dict[tuple[Any, ...], Watched] = {}
    refusal = ""
    read: set[int] = set()
    spec = audit.places.locals.get("spec", ())
    all_facts = [guard_facts(entry) for entry in entries]
    if represented is not None:
        all_facts += [again for facts in all_facts for again in represented.again(facts)]
    for facts in all_facts:
        opaque = None
        for place in (facts.place, *(() if facts.other is None else (facts.other,))):
            found = value_of_argument(place, spec)
            if found is not None:
                number, depth = found
                opaque = spec[number][1][1] if spec[number][1][0] == "object" else opaque
                if depth > 0 or (depth == 0 and facts.kind != "TYPE_MATCH"):
                    read.add(number)
        if opaque is not None:  # its class is in the key
            records.append(GuardRecord(facts.kind, facts.name, "key", _CLASS_OF_ARGUMENT, facts.detail[:300]))
            continue
        try:
            node = audit.guard(facts)
        except Exception as error:
            where = f" ({facts.line})" if facts.line else ""
            reason = str(error) if isinstance(error, Uncovered) else f"{type(error).__name__}: {error}"
            refusal = (
                refusal or f"the graph depends on {facts.name or facts.kind}{where}, and nothing covers it: {reason}"
            )
            continue
        records.append(GuardRecord(facts.kind, facts.name, node.cover, node.rule, facts.detail[:300]))
        for w in node.watched:
            watched.setdefault(w.place, replace(w, line=w.line or facts.line))
    remedy = _REPORT
    objects = [spec[n][1][1] for n in sorted(read) if spec[n][1][0] == "object"]
    if objects and not refusal:
        refusal, remedy = objects[0].reason, objects[0].remedy
    return Account(tuple(records), tuple(watched.values()), refusal, frozenset(read), remedy)


def value_of_argument(place: Place, spec: Sequence[Any]) -> tuple[int, int] | None:
    """Return which argument a place belongs to, and how many steps it lies behind its value; ``None`` for others.

    Args:
        spec: (name, spec) of every argument; only those that are no tensors count (`Call.constants`).
    """
    if len(place) < 4 or place[0] != ("local", "spec") or place[1][0] != "item" or place[2] != ("item", 1):
        return None
    number: int = place[1][1]
    kind = spec[number][1][0]
    if kind == "const" and place[3] == ("item", 2):
        return number, len(place) - 4
    if kind == "object" and place[3] == ("item", 1):
        return number, len(place) - 5  # what carries the object lies before it
    return None


class _Audit:
    """What the guards of one capture ask for."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.coverage = places.coverage

    # -- what a guard asks for ------------------------------------------------------------------------------------

    def guard(self, facts: GuardFacts) -> Node:
        if facts.kind == "SHAPE_ENV":
            return Node(None, "sizes", "kept as conditions on the sizes of the call")
        if facts.kind in _MODES:
            return Node(None, "key", _MODES[facts.kind])
        if facts.kind == "GLOBAL_STATE":
            watched = Watched.now("settings of torch's kernels", "settings", torch)
            return Node(None, "check", "modes are in the key, the other settings are watched", (watched,))
        if facts.kind == "AUTOGRAD_SAVED_TENSORS_HOOKS":
            if inlined_saved_tensor_hooks():
                raise Uncovered("saved-tensor hooks became part of the graph")
            return Node(None, "construction", "saved-tensor hooks act outside the graph")
        node = self.places.node(facts.place)
        if facts.other is not None:
            node = both(node, self.places.node(facts.other))
        if isinstance(node.value, torch.Tensor) and node.closed:
            return self._of_argument(facts, node)
        return node if node.closed else self._property(facts, node)

    def _of_argument(self, facts: GuardFacts, node: Node) -> Node:
        """A property of a tensor of the call; an attribute that somebody set on it is none that the key has."""
        if facts.kind in _TENSOR or facts.kind in ("TYPE_MATCH", "NOT_NONE_MATCH"):
            return node
        if facts.kind == "HASATTR" and hasattr(torch.Tensor, facts.word):
            return node.then(node.value, "construction", "every tensor has it")
        raise Uncovered("an attribute of an argument")

    def _property(self, facts: GuardFacts, node: Node) -> Node:
        kind = facts.kind
        if kind in _IDENTITY:
            return self._content(facts.name, node)
        if kind == "TYPE_MATCH":
            return self.places.class_of(facts.name, node)
        if kind == "CLOSURE_MATCH":
            is_function = isinstance(node.value, types.FunctionType)
            return self.places.attribute(facts.name, node, "__code__") if is_function else node
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
        raise Uncovered(f"guards of the kind {kind} are unknown")

    def _content(self, name: str, node: Node) -> Node:
        """A container that is compared by value is all its items."""
        if isinstance(node.value, dict):
            return self._about_container(name, node, "keys", "its keys")
        if isinstance(node.value, (list, set)):
            return self._about_container(
                name, node, "members" if isinstance(node.value, set) else "length", "its items"
            )
        return node

    def _about_container(self, name: str, node: Node, how: str, what: str) -> Node:
        value = node.value
        if isinstance(value, (tuple, frozenset, str, bytes, range)):
            return node
        if id(value) in self.places.tables:
            return node.then(value, "construction", self.places.tables[id(value)])
        if node.class_dict is None and id(value) in self.coverage.containers:
            return node.then(value, "fingerprint", f"{what} are read by the walk")
        if isinstance(value, torch.nn.Module) and id(value) in self.coverage.modules:
            return node.then(value, "fingerprint", "the module tree is walked")
        return node.then(value, "check", f"{what} are watched", [Watched.now(f"{what} in {name}", how, value)])

    def _member(self, name: str, node: Node, key: Any) -> Node:
        if node.class_dict is not None:
            return self.places.class_item(name, node, key)
        if isinstance(node.value, (tuple, frozenset)):
            return node
        if id(node.value) in self.coverage.containers:
            return node.then(node.value, "fingerprint", "its keys are read by the walk")
        watched = Watched.now(f"{key!r} in {name}", "contains", node.value, key)
        return node.then(node.value, "check", "whether the key is there is watched", [watched])

    def _has_attribute(self, name: str, node: Node, attribute: str) -> Node:
        if isinstance(node.value, torch.nn.Module) and id(node.value) in self.coverage.modules:
            known = set(self.coverage.classes)
            if known.issuperset(b for b in type(node.value).__mro__ if b not in (torch.nn.Module, object)):
                return node.then(node.value, "fingerprint", "attributes of the module and its class are walked")
        if is_own(node.value):
            return node
        watched = Watched.now(f"{name}.{attribute}", "has attribute", node.value, attribute)
        return node.then(node.value, "check", "whether the attribute is there is watched", [watched])

    def _no_own_attribute(self, name: str, node: Node, attribute: str) -> Node:
        if self.coverage.reads_all_of(node.value) and attribute != "_compiled_call_impl":
            return node.then(node.value, "fingerprint", "all its own attributes are walked")
        watched = Watched.now(f"{name}.{attribute}", "contains", vars(node.value), attribute)
        return node.then(node.value, "check", "whether it has the attribute itself is watched", [watched])

    def _tensor(self, name: str, node: Node) -> Node:
        if id(node.value) in self.coverage.tensors:
            return node.then(node.value, "fingerprint", "class, dtype, device, sizes and layout are walked")
        watched = Watched.now(name, "tensor", node.value)
        return node.then(node.value, "check", "class, dtype, device, sizes and layout are watched", [watched])
