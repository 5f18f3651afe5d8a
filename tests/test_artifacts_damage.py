"""A damaged, swapped or forged artifact is a miss with its reason, is set aside, and is made again."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compile_policy.artifacts import Artifact, ArtifactKey, Miss, Store, reading
from compile_policy.artifacts.manifest import MANIFEST, MANIFEST_BYTES, SIGNATURE, Manifest

KEY = ArtifactKey({"torch": "2.13.0", "config": {"hidden_size": 4}})
SECRET, OTHER = b"s" * 32, b"o" * 32
FILES = {"graph.so": bytes(range(256)) * 16, "blocks/0.pt2": b"package", "spine.py": b"print('kernel')", "empty": b""}
META = {"component": "decoder", "graphs": 1}


@pytest.fixture(params=[None, SECRET], ids=["unsigned", "signed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """With one good artifact."""
    store = Store(tmp_path / "cache", secret=request.param)
    assert store.save(KEY, FILES, META)
    return store


def place(store: Store, name: str = "") -> Path:
    return store.folders.of(KEY.digest) / name.replace("/", "~")


def reason(store: Store) -> str:
    """The miss of the next load; after it the artifact is set aside, and a new one heals the cache."""
    found = store.load(KEY)
    assert isinstance(found, Miss), found
    assert store.load(KEY) == Miss("absent", "there is no artifact of this key")
    assert any(f".{found.reason}." in path.name for path in store.folders.quarantined.iterdir())
    assert store.save(KEY, FILES, META)
    assert good(store)
    return found.reason


def good(store: Store) -> bool:
    found = store.load(KEY)
    return isinstance(found, Artifact) and dict(found.files) == FILES and dict(found.meta) == META


def forge(store: Store, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as whoever has the secret could."""
    values = json.loads(place(store, MANIFEST).read_bytes())
    change(values)
    write_manifest(store, json.dumps(values).encode())


def write_manifest(store: Store, text: bytes) -> None:
    place(store, MANIFEST).write_bytes(text)
    if store.secret is not None:
        place(store, SIGNATURE).write_bytes(reading.sign(store.secret, text, "artifact"))


def test_what_is_saved_is_what_is_loaded(store: Store, tmp_path: Path) -> None:
    """Bytes, names and meta; also in another process's store, in a copy of the directory, and extracted."""
    assert good(store)
    assert good(Store(store.root, secret=store.secret))
    shutil.copytree(store.root, tmp_path / "elsewhere")
    copy = Store(tmp_path / "elsewhere", secret=store.secret)
    assert good(copy)
    found = copy.load(KEY)
    assert isinstance(found, Artifact)
    found.extract(tmp_path / "out")
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == set(FILES)
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in FILES.items())
    with pytest.raises(FileExistsError):
        found.extract(tmp_path / "out")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name]])
@pytest.mark.parametrize("share", [0.0, 0.5, -1])
def test_truncated(store: Store, name: str, share: float) -> None:
    """At nothing, at half, and without the last byte; an empty shared library is what a full disk leaves."""
    data = FILES[name]
    place(store, name).write_bytes(data[: -1 if share < 0 else int(len(data) * share)])
    assert reason(store) == "size"


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name]])
def test_one_bit(store: Store, name: str) -> None:
    """Any bit, in any file: 32 seeded places."""
    draw = random.Random(name)
    for _ in range(32):
        data = bytearray(FILES[name])
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        place(store, name).write_bytes(data)
        assert reason(store) == "hash"


def test_longer(store: Store) -> None:
    """More bytes than the manifest says are not read."""
    with place(store, "graph.so").open("ab") as file:
        file.truncate(1 << 40)  # a hole: it takes no space
    assert reason(store) == "size"


