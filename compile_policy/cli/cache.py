"""``compile-policy cache``: what compiled code is kept on disk, whether it is sound, and how it travels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compile_policy.artifacts import ArtifactKey, Miss, Store
from compile_policy.artifacts.doctor import examine
from compile_policy.artifacts.locations import find_store
from compile_policy.artifacts.manifest import Manifest
from compile_policy.artifacts.parsing import load_json
from compile_policy.artifacts.secret import read_secret
from compile_policy.artifacts.upkeep import clear, collect
from compile_policy.cli.cache_tables import parse_size, print_artifacts, print_differences, print_examination, size_text
from compile_policy.cli.session import Session
from compile_policy.errors import CacheError, InputError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
KeyFile = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Key of the signature; else the cache's.")]

app = typer.Typer(help="Compiled code that is kept on disk.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Compiled code that is kept on disk."""


@app.command("ls")
def ls(context: typer.Context, as_json: AsJson = False) -> int:
    """List artifacts: what they are of, size, age, signature. The last used come first."""
    session: Session = context.obj
    store = _store(session)
    stored = sorted(store.folders.artifacts(), key=lambda entry: -entry.used)
    rows = [_row(entry) for entry in stored]
    if as_json:
        print(json.dumps({"root": str(store.root), "limit_bytes": store.limit_bytes, "artifacts": rows}))
    else:
        print_artifacts(session.terminal.out, rows, store)
    return 0


def _row(entry: Any) -> dict[str, Any]:
    row = {"digest": entry.digest, "bytes": entry.size, "used": entry.used, "signed": entry.signed}
    if isinstance(entry.manifest, Manifest):
        manifest = entry.manifest
        return {**row, "files": len(manifest.files), "meta": manifest.meta, "factors": manifest.key.factors}
    return {**row, "damaged": entry.manifest.detail if entry.manifest else "no manifest"}


@app.command("doctor")
def doctor(context: typer.Context, as_json: AsJson = False) -> int:
    """Verify every artifact and the directory itself; say what is wrong and how to repair it. 1 when something is."""
    session: Session = context.obj
    store = _store(session)
    with _disk(store):
        found = examine(store, os.getuid(), shared=_key_file(session) is not None)
    if as_json:
        print(json.dumps({"root": str(store.root), "healthy": found.healthy, **asdict(found)}))
    else:
        print_examination(session.terminal.out, found, store)
    return 0 if found.healthy else 1


@app.command("gc")
def gc(
    context: typer.Context,
    limit: Annotated[str | None, typer.Option(metavar="SIZE", help="Such as 500MB or 2GiB; else cache_limit.")] = None,
) -> int:
    """Remove what is damaged, half written or set aside, and the least recently used artifacts beyond the limit."""
    session: Session = context.obj
    most = None if limit is None else parse_size(limit)
    store = _store(session)
    with _disk(store):
        gone = collect(store, most)
    said = f"removed {_count(gone.artifacts, 'artifact')} ({size_text(gone.size)})"
    rest = [(gone.damaged, "damaged"), (gone.leftovers, "half written"), (gone.quarantined, "set aside")]
    said += "".join(f", {number} {what}" for number, what in rest if number)
    left = store.folders.artifacts(manifests=False)
    kept = f"{_count(len(left), 'artifact')} left, {size_text(sum(entry.size for entry in left))}"
    session.terminal.out.print(f"{said}; {kept}")
    return 0


@app.command("clear")
def clear_all(
    context: typer.Context, yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False
) -> int:
    """Remove all artifacts."""
    session: Session = context.obj
    store = _store(session)
    stored = store.folders.artifacts(manifests=False)
    if stored and not yes:
        if not session.terminal.err.is_terminal or not os.isatty(0):
            raise InputError("clear asks before it removes anything.", remedy="Add --yes.")
        size = size_text(sum(entry.size for entry in stored))
        typer.confirm(f"Remove {_count(len(stored), 'artifact')} ({size}) in {store.root}?", abort=True, err=True)
    with _disk(store):
        gone = clear(store)
    busy = f"; {gone.busy} being made by other processes stay" if gone.busy else ""
    session.terminal.out.print(f"removed {_count(gone.artifacts, 'artifact')} ({size_text(gone.size)}){busy}")
    return 0


