"""The plan of a model: which component is compiled, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from compile_policy.caller import warn_user
from compile_policy.config import CompilationConfig
from compile_policy.errors import UnsupportedModelError
from compile_policy.layers.registry import layer_notes
from compile_policy.plan import Component, Decision, Plan

from . import attention, compat
from .base import find_components
from .components import Found
from .forward_parts import parts_of
from .stacks import stacks_of

TEXT_ENCODER = "encoder[text]"
AUTO_COMPILE_NOTE = "generate()'s own auto-compile of the whole model is turned off while the policy is applied."
ENCODER_FLAG = "--compile-mm-encoder (compile_mm_encoder=True)"
EXPERIMENTAL = (
    "Encoder compilation is experimental: it is meant for inference, without gradients, and with the 'sdpa' or 'eager' "
    "attention implementation; an encoder that cannot be captured as one graph runs eager, and the report says why. "
    "Leave out --compile-mm-encoder (compile_mm_encoder=False) to keep encoders eager."
)

# These recompute their frequencies from the longest position of the call and keep them on the module.
_DYNAMIC_ROPE = {"dynamic", "longrope"}
_HOLDS_MORE = "Move it into the model around the decoder and hand its result in as an argument, in subclasses of both."


@dataclass(frozen=True)
class Obstacle:
    """Why something runs eager, and what would change that."""

    reason: str
    remedy: str


def make_plan(model: nn.Module, config: CompilationConfig) -> Plan:
    """Decide for every component of ``model``: the decoder is compiled, the head never, encoders when asked.

    What stands in the way of a wish is told by one `PolicyWarning` each, and the component runs eager.

    Raises:
        UnsupportedModelError: ``compile_mm_encoder`` is set and the model has no separate encoder.
    """
    found = find_components(model)
    off = _switched_off(config)
    if off is not None:
        return _plan(model, [_component(f, *_eager(f, off)) for f in found])
    if config.compile_mm_encoder and not any(_is_encoder(f) for f in found):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no separate image, video or audio encoder to compile.",
            remedy="Leave out --compile-mm-encoder (compile_mm_encoder=False) for this model.",
        )
    obstacle = _whole_model_obstacle(model, found, config)
    if obstacle is not None:
        _warn(type(model).__name__, obstacle)
        return _plan(model, [_component(f, *_eager(f, obstacle)) for f in found])
    components = [row for f in found for row in _rows(f, config)]
    if any(c.role.startswith("encoder") and c.decision == "compile" for c in components):
        warn_user(EXPERIMENTAL)
    return _plan(model, components)


def _plan(model: nn.Module, components: list[Component]) -> Plan:
    compiled = any(c.decision == "compile" for c in components)
    notes = (AUTO_COMPILE_NOTE,) if compiled else ()
    return Plan(type(model).__name__, tuple(components), notes + layer_notes())


def _component(found: Found, decision: Decision, reason: str, remedy: str) -> Component:
    return Component(found.role, found.qualname, type(found.module).__name__, decision, reason, remedy)


def _rows(found: Found, config: CompilationConfig) -> list[Component]:
    """The component, and after it the stacks of layers that are compiled in its place."""
    stacks = stacks_of(found.module) if _is_encoder(found) and config.compile_mm_encoder else []
    if not stacks:
        return [_component(found, *_decide(found, config))]
    reason = "it reads the sizes of its pictures in Python; its layers, which see none of that, are compiled instead"
    inside = [replace(found, qualname=f"{found.qualname}.{path}", module=module) for path, module in stacks]
    return [_component(found, "eager", reason, ""), *(_component(f, *_decide(f, config)) for f in inside)]


def _is_encoder(found: Found) -> bool:
    """Whether it encodes pictures, videos or sound: what ``compile_mm_encoder`` is about."""
    return found.role.startswith("encoder") and found.role != TEXT_ENCODER


def _eager(found: Found, obstacle: Obstacle) -> tuple[Decision, str, str]:
    if found.role in ("head", "projector"):
        return _fixed(found)
    return "eager", obstacle.reason, obstacle.remedy


_BY_SDPA = "; its attention 'eager' is computed by SDPA, which is equal up to rounding"


def _chose_eager(decoder: nn.Module) -> bool:
    """Whether the user chose attention that is written out, where Transformers alone would take SDPA."""
    return bool(getattr(decoder, "_supports_sdpa", False)) and attention.is_eager(decoder)


def _decide(found: Found, config: CompilationConfig) -> tuple[Decision, str, str]:
    if found.role == "decoder":
        obstacle = _decoder_obstacle(found)
        if obstacle is None:
            alone = "" if parts_of(found.module) is None else "; its layers alone, since it calls a model before them"
            by_sdpa = _BY_SDPA if _chose_eager(found.module) else ""
            return "compile", f"the language decoder is always compiled{_level(config)}{alone}{by_sdpa}", ""
        _warn(f"decoder {found.qualname}".strip(), obstacle)
        return "eager", obstacle.reason, obstacle.remedy
    if _is_encoder(found):
        if config.compile_mm_encoder:
            return (
                "compile",
                f"{' and '.join(_ordered(found))} encoder, compiled because compile_mm_encoder is set{_level(config)}",
                "",
            )
        return "eager", "encoders are compiled only when asked", f"Set {ENCODER_FLAG} to compile it."
    if found.role == TEXT_ENCODER:
        cls = type(found.module).__name__
        remedy = f"Decorate its class ({cls}) with support_torch_compile to have it compiled."
        return "eager", "a text encoder: it looks both ways and is no language decoder", remedy
    return _fixed(found)


def _level(config: CompilationConfig) -> str:
    return "; at -O1 its repeated blocks alone" if config.mode == 1 else ""


def _ordered(found: Found) -> list[str]:
    return [m for m in ("image", "video", "audio") if m in found.modalities]


def _fixed(found: Found) -> tuple[Decision, str, str]:
    if found.role == "head":
        return "skip", "never compiled: one matrix product, whose width follows the vocabulary", ""
    return "eager", "small or rarely called beside the decoder, so a graph would not pay", ""


def _switched_off(config: CompilationConfig) -> Obstacle | None:
    if not config.enabled:
        return Obstacle("switched off: enabled is False", "Set enabled=True to compile.")
    if config.mode == 0:
        return Obstacle(
            "switched off: mode 0 (-O0) runs everything eager", "Choose -O1 to -O3 (mode=1 to 3) to compile."
        )
    return None


def _without_decoder(found: list[Found]) -> Obstacle:
    """Why nothing of a model without a language decoder is compiled, and what would change that."""
    text = next((f for f in found if f.role == TEXT_ENCODER), None)
    decorate = f"Decorate its class ({type(text.module).__name__ if text else 'of the part to compile'})"
    decorate += " with support_torch_compile to have it compiled."
    if any(_is_encoder(f) for f in found):
        return Obstacle("it has encoders and no language decoder", f"Set {ENCODER_FLAG} to compile them.")
    if text is not None:
        return Obstacle("it encodes text and continues none, so that there is no language decoder in it", decorate)
    return Obstacle("unsupported model: no language decoder was found in it", decorate)


def _whole_model_obstacle(model: nn.Module, found: list[Found], config: CompilationConfig) -> Obstacle | None:
    """The first reason why nothing of this model can be compiled."""
    return next(_whole_model_obstacles(model, found, config), None)


def _whole_model_obstacles(model: nn.Module, found: list[Found], config: CompilationConfig) -> Iterator[Obstacle]:
    if not any(f.role == "decoder" or (_is_encoder(f) and config.compile_mm_encoder) for f in found):
        yield _without_decoder(found)
    if _is_offloaded(model):
        yield Obstacle(
            "weights are offloaded, and their hooks cannot be part of a graph",
            "Load the model on one device, or quantized, so that it fits without offloading.",
        )
    quantizer = compat.quantizer(model)
    if quantizer is not None and not quantizer.is_compileable:
        yield Obstacle(
            f"the quantizer {type(quantizer).__name__} says that its modules cannot be compiled",
            "Choose a quantization whose quantizer is compileable, or run without quantization.",
        )


def _is_offloaded(model: nn.Module) -> bool:
    if next(compat.offload_hooks(model), None) is not None:
        return True
    places = {str(place) for place in compat.device_map(model).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        return True
    on_meta = [p.is_meta for p in model.parameters()]
    return any(on_meta) and not all(on_meta)  # all of them: a model without memory, made to be planned


def _decoder_obstacle(found: Found) -> Obstacle | None:
    if found.obstacle:
        return Obstacle(found.obstacle, _HOLDS_MORE)
    dynamic = sorted(compat.rope_types(found.module) & _DYNAMIC_ROPE)
    if dynamic:
        return Obstacle(
            f"its rotary embedding ({dynamic[0]!r}) depends on the longest position of each call",
            "Use a rope_type that does not (default, linear, yarn, llama3), where the checkpoint allows it.",
        )
    return None


def _warn(what: str, obstacle: Obstacle) -> None:
    warn_user(f"{what} runs eager: {obstacle.reason}. {obstacle.remedy}")
