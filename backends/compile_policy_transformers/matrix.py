"""What the policy does with one architecture, measured: built tiny, run eager, run compiled, compared.

The same requests (other text lengths, batches with padding, pictures, videos and sounds of other sizes) go through the
model's forward without a cache and through its own `generate` with a dynamic and a static one, eager first and then
under the policy. Dynamo captures; the captured graph runs operator by operator, so that counts and equality are those
of the policy and not of a code generator.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel

from compile_policy.applied import apply, plan, remove, report
from compile_policy.config import CompilationConfig
from compile_policy.errors import PolicyError, first_line
from compile_policy.events import Event, listening
from compile_policy.failure import failure_of, place_in
from compile_policy.plan import Component, ComponentReport
from compile_policy.reference import relative_error
from compile_policy_transformers import compat
from compile_policy_transformers.components import answering
from compile_policy_transformers.matrix_requests import altered, prompts_of
from compile_policy_transformers.tiny import generation_inputs, tiny_model
from compile_policy_transformers.tiny import known_model_types as known_model_types
from compile_policy_transformers.tiny.overrides import FROM_TIMM
from compile_policy_transformers.tiny.videos import VIDEOS

KINDS = ("none", "dynamic", "static")
#: What is judged together: name -> roles. One tower often serves pictures and video.
_ENCODERS = {"vision": ("encoder[image]", "encoder[video]"), "audio": ("encoder[audio]",)}
NEW_TOKENS = 4
#: Of the largest logit. Eager and captured code run the same operators in float32; what is wrong is wrong by far more.
TOLERANCE = 1e-3
_OTHER_SIZES = (
    "Bring the inputs to sizes on one side of these conditions, or write that part without them, in a subclass "
    "(compile_policy.layers.override, replace_layers_)."
)


#: Text-only decoders beside the multimodal ones.
TEXT = (
    *("llama", "qwen3", "gemma2", "mistral", "phi3", "olmo2", "granite", "qwen2_moe", "mixtral", "deepseek_v3"),
    *("qwen3_next", "mamba2", "jamba", "gpt_oss", "cohere2", "bloom", "gpt2", "smollm3", "exaone4"),
)


def matrix_types() -> list[str]:
    """Every image-text-to-text, audio and omni architecture of the installed Transformers, and some text decoders."""
    multimodal = [t for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM") for t in compat.model_class_names(task)]
    known = compat.model_class_names("CAUSAL_LM")
    return sorted({*multimodal, *(t for t in TEXT if t in known)})


@dataclass(frozen=True)
class Cell:
    """What happened to one component over all requests.

    Attributes:
        state: ``ok`` (one graph per component, equal, never eager), ``graphs`` (equal, more than one), ``eager``
            (equal, some or all calls eager), ``wrong``, ``raises``, ``no reference`` (eager itself cannot run it),
            ``idle`` (never called) or ``absent`` (there is no such component).
        graphs: captures of all components of the role.
        error: largest difference to eager, relative to the largest logit.
        reason: why not ``ok``; ``remedy``: what would change that; ``place``: the model's line at fault, if one is.
    """

    state: str
    graphs: int = 0
    calls: int = 0
    eager_calls: int = 0
    error: float = 0.0
    requests: int = 0
    reason: str = ""
    remedy: str = ""
    place: str = ""


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        components: role, path and class of each component.
        decoder: kind of cache -> what happened.
        encoders: ``vision`` and ``audio`` -> what happened to these encoders with ``compile_mm_encoder``.
        control: difference that an ignored padding mask, a blank picture or video, or silence makes: the comparison
            would notice it.
        videos: requests with a video.
        stand_in: another image tower is in the place of the architecture's own, which another package has.
    """

    model_type: str
    model_cls: str = ""
    components: tuple[tuple[str, str, str], ...] = ()
    decoder: Mapping[str, Cell] | None = None
    encoders: Mapping[str, Cell] | None = None
    control: float = 0.0
    obstacle: str = ""
    videos: int = 0
    stand_in: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(model_type: str) -> Row:
    """Build ``model_type`` tiny and run all requests in every way."""
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return Row(model_type, obstacle=f"cannot be built: {first_line(error)}")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prompts = prompts_of(model)
        if not prompts:
            return Row(model_type, type(model).__name__, obstacle="no request runs eager")
        decoder = {kind: _cells(model, prompts, kind, {"decoder": ("decoder",)})["decoder"] for kind in KINDS}
        encoders = _cells(model, prompts, "none", _ENCODERS)
        components = tuple((c.role, c.qualname, c.cls) for c in _planned(model))
        return Row(
            model_type,
            type(model).__name__,
            components,
            decoder,
            encoders,
            _control(model, prompts),
            videos=sum(VIDEOS in prompt for prompt in prompts),
            stand_in=model_type in FROM_TIMM,
        )


