"""A run that writes into copies: no tensor that existed before it is changed.

Inside the block, the first write into a tensor from outside makes a copy of its memory. From there on every operator of
the calling thread that is given that tensor, or a view of it, gets the copy. What the run made itself is written as it
is. So a component can run on an example while buffers, statistics, closures and global tensors keep their values, and
memory is needed for what is written alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compile_policy import compat
from compile_policy.errors import NotCompilable

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class StandIns(TorchDispatchMode):
    """Redirects writes into copies; may be entered several times, for runs that follow one another.

    Args:
        module: writes into its parameters are refused before they happen: PEFT, for one, takes merged adapters out of
            the weights in the forward that finds them disabled.
        own: tensors made for the run, such as an example's, that may be written as they are.
    """

    def __init__(self, module: torch.nn.Module, own: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module  # keeps the memory of its parameters from being given to others
        self._weights = {compat.storage_of(p): n for n, p in module.named_parameters() if type(p) in _PLAIN}
        self._made: dict[int, Any] = {}
        self._copies: dict[int, tuple[torch.Tensor, torch.UntypedStorage]] = {}
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self.allow(own)

    def allow(self, own: Iterable[torch.Tensor]) -> None:
        """Let the run write into these tensors themselves."""
        for tensor in own:
            if type(tensor) in _PLAIN:
                self._made[compat.storage_of(tensor)] = compat.storage_alive(tensor)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for tensor, version in self._versions:  # the count goes up beside the redirected write
            compat.set_version(tensor, version)
        for generator, state in self._generators:
            generator.set_state(state)
        self._versions, self._generators = [], []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if compat.mutates(op):
            for tensor in compat.written_by(op, args, kwargs):
                self._before_write(tensor)
        given, spec = pytree.tree_flatten((args, kwargs))
        for value in given:
            if isinstance(value, torch.Generator):
                self._generators.append((value, value.get_state()))
        if not self._copies:
            result = op(*args, **kwargs)
            self._note_made(given, result)
            return result
        used = [self._redirected(value) for value in given]
        args, kwargs = pytree.tree_unflatten(used, spec)
        result = op(*args, **kwargs)
        self._note_made(used, result)
        originals = {id(now): was for was, now in zip(given, used, strict=True) if now is not was}
        return pytree.tree_map(lambda x: originals.get(id(x), x), result) if originals else result

    def _before_write(self, tensor: torch.Tensor) -> None:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_meta:
            return
        storage = compat.storage_of(tensor)
        if storage in self._weights:
            raise NotCompilable(f"its forward writes into the parameter {self._weights[storage]}")
        alive = self._made.get(storage)
        if storage in self._copies or (alive is not None and alive()):
            return
        copy = tensor.untyped_storage().clone()
        self._copies[storage] = (tensor, copy)
        if not tensor.is_inference():
            self._versions.append((tensor, tensor._version))

    def _redirected(self, value: Any) -> Any:
        if type(value) not in _PLAIN or value.layout is not torch.strided:
            return value
        found = self._copies.get(compat.storage_of(value))
        return value if found is None else _on(found[1], value)

    def _note_made(self, given: Sequence[Any], result: Any) -> None:
        """Note the memory that an operator made; a view of what it was given is no such."""
        before = {compat.storage_of(v) for v in given if type(v) in _PLAIN and v.layout is torch.strided}
        for made in pytree.tree_leaves(result):
            if type(made) in _PLAIN and made.layout is torch.strided:
                storage = compat.storage_of(made)
                if storage not in before:
                    self._made[storage] = compat.storage_alive(made)

    @property
    def written(self) -> frozenset[int]:
        """Storages from outside that the runs wrote into, as `compat.storage_of` gives them."""
        return frozenset(self._copies)

    def outside(self) -> list[torch.Tensor]:
        """The tensors from outside that were written."""
        return [tensor for tensor, _ in self._copies.values()]

    def is_written(self, tensor: torch.Tensor) -> bool:
        return type(tensor) in _PLAIN and tensor.layout is torch.strided and compat.storage_of(tensor) in self._copies


class Substitutes:
    """Fresh copies of those of some tensors that a component writes into, for runs of code that no mode can redirect.

    Args:
        written: storages, as `StandIns.written` gives them.
    """

    def __init__(self, written: frozenset[int]) -> None:
        self._written = written
        self._copies: dict[int, torch.UntypedStorage] = {}

    def of(self, tensor: Any) -> Any:
        """The tensor, or what takes its place; tensors of one memory keep sharing one. Anything else as it is."""
        if not self._written or type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            return tensor
        storage = compat.storage_of(tensor)
        if storage not in self._written:
            return tensor
        if storage not in self._copies:
            self._copies[storage] = tensor.untyped_storage().clone()
        return _on(self._copies[storage], tensor)


def places_of(tensors: Sequence[torch.Tensor], written: frozenset[int]) -> list[int]:
    """Which of the tensors lie in memory that is written into."""
    plain = [i for i, t in enumerate(tensors) if type(t) in _PLAIN and t.layout is torch.strided] if written else []
    return [i for i in plain if compat.storage_of(tensors[i]) in written]


def storages_of(tensors: Sequence[torch.Tensor]) -> frozenset[int]:
    """The memory of some tensors, as `StandIns.written` gives it."""
    return frozenset(map(compat.storage_of, tensors))


def _on(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """A tensor on ``storage`` that is otherwise like ``like``."""
    with torch.no_grad(), torch.inference_mode(like.is_inference()):
        made = torch.empty(0, dtype=like.dtype, device=like.device)
        made.set_(storage, like.storage_offset(), like.size(), like.stride())
        made = made.conj() if like.is_conj() else made
        return torch._neg_view(made) if like.is_neg() else made