def test_missing_and_additional_files(store: Store) -> None:
    """A file that is named has to be there; one that isn't named is no part of the artifact."""
    place(store, "stray.py").write_text("raise SystemExit")
    assert good(store)
    place(store, "blocks/0.pt2").unlink()
    assert reason(store) == "missing"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_something_else_in_place_of_a_file(store: Store, kind: str, tmp_path: Path) -> None:
    """Links are not followed, even to the right bytes; a pipe doesn't block."""
    path = place(store, "graph.so")
    (tmp_path / "right").write_bytes(FILES["graph.so"])
    path.unlink()
    {"link": lambda: path.symlink_to(tmp_path / "right"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    found = store.load(KEY)
    assert isinstance(found, Miss)
    assert found.reason == "unreadable"
    assert store.save(KEY, FILES, META)
    assert good(store)


def test_artifact_folder_that_is_a_link(store: Store, tmp_path: Path) -> None:
    """Nor are links in place of the folder."""
    place(store).rename(tmp_path / "moved")
    place(store).symlink_to(tmp_path / "moved")
    assert isinstance(store.load(KEY), Miss)
    assert store.save(KEY, FILES, META)
    assert good(store) and not place(store).is_symlink()


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_nothing_of_it_runs(store: Store, tmp_path: Path) -> None:
    """Code and pickles put in place of an artifact's files are refused before anybody sees them."""
    canary = tmp_path / "canary"
    for data in (f"open({str(canary)!r}, 'w')".encode(), pickle.dumps(Bomb(canary))):
        place(store, "spine.py").write_bytes(data)
        assert reason(store) == "size"
        place(store, "spine.py").write_bytes(data[: len(FILES["spine.py"])].ljust(len(FILES["spine.py"])))
        assert reason(store) == "hash"
    assert not canary.exists()


# -- manifest ---------------------------------------------------------------------------------------------------------

_MANIFESTS = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"schema": "\xff"}',
    "a list": b"[]",
    "nested": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "nested in a list": b"[" * 5_000_000,
    "unfinished text": b'"\\' * 1_000_000,
    "a name twice": b'{"schema": 1, "schema": 1}',
    "not a number": b'{"schema": NaN}',
    "a long number": b'{"schema": ' + b"9" * 1_000_000 + b"}",
    "other fields": b'{"schema": 1}',
}


@pytest.mark.parametrize("text", _MANIFESTS.values(), ids=_MANIFESTS)
def test_a_manifest_that_is_none(store: Store, text: bytes) -> None:
    """A miss without a traceback, whatever is in it; here even signed."""
    write_manifest(store, text)
    assert reason(store) == "manifest"


def test_a_huge_manifest_takes_no_memory(store: Store) -> None:
    """A hundred megabytes are refused by their size."""
    with place(store, MANIFEST).open("ab") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        found = store.check(KEY.digest)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found, Miss)
    assert found.reason == "manifest"
    assert peak < MANIFEST_BYTES
    assert reason(store) == "manifest"


_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another schema": lambda m: m.update(schema=2),
    "no files": lambda m: m.pop("files"),
    "one more field": lambda m: m.update(more=1),
    "files in a list": lambda m: m.update(files=[]),
    "meta in a list": lambda m: m.update(meta=[]),
    "upwards": lambda m: m["files"].update({"../../x": m["files"]["empty"]}),
    "absolute": lambda m: m["files"].update({"/etc/passwd": m["files"]["empty"]}),
    "itself": lambda m: m["files"].update({MANIFEST: m["files"]["empty"]}),
    "a negative size": lambda m: m["files"]["empty"].update(size=-1),
    "an enormous size": lambda m: m["files"]["empty"].update(size=1 << 80),
    "a size that is true": lambda m: m["files"]["empty"].update(size=True),
    "no hash": lambda m: m["files"]["empty"].update(sha256="0" * 63 + "\n"),
    "too many files": lambda m: m["files"].update({f"f{n}": m["files"]["empty"] for n in range(5000)}),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_a_manifest_with_nonsense_in_it(store: Store, change: Callable[[dict[str, Any]], object]) -> None:
    """Fields, sizes, hashes and names are checked, also in a signed one."""
    forge(store, change)
    assert reason(store) == "manifest"