def _planned(model: PreTrainedModel) -> Sequence[ComponentReport]:
    apply(model, CompilationConfig(backend="eager"))
    rows = report(model).components
    remove(model)
    return rows


def _cells(
    model: PreTrainedModel, prompts: Sequence[dict[str, Any]], kind: str, groups: Mapping[str, Sequence[str]]
) -> dict[str, Cell]:
    """What happened to each group of components; all run compiled at once."""
    if kind == "static":  # a model keeps the longest cache that it made: let it be the same in both passes
        _attempt(model, max(prompts, key=_tokens), kind)
    expected = [_attempt(model, prompt, kind) for prompt in prompts]
    usable = [(p, e) for p, e in zip(prompts, expected, strict=True) if not isinstance(e, Exception)]
    if not usable:
        other = _written_out(model) if kind == "static" else None
        cells = {} if other is None else _cells(other, prompts, kind, groups)
        measured = any(cell.state != "no reference" for cell in cells.values())
        return cells if measured else dict.fromkeys(groups, Cell("no reference", reason=_cause(expected[0])))
    told: list[Event] = []
    with listening(told.append):
        try:
            apply(model, CompilationConfig(backend="eager", compile_mm_encoder=groups is _ENCODERS, max_entries=64))
        except PolicyError as error:
            state = "absent" if groups is _ENCODERS else "raises"
            return dict.fromkeys(groups, Cell(state, reason=error.message, remedy=error.remedy))
        try:
            got = [_attempt(model, prompt, kind) for prompt, _ in usable]
            rows = report(model).components
            plans = {c.qualname: c for c in plan(model).components}
        finally:
            remove(model)
    wanted = [e for _, e in usable]
    return {
        name: _judged(model, got, wanted, [c for c in rows if c.role in roles], told, plans)
        for name, roles in groups.items()
    }


def _tokens(prompt: Mapping[str, Any]) -> int:
    ids: torch.Tensor = prompt["input_ids" if "input_ids" in prompt else "decoder_input_ids"]
    return ids.shape[1]


