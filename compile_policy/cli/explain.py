"""``compile-policy explain``: why each component is compiled or not, and what would make another graph."""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import compile_policy
from compile_policy.cli.explain_tables import print_explanation
from compile_policy.cli.inputs import check_model
from compile_policy.cli.plan import Model
from compile_policy.cli.progress import progress
from compile_policy.cli.recording import Events, TimeLine, events_to, trace_to
from compile_policy.cli.session import Session, loading
from compile_policy.errors import InputError, PolicyWarning
from compile_policy.events import Event, listening

if TYPE_CHECKING:
    from compile_policy.config import CompilationConfig
    from compile_policy.explain import Explanation

_TEXT_LEN = 8
_IMAGE = (64, 96)


def explain(
    context: typer.Context,
    model: Model = None,
    run: Annotated[
        bool, typer.Option("--run", help="Load it, generate a few tokens from made-up inputs, and explain that.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="With --run: at most this many.")
    ] = 4,
    events: Events = None,
    trace: TimeLine = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Say why each component is compiled or not, which dims vary, and what would need another graph.

    Nothing is loaded but the model's configuration; with --run the model is, and what happened is told.
    """
    session: Session = context.obj
    config = session.config()
    check_model(model)
    for flag, file in (("--events", events), ("--trace", trace)):
        if file is not None and not run:
            raise InputError(f"{flag} has nothing to write without --run.", remedy="Add --run.")
    backend = session.backend()
    heard: list[Event] = []
    with ExitStack() as stack:
        if run:
            stack.enter_context(progress(session.terminal, debug=session.debug))
        else:  # what a plan warns of is what is explained
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", PolicyWarning)
        stack.enter_context(events_to(events))
        stack.enter_context(listening(heard.append))
        found = _run(backend, model, config, max_new_tokens, trace) if run else _without_running(model, config)
    if as_json:
        print(json.dumps({**found.to_dict(), "events": [asdict(event) for event in heard]}))
    else:
        print_explanation(session.terminal.out, found, heard)
    return 0


def _without_running(name: str | None, config: CompilationConfig) -> Explanation:
    from compile_policy.explain import explain as explain_model  # imports torch

    with loading(name):
        return explain_model(name, config=config)


def _run(
    backend: Any, name: str | None, config: CompilationConfig, max_new_tokens: int, trace: Path | None
) -> Explanation:
    from compile_policy.explain import explain as explain_model  # imports torch

    with loading(name):
        model = compile_policy.load_model(name, config=config)
        sees = any(c.role == "encoder[image]" for c in compile_policy.report(model).components)
        inputs = backend.tiny_inputs(model, text_len=_TEXT_LEN, images=[_IMAGE] * sees)
    with trace_to(trace, model):
        model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return explain_model(model)
