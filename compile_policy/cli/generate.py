"""``compile-policy generate``: load a model under the policy, ask it something, say what happened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import compile_policy
from compile_policy.cli.inputs import Picture, Question, check_model, encode, open_picture, question_for
from compile_policy.cli.plan import Model
from compile_policy.cli.progress import progress
from compile_policy.cli.recording import Events, TimeLine, events_to, trace_to
from compile_policy.cli.session import TINY, Session, loading
from compile_policy.cli.streaming import AnswerStreamer, Decode
from compile_policy.cli.tables import Row, print_compiled, print_report
from compile_policy.errors import InputError

if TYPE_CHECKING:
    from compile_policy.config import CompilationConfig

_TINY_TEXT_LEN = 8
_TINY_IMAGE = (64, 96)


def generate(
    context: typer.Context,
    model: Model = None,
    image: Annotated[list[str] | None, typer.Option("--image", metavar="P", help="A picture; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="T", help="What to ask.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="At most this many.")
    ] = 32,
    verify: Annotated[bool, typer.Option("--verify", help="Run eager beside it; exit with 1 if unequal.")] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 1 if a component that is to be compiled ran eager."),
    ] = False,
    dump_graphs: Annotated[
        str | None, typer.Option("--dump-graphs", metavar="DIR", help="Write the graphs here.")
    ] = None,
    events: Events = None,
    trace: TimeLine = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Load a model under the policy, ask it something, and say what was compiled."""
    session: Session = context.obj
    config = session.config()
    if dump_graphs is not None:
        config = config.replace(debug_dump_path=os.path.expanduser(dump_graphs))
    check_model(model)
    pictures = [open_picture(path) for path in image or []]
    backend = session.backend()
    with events_to(events), progress(session.terminal, debug=session.debug):
        run = _prepare(session, backend, model, config, _question(backend, model, pictures, prompt))
        with trace_to(trace, run.model):
            answer = run.answer(max_new_tokens, None if as_json else session.terminal.stream)
        session.terminal.close_line()
        rows = compile_policy.report(run.model).to_dict()["components"]
        equal = run.equals_eager(max_new_tokens, answer) if verify else None
    text = run.text(answer)
    if as_json:
        print(json.dumps({"text": text, "components": rows, "equal_to_eager": equal}))
    else:
        _show(session, config, rows, equal, counted=verify or strict)
    return 1 if equal is False or (strict and not all_compiled(rows)) else 0


def all_compiled(rows: Sequence[Row]) -> bool:
    """Whether something is to be compiled, every call of it was, and the decoder had one.

    A tower that a question does not need is never called; a decoder that is not, is called past the policy.
    """
    wanted = [row for row in rows if row["decision"] == "compile"]
    idle = [row for row in wanted if row["state"] == "idle" and row["role"] == "decoder"]
    return bool(wanted) and not idle and all(row["state"] != "fell back" for row in wanted)


@dataclass(frozen=True)
class Run:
    """A loaded model, its inputs, and how its ids become text."""

    model: Any
    inputs: dict[str, Any]
    decode: Decode
    text_of: Callable[[list[int]], str]

    def answer(self, max_new_tokens: int, write: Callable[[str], None] | None) -> list[int]:
        """Greedy tokens; streamed through ``write`` while they are made."""
        streamer = None if write is None else AnswerStreamer(self.decode, write)
        out = self.model.generate(**self.inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        prompt = 0 if self.model.config.is_encoder_decoder else self.inputs["input_ids"].shape[1]
        ids: list[int] = out[0, prompt:].tolist()
        return ids

    def equals_eager(self, max_new_tokens: int, answer: list[int]) -> bool:
        """Whether the same call gives the same tokens with every region eager."""
        with compile_policy.eager(self.model):
            return self.answer(max_new_tokens, None) == answer

    def text(self, ids: list[int]) -> str:
        return self.text_of(ids)


def _question(backend: Any, name: str | None, pictures: list[Picture], prompt: str | None) -> Question:
    """What to ask.

    Raises:
        InputError: there is nothing to ask, or a model without a tokenizer is asked something. Where the model cannot
            be found, that is the error.
    """
    tiny = name is not None and name.startswith(TINY)
    if tiny and prompt is not None:
        problem = f"{name} has random weights and no tokenizer, so it cannot read a prompt."
        raise InputError(problem, remedy="Leave --prompt out: its input is random ids.")
    if name is not None and not (tiny or pictures or prompt):
        with loading(name):
            backend.config_of(name)
    return question_for(name, pictures, prompt, backend.EMBEDDED)


def _prepare(session: Session, backend: Any, name: str | None, config: CompilationConfig, question: Question) -> Run:
    with loading(name):
        model = compile_policy.load_model(name, config=config)
    if name is not None and name.startswith(TINY):
        inputs = _tiny_inputs(backend, model, question)
        _say(session, name, question, f"{inputs['input_ids'].shape[1]} random ids; the weights are random too")
        return Run(model, inputs, lambda ids: " ".join(map(str, ids)), str)
    with loading(name):
        processor = backend.load_processor(name)
    _say(session, name or "embedded", question, question.prompt)
    tokenizer = getattr(processor, "tokenizer", processor)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return Run(model, encode(processor, question), decode, decode)


def _tiny_inputs(backend: Any, model: Any, question: Question) -> dict[str, Any]:
    """Random text, with pictures as large as the ones given; one picture anyway where the model can see."""
    sees = any(c.role == "encoder[image]" for c in compile_policy.report(model).components)
    if question.pictures and not sees:
        raise InputError("this model takes no pictures.", remedy="Leave --image out, or name a vision-language model.")
    sizes = [(image.height, image.width) for _, image in question.pictures] or [_TINY_IMAGE] * sees
    inputs: dict[str, Any] = backend.tiny_inputs(model, text_len=_TINY_TEXT_LEN, images=sizes)
    return inputs


def _say(session: Session, name: str, question: Question, prompt: str) -> None:
    """What is about to happen, before the first compile makes the user wait."""
    session.terminal.note(f"model   {name}", style="dim")
    for file, picture in question.pictures:
        session.terminal.note(f"image   {file} ({picture.width} x {picture.height})", style="dim")
    session.terminal.note(f"prompt  {prompt}", style="dim")


def _show(
    session: Session, config: CompilationConfig, rows: Sequence[Row], equal: bool | None, *, counted: bool
) -> None:
    out = session.terminal.out
    out.print()
    print_report(out, rows)
    if counted:
        out.print()
        print_compiled(out, rows)
    if equal is not None:
        out.print(f"equal to eager: {'yes' if equal else 'no'}", style="bold green" if equal else "bold red")
    dumped = config.debug_dump_path
    if dumped is not None and Path(dumped).is_dir():
        session.terminal.note(f"graphs are in {dumped}")