def test_a_name_twice_anywhere(store: Store) -> None:
    """Two values of one name could be read differently by two readers."""
    text = place(store, MANIFEST).read_bytes()
    twice = text.replace(b'"meta":{', b'"meta":{"component":"head",')
    assert twice != text
    write_manifest(store, twice)
    assert reason(store) == "manifest"


def test_factors_and_key_belong_together(store: Store) -> None:
    """A manifest that names one key and describes another is none."""
    forge(store, lambda m: m["factors"].update(torch="2.14.0"))
    assert reason(store) == "key"


def test_swapped_artifacts(store: Store) -> None:
    """A good artifact in the place of another key is not loaded: the key is inside what is signed."""
    other = ArtifactKey({"torch": "2.14.0"})
    assert store.save(other, {"graph.so": b"other"}, {})
    shutil.rmtree(place(store))
    shutil.copytree(store.folders.of(other.digest), place(store))
    assert reason(store) == "key"
    assert isinstance(store.load(other), Artifact)


# -- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "reader", "says"),
    [
        (None, SECRET, "not signed"),
        (OTHER, SECRET, "another key"),
        (SECRET, None, "there is no key"),
    ],
)
def test_secrets_that_do_not_match(tmp_path: Path, writer: bytes | None, reader: bytes | None, says: str) -> None:
    """Not loaded, with a reason that shows nothing of a secret; not set aside, because it may be good for others."""
    assert Store(tmp_path, secret=writer).save(KEY, FILES, META)
    found = Store(tmp_path, secret=reader).load(KEY)
    assert isinstance(found, Miss)
    assert found.reason == "mac"
    assert says in found.detail
    for secret in (SECRET, OTHER):
        assert secret.decode() not in found.detail and secret.hex() not in found.detail
    assert good(Store(tmp_path, secret=writer))


def test_a_rotated_key_heals(tmp_path: Path) -> None:
    """What was signed with the old key makes way for what is signed with the new one."""
    assert Store(tmp_path, secret=OTHER).save(KEY, FILES, META)
    store = Store(tmp_path, secret=SECRET)
    assert store.save(KEY, FILES, META)
    assert good(store)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE])
def test_a_signature_covers_the_manifest(tmp_path: Path, name: str) -> None:
    """Any changed byte of either is a wrong signature, before the manifest is parsed."""
    store = Store(tmp_path, secret=SECRET)
    assert store.save(KEY, FILES, META)
    path = place(store, name)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        found = store.load(KEY)
        assert isinstance(found, Miss)
        assert found.reason == "mac"
    path.write_bytes(data)
    assert good(store)


def test_a_signature_is_for_one_purpose() -> None:
    """What signs a bundle signs no artifact."""
    assert reading.sign(SECRET, b"text", "bundle") != reading.sign(SECRET, b"text", "artifact")


# -- verified is used -------------------------------------------------------------------------------------------------


def test_verified_bytes_are_what_is_loaded(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder is swapped for a link to another one between reading the manifest and reading the files."""
    evil = tmp_path / "evil"
    shutil.copytree(place(store), evil)
    (evil / "graph.so").write_bytes(FILES["graph.so"][::-1])
    decode = Manifest.decode.__func__  # type: ignore[attr-defined]

    def swapping(cls: type[Manifest], text: bytes) -> Manifest:
        if not place(store).is_symlink():
            place(store).rename(tmp_path / "aside")
            place(store).symlink_to(evil)
        return decode(cls, text)  # type: ignore[no-any-return]

    monkeypatch.setattr(Manifest, "decode", classmethod(swapping))
    found = store.check(KEY.digest)
    assert not isinstance(found, Miss)
    assert dict(found[1].files) == FILES


def test_bad_names_are_our_mistake(store: Store) -> None:
    """The caller's names are held to the same rules as a manifest's."""
    for name in ("", "/x", "../x", "a/../b", "a//b", ".hidden", "a b", "x" * 300, MANIFEST, "a\n", "a~b"):
        with pytest.raises(ValueError, match="cannot name a file"):
            store.save(KEY, {name: b""}, {})