def _written_out(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same model with attention written out, as users ask for it where another kind fails; none if it is that."""
    if model.config._attn_implementation == "eager":
        return None
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def _cause(error: BaseException) -> str:
    """An exception in a sentence: what Dynamo's say is read, others say it in their first line."""
    found = failure_of(error)
    return found.cause if found.error else first_line(error)


def _place(event: Event, module: torch.nn.Module) -> str:
    """The line that a fallback is about: as it says, else that of the argument in the component's forward."""
    if "file" in event.data:
        return f"{os.path.basename(event.data['file'])}:{event.data['line']}"
    if ".py:" in event.data["reason"]:
        return ""  # the reason has it
    argument = re.search(r"\bargument (\w+)", event.data["reason"])
    return place_in(type(module).forward, argument[1] if argument else "def forward")


def _judged(
    model: torch.nn.Module,
    got: Sequence[Any],
    expected: Sequence[Any],
    rows: Sequence[ComponentReport],
    told: Sequence[Event],
    plans: Mapping[str, Component],
) -> Cell:
    """The worst that happened, and why."""
    pairs = zip(got, expected, strict=True)
    error = max((_difference(g, e) for g, e in pairs if not isinstance(g, Exception)), default=0.0)
    compiled = [c for c in rows if c.decision == "compile"]
    counts: dict[str, Any] = {
        "graphs": sum(c.graphs for c in rows),
        "calls": sum(c.calls for c in rows),
        "eager_calls": sum(c.eager_calls for c in rows),
        "error": error,
        "requests": len(got),
    }
    raised = next((g for g in got if isinstance(g, Exception)), None)
    if not rows:
        return Cell("absent")
    if raised is not None:
        return Cell("raises", **counts, reason=_cause(raised))
    if error > TOLERANCE:
        return Cell("wrong", **counts)
    if not compiled:
        planned = plans[rows[0].qualname]
        return Cell("eager", **counts, reason=planned.reason, remedy=planned.remedy)
    for event in told:
        names = {f"{c.role} {c.qualname}".strip(): c.qualname for c in compiled}
        if event.kind == "fallback" and event.component in names:
            place = _place(event, model.get_submodule(names[event.component]))
            return Cell("eager", **counts, reason=event.data["reason"], remedy=event.data["remedy"], place=place)
    if counts["eager_calls"]:
        return Cell("eager", **counts, reason=next((c.fallback for c in compiled if c.fallback), ""))
    if counts["calls"] == 0:
        return Cell("idle", **counts, reason="no request of the measurement reaches it")
    if all(c.graphs <= 1 for c in compiled):
        return Cell("ok", **counts)
    reasons = [e.data["difference"] for e in told if e.kind == "new_entry"]
    sized = bool(reasons) and reasons[0].startswith("sizes: ")
    return Cell("graphs", **counts, reason=reasons[0] if reasons else "", remedy=_OTHER_SIZES if sized else "")


def _attempt(model: PreTrainedModel, prompt: dict[str, Any], kind: str, counts: Any = None) -> Any:
    """Logits of a request where ``counts``, or its own mask, says that there is no padding; or what was raised."""
    torch.manual_seed(0)
    part: Any = answering(model)
    model = part
    try:
        if kind == "none":
            accepts = "use_cache" in inspect.signature(model.forward).parameters
            logits = model(**prompt, **({"use_cache": False} if accepts else {})).logits
            return [_without_padding(logits, prompt.get("attention_mask") if counts is None else counts)]
        options: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}
        generate: Any = model.generate
        noted = _Noted()
        if not isinstance(model, GenerationMixin):  # it generates by diffusion, and returns no logits
            options |= {"logits_processor": LogitsProcessorList([noted]), "max_denoising_steps": NEW_TOKENS}
            options |= {"disable_compile": True}
        out = generate(
            **generation_inputs(model, prompt, NEW_TOKENS),
            **options,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return noted.logits or list(out.logits)
    except Exception as error:
        return error


class _Noted:
    """A logits processor that changes nothing."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(scores.clone())
        return scores


def _without_padding(logits: torch.Tensor, mask: Any) -> torch.Tensor:
    """The positions that somebody reads."""
    counts = isinstance(mask, torch.Tensor) and mask.shape == logits.shape[:2]
    return logits[mask.bool()] if counts else logits


def _difference(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    if len(got) != len(expected):
        return float("inf")
    return max(relative_error(_allowed(g), _allowed(e)) for g, e in zip(got, expected, strict=True))


def _allowed(logits: torch.Tensor) -> torch.Tensor:
    """Logits without those of tokens that the model forbids: beside the lowest float, nothing else would count."""
    return logits.masked_fill(logits <= torch.finfo(logits.dtype).min / 2, 0.0)


def _control(model: PreTrainedModel, prompts: Sequence[dict[str, Any]]) -> float:
    """The change that ignoring padding, blank pictures or silence makes to the logits: the largest one, of what
    changes least."""
    worst: dict[str, float] = {}
    for prompt in prompts:
        expected = _attempt(model, prompt, "none")
        for other in altered(prompt):
            what = next(name for name, value in other.items() if value is not prompt[name])
            got = _attempt(model, other, "none", counts=prompt.get("attention_mask"))
            if not isinstance(got, Exception) and not isinstance(expected, Exception):
                worst[what] = max(worst.get(what, 0.0), _difference(got, expected))
    return min(worst.values(), default=0.0)
