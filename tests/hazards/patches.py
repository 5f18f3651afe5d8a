"""Classes, functions and globals that code reads: replaced while a model is compiled."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .case import Case, Hazard, bending, chunk, forward


def _module(case: Case) -> Any:
    """The Python module in which the decoder is written."""
    return sys.modules[type(case.decoder).__module__]


def _replace(owner: Any, name: str, wrap: Any) -> None:
    """Put ``wrap(original)`` in the place of ``owner.name``."""
    setattr(owner, name, wrap(getattr(owner, name)))


def _forward_of_a_class(case: Case) -> None:
    _replace(type(case.layer.mlp), "forward", bending)


def _code_of_a_method(case: Case) -> None:
    """The function stays, its code is exchanged, as reloaders and some patchers do."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x))

    type(case.layer.mlp).forward.__code__ = forward.__code__


def _defaults(case: Case) -> None:
    """The default of a parameter that nobody passes."""
    mlp = case.layer.mlp
    cls = type("Scaled", (type(mlp),), {"forward": _with_default})
    mlp.__class__ = cls
    case.kept["function"] = cls.forward
    chunk(case)


def _with_default(self: Any, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return type(self).__mro__[1].forward(self, x) + scale  # type: ignore[attr-defined]


def _class_number(case: Case) -> None:
    """A number on the class, whole or not, that its forward reads."""
    chunk(case)
    mlp = case.layer.mlp
    mlp.__class__ = type("Scaled", (type(mlp),), {"whole": 1, "part": 1.0, "forward": _with_class_numbers})


def _with_class_numbers(self: Any, x: torch.Tensor) -> torch.Tensor:
    return type(self).__mro__[1].forward(self, x) + self.whole + self.part  # type: ignore[attr-defined]


def _other_class(case: Case) -> None:
    mlp = case.layer.mlp
    mlp.__class__ = type("Bent", (type(mlp),), {"forward": bending(type(mlp).forward)})


SCALE = 1.0
TABLE = {"scale": 1.0}


def _reading_a_global(case: Case) -> None:
    chunk(case)
    mlp = case.layer.mlp
    mlp.__class__ = type("Scaled", (type(mlp),), {"forward": _with_globals})


def _with_globals(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _helped(type(self).__mro__[1].forward(self, x) + SCALE + TABLE["scale"])  # type: ignore[attr-defined]


def _helped(x: torch.Tensor) -> torch.Tensor:
    return x


def _set_global(name: str, value: Any) -> Any:
    return lambda case: setattr(sys.modules[__name__], name, value)


def _closure(case: Case) -> None:
    """A forward made by a factory, reading a variable of it."""
    chunk(case)
    strength = 1.0

    def stronger(value: float) -> None:
        nonlocal strength
        strength = value

    original = type(case.layer.mlp).forward
    mlp = case.layer.mlp
    mlp.__class__ = type("Closed", (type(mlp),), {"forward": lambda self, x: original(self, x) + strength})
    case.kept["stronger"] = stronger


def _property(case: Case) -> None:
    chunk(case)
    mlp = case.layer.mlp
    original = type(mlp).forward
    members = {"gain": property(lambda self: 1.0), "forward": lambda self, x: original(self, x) + self.gain}
    mlp.__class__ = type("WithProperty", (type(mlp),), members)


def _own_attention(case: Case) -> None:
    """The implementation in use is registered anew."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = bending(ALL_ATTENTION_FUNCTIONS["sdpa"])


def _torch_function(case: Case) -> None:
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *a, **k: original(*a, **k) + 1
    torch.nn.functional.scaled_dot_product_attention = F.scaled_dot_product_attention


HAZARDS = [
    Hazard("forward of a class", "A class's `forward` is replaced.", _forward_of_a_class, chunk, forward, ("forward",)),
    Hazard("code of a method", "A method's `__code__` is replaced.", _code_of_a_method, chunk, forward, ("forward",)),
    Hazard(
        "default of a parameter",
        "A method's `__defaults__` are replaced.",
        lambda c: setattr(c.kept["function"], "__defaults__", (3.0,)),
        _defaults,
        forward,
        ("forward",),
    ),
    Hazard(
        "class of an instance",
        "`__class__` of a module is another one.",
        _other_class,
        chunk,
        forward,
        ("class", "Bent"),
    ),
    Hazard(
        "number of a class",
        "A floating-point attribute of a class.",
        lambda c: setattr(type(c.layer.mlp), "part", 3.0),
        _class_number,
        forward,
        ("part", "1.0", "3.0"),
    ),
    Hazard(
        "whole number of a class",
        "An integer attribute of a class.",
        lambda c: setattr(type(c.layer.mlp), "whole", 3),
        _class_number,
        forward,
        ("whole", "1", "3"),
    ),
    Hazard(
        "property of a class",
        "A property gives another value.",
        lambda c: setattr(type(c.layer.mlp), "gain", property(lambda self: 3.0)),
        _property,
        forward,
        ("gain",),
    ),
    Hazard(
        "global number",
        "A number of the module that a forward reads.",
        _set_global("SCALE", 3.0),
        _reading_a_global,
        forward,
        ("SCALE", "1.0", "3.0"),
    ),
    Hazard(
        "global table",
        "An entry of a global dict that a forward reads.",
        lambda c: TABLE.update(scale=3.0),
        _reading_a_global,
        forward,
        ("TABLE", "1.0", "3.0"),
    ),
    Hazard(
        "helper of one's own",
        "A global function that a forward calls is replaced.",
        _set_global("_helped", torch.tanh),
        _reading_a_global,
        forward,
        ("_helped",),
    ),
    Hazard(
        "closure variable",
        "A variable of the factory that made a forward.",
        lambda c: c.kept["stronger"](3.0),
        _closure,
        forward,
    ),
    Hazard(
        "rotary helper",
        "`apply_rotary_pos_emb` or its like in the model's module is replaced.",
        lambda c: _replace(_module(c), "rotate_half", bending),
        chunk,
        forward,
        ("rotate_half",),
    ),
    Hazard("attention registered anew", "The function behind `sdpa` is another one.", _own_attention, chunk, forward),
    Hazard(
        "function of torch",
        "`torch.nn.functional.scaled_dot_product_attention` is patched.",
        _torch_function,
        chunk,
        forward,
    ),
    Hazard(
        "linear patched",
        "`torch.nn.Linear.forward` is patched.",
        lambda c: _replace(torch.nn.Linear, "forward", bending),
        chunk,
        forward,
        ("forward",),
    ),
]