@app.command("export")
def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The bundle to write: a tar file.")],
    artifacts: Annotated[
        list[str] | None, typer.Argument(metavar="[ARTIFACT]...", help="Digests, or how they begin; else all.")
    ] = None,
    key: KeyFile = None,
) -> int:
    """Write artifacts into one file, signed, for an image or another machine."""
    from compile_policy.artifacts.bundle import export_bundle  # imports tarfile

    session: Session = context.obj
    if file.exists():
        raise InputError(f"{file} exists.", remedy="Name a new file.")
    store = _store(session)
    secret = read_secret(key, os.getuid()) if key else store.secret
    digests = _chosen(store, artifacts or [])
    left_out = export_bundle(store, file, digests, secret=secret)
    for miss in left_out:
        session.terminal.warn(f"one artifact is left out: {miss.detail}")
    signed = "signed" if secret else "not signed"
    said = f"{_count(len(digests) - len(left_out), 'artifact')} in {file}, {size_text(file.stat().st_size)}, {signed}"
    session.terminal.out.print(said)
    return 0


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.")],
    trust: Annotated[
        bool, typer.Option("--trust", help="Take it without a good signature. What is in it is code.")
    ] = False,
    key: KeyFile = None,
) -> int:
    """Verify a bundle as a whole and add its artifacts; one without a good signature is refused."""
    from compile_policy.artifacts.bundle import import_bundle  # imports tarfile

    session: Session = context.obj
    store = _store(session)
    secret = read_secret(key, os.getuid()) if key else store.secret
    done = import_bundle(store, file, secret=secret, trust=trust)
    present = f", {len(done.present)} were there already" if done.present else ""
    how = "signed" if done.signed else "trusted without a good signature"
    session.terminal.out.print(f"added {_count(len(done.added), 'artifact')}{present}; {how}")
    return 0


@app.command("why-miss")
def why_miss(
    context: typer.Context,
    wanted: Annotated[
        str, typer.Argument(metavar="WHAT", help="A model, how a digest begins, or a JSON file with a key's factors.")
    ],
    as_json: AsJson = False,
) -> int:
    """Say what is not in the store for a model, and which factors differ; or tell an artifact from its neighbour.

    After a run that compiled although there was an artifact, name the new one. A file asks for a key that isn't stored.
    """
    if Path(wanted).is_dir() or not re.fullmatch(r"[0-9a-f]*|.*\.json", wanted):
        from compile_policy.cli.warmup import warmup  # imports rich.progress and Pillow

        return warmup(context, wanted, check=True, as_json=as_json)
    session: Session = context.obj
    store = _store(session)
    path = Path(wanted)
    file = path.suffix == ".json" or path.exists()
    key = _key_in(path) if file else _key_of(store, wanted)
    hit = file and store.folders.of(key.digest).is_dir()
    rows = [] if hit else store.why_miss(key.factors, others=not file)
    if as_json:
        print(json.dumps({"digest": key.digest, "hit": hit, "differences": [row._asdict() for row in rows]}))
    elif hit:
        session.terminal.out.print(f"it is no miss: {key.digest[:12]} is stored")
    elif not rows:
        session.terminal.out.print("there is no other artifact to compare with")
    else:
        print_differences(session.terminal.out, rows)
    return 0


def _key_in(path: Path) -> ArtifactKey:
    """The key that a JSON file describes."""
    try:
        return ArtifactKey(load_json(path.read_bytes()))
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror or error}."
        raise InputError(
            problem, remedy="Name a JSON file with the factors of a key; cache ls --json has some."
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: {error}.", remedy="It should be one JSON object of factors.") from None


def _key_of(store: Store, beginning: str) -> ArtifactKey:
    """The key of a stored artifact."""
    (digest,) = _chosen(store, [beginning])
    found = store.check(digest)
    if isinstance(found, Miss):
        raise InputError(f"{digest[:12]} cannot be used: {found.detail}.", remedy="Run compile-policy cache doctor.")
    return found[0].key


def _store(session: Session) -> Store:
    config = session.config()
    if config.cache_dir is False:
        raise CacheError("the cache is turned off (cache_dir is false).", remedy="Name a directory, or leave it unset.")
    return find_store(config.cache_dir, key_file=config.cache_key_file, limit_bytes=config.cache_limit)


def _key_file(session: Session) -> Path | None:
    return session.config().cache_key_file


@contextmanager
def _disk(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or store.root}: {error.strerror or error}."
        raise CacheError(problem, remedy="Run it as the user whose cache it is.") from error


def _chosen(store: Store, beginnings: Sequence[str]) -> list[str]:
    digests = [entry.digest for entry in store.folders.artifacts(manifests=False)]
    chosen: list[str] = []
    for beginning in beginnings:
        found = [digest for digest in digests if digest.startswith(beginning.lower())]
        if len(found) != 1:
            number = "no artifact begins" if not found else f"{len(found)} artifacts begin"
            raise InputError(f"{number} with {beginning!r}.", remedy="Run compile-policy cache ls.")
        chosen += found
    return list(dict.fromkeys(chosen)) or digests


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
