"""Methods that divide the sizes of a call without need, and what is traced in their place.

Each row of the table stands for code that does the same thing in two ways, by a size, or makes something that only
depends on sizes with operators that fix them. What is traced in its place computes the same for every size. A method is
known by the digest of its syntax tree, comments and names of classes aside, so that a version of Transformers that
writes it otherwise, or another model that has a copy, is told by what it does and not by its name; an unknown one is
traced as it is, at the price of more graphs. Nothing of Transformers is changed: for the time of a trace the instances
have a method of ours, which other threads and eager runs pass by.
"""

from __future__ import annotations
import __future__

import ast
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compile_policy_transformers import releases


@dataclass(frozen=True)
class Twin:
    """One row.

    Attributes:
        method: its name.
        digests: of the method, and of functions of its Python module that it calls, by name ("" for the method).
        edits: texts of the method, and what stands in the place of each; or
        function: all that stands in its place.
        training: whether it holds in training, too.
    """

    method: str
    digests: tuple[tuple[str, str], ...]
    edits: tuple[tuple[str, str], ...] = ()
    function: Callable[..., Any] | None = None
    training: bool = True

    def made(self, function: types.FunctionType) -> Callable[..., Any] | None:
        """What is traced in place of ``function``; ``None`` where the row does not know it."""
        names = {**function.__globals__, "": function}
        if any(digest(names.get(name)) != known for name, known in self.digests):
            return None
        return _edited(function, self.edits) if self.edits else self.function


def digest(function: Any) -> str:
    """Digest of what a function does; empty for anything whose source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _edited(function: types.FunctionType, edits: tuple[tuple[str, str], ...]) -> types.FunctionType | None:
    """The same function with other texts in some places, in the lines of the same file."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in edits:
        if source.count(old) != 1 or function.__code__.co_freevars:
            return None
        source = source.replace(old, new)
    tree = ast.increment_lineno(ast.parse(source), function.__code__.co_firstlineno - 1)
    code = compile(tree, function.__code__.co_filename, "exec", flags=__future__.annotations.compiler_flag)
    inner = next(const for const in code.co_consts if isinstance(const, types.CodeType))
    out = types.FunctionType(inner, function.__globals__, function.__name__, function.__defaults__)
    out.__kwdefaults__ = function.__kwdefaults__
    return out


def _chunks_seen(self: nn.Module, seq_len: int, batch_size: int, chunk_size: int, left_chunk: int) -> torch.Tensor:
    """(batch, frames, frames): a frame sees the chunk that it is in, and ``left_chunk`` chunks before."""
    if chunk_size <= 0:  # all in one
        return torch.ones(1, 1, 1, dtype=torch.bool).expand(batch_size, seq_len, seq_len)
    frames = torch.arange(seq_len)
    start = (frames // chunk_size).unsqueeze(1) * chunk_size
    seen = (frames >= start - left_chunk * chunk_size) & (frames < start + chunk_size)
    return seen.unsqueeze(0).expand(batch_size, -1, -1)


TWINS = (
    # Frames are padded to whole blocks by a branch on the remainder. A remainder from 1 to the size of a block, where
    # the last is full, pads by nothing and masks nothing: one way for both. The last block of each sound is told by a
    # slice with steps, of which Inductor cannot tell the bounds. (Granite Speech, Granite Speech Plus)
    Twin(
        "forward",
        (("", releases.GRANITE_ATTENTION),),
        edits=(
            ("num_features % self.context_size", "(num_features - 1) % self.context_size + 1"),
            (
                "pos_attn[num_blocks - 1 : pos_attn.shape[0] : num_blocks]",
                "pos_attn.unflatten(0, (bsz, num_blocks))[:, -1]",
            ),
        ),
    ),
    # Where chunks begin is made with numpy, and which frames they have by indexing with masks, both of which fix the
    # number of frames. Training draws the chunks. (Phi-4 multimodal)
    Twin(
        "_streaming_mask",
        (("", releases.PHI4_STREAMING_MASK), ("adaptive_enc_mask", releases.PHI4_ENCODER_MASK)),
        function=_chunks_seen,
        training=False,
    ),
)


@contextmanager
def sizes_together(tower: nn.Module) -> Iterator[None]:
    """Have the known methods of the modules in ``tower`` traced for all sizes."""
    given: list[tuple[nn.Module, str]] = []
    try:
        for module in tower.modules():
            for name, method in _methods(module):
                module.__dict__[name] = types.MethodType(method, module)
                given.append((module, name))
        yield
    finally:
        for module, name in given:
            module.__dict__.pop(name, None)


def _methods(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    if type(module).__module__.split(".")[0] == "torch":
        return
    for twin in TWINS:
        function = getattr(type(module), twin.method, None)
        if not isinstance(function, types.FunctionType) or twin.method in module.__dict__:
            continue
        if module.training and not twin.training:
            continue
        made = twin.made(function)
        if made is not None:
            yield twin.method, _traced(made, function)
            break


def _traced(made: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # an eager run, or another thread
            return original(self, *args, **kwargs)
        return made(self, *args, **kwargs)

    return method
