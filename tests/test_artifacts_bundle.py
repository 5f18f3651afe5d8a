"""Bundles: what goes in comes out elsewhere, and nothing hostile gets in."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compile_policy.artifacts import Artifact, ArtifactKey, Miss, Store
from compile_policy.artifacts.bundle import INDEX, INDEX_SIGNATURE, export_bundle, import_bundle
from compile_policy.artifacts.key import canonical
from compile_policy.artifacts.manifest import MANIFEST, Manifest, sha256
from compile_policy.artifacts.reading import sign
from compile_policy.errors import CacheError, PolicyWarning

KEY, SECOND = ArtifactKey({"n": 1}), ArtifactKey({"n": 2})
FILES = {"graph.so": b"\x7fELF" * 64, "blocks/0.pt2": b"package", "empty": b""}
SECRET, OTHER = b"s" * 32, b"o" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "here", secret=SECRET)
    store.save(KEY, FILES, {"component": "decoder"})
    store.save(SECOND, {"a": b"b"}, {})
    return store


@pytest.fixture
def bundle(store: Store, tmp_path: Path) -> Path:
    """Signed, with two artifacts."""
    assert export_bundle(store, tmp_path / "b.tar", [KEY.digest, SECOND.digest], secret=SECRET) == []
    return tmp_path / "b.tar"


@pytest.fixture
def there(tmp_path: Path) -> Store:
    return Store(tmp_path / "there", secret=OTHER)


def members(bundle: Path) -> dict[str, bytes]:
    with tarfile.open(bundle) as file:
        return {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]


def packed(path: Path, contents: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for member, data in contents:
            member.size = member.size or len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def plainly(contents: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(tarfile.TarInfo(name), data) for name, data in contents.items()]


def refused(there: Store, bundle: Path, **options: Any) -> str:
    """Whole message; nothing was added."""
    with pytest.raises(CacheError) as caught:
        import_bundle(there, bundle, **({"secret": SECRET} | options))
    assert there.folders.artifacts() == []
    assert caught.value.remedy
    return str(caught.value)


# -- there and back ---------------------------------------------------------------------------------------------------


def test_there_and_back(bundle: Path, there: Store) -> None:
    """The same bytes, in a store with another secret; a second import changes nothing."""
    done = import_bundle(there, bundle, secret=SECRET)
    assert done.signed
    assert set(done.added) == {KEY.digest, SECOND.digest}
    found = there.load(KEY)
    assert isinstance(found, Artifact)
    assert (dict(found.files), dict(found.meta)) == (FILES, {"component": "decoder"})
    again = import_bundle(there, bundle, secret=SECRET)
    assert again.added == () and set(again.present) == set(done.added)


def test_the_same_artifacts_are_the_same_bundle(store: Store, bundle: Path, tmp_path: Path) -> None:
    """No time, no owner, no path in it; private to whoever wrote it."""
    again = tmp_path / "again.tar"
    export_bundle(store, again, [KEY.digest, SECOND.digest], secret=SECRET)
    assert again.read_bytes() == bundle.read_bytes()
    assert again.stat().st_mode & 0o777 == 0o600
    assert str(tmp_path).encode() not in bundle.read_bytes()


def test_damaged_artifacts_are_left_out(store: Store, tmp_path: Path) -> None:
    """And named; when nothing is left there is no file."""
    (store.folders.of(KEY.digest) / "graph.so").write_bytes(b"")
    left_out = export_bundle(store, tmp_path / "b.tar", [KEY.digest, SECOND.digest], secret=None)
    assert [miss.reason for miss in left_out] == ["size"]
    with pytest.raises(CacheError, match="no artifact to export"):
        export_bundle(store, tmp_path / "none.tar", [KEY.digest], secret=None)
    with pytest.raises(CacheError, match="cannot be written"):
        export_bundle(store, tmp_path / "no" / "b.tar", [SECOND.digest], secret=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "here"]


# -- trust ------------------------------------------------------------------------------------------------------------


def test_unsigned(store: Store, there: Store, tmp_path: Path) -> None:
    """Refused, unless the user says that it is trusted."""
    path = tmp_path / "unsigned.tar"
    export_bundle(store, path, [KEY.digest], secret=None)
    message = refused(there, path)
    assert "not signed" in message and "--trust" in message
    done = import_bundle(there, path, secret=SECRET, trust=True)
    assert not done.signed and done.added == (KEY.digest,)


@pytest.mark.parametrize("secret", [OTHER, None])
def test_signed_with_another_key(bundle: Path, there: Store, secret: bytes | None) -> None:
    """The same, and nothing of either key is in the message."""
    message = refused(there, bundle, secret=secret)
    assert "signed with another key" in message
    assert SECRET.decode() not in message and OTHER.decode() not in message
    assert not import_bundle(there, bundle, secret=secret, trust=True).signed


def test_a_signature_covers_everything(bundle: Path, there: Store, tmp_path: Path) -> None:
    """A changed byte anywhere in any member is noticed, also with trust."""
    contents = members(bundle)
    for name, data in contents.items():
        if data:
            changed = contents | {name: data[:-1] + bytes([data[-1] ^ 1])}
            path = packed(tmp_path / "changed.tar", plainly(changed))
            refused(there, path)
            if name != INDEX_SIGNATURE:
                refused(there, path, trust=True)


def test_a_forged_manifest_under_a_good_signature(bundle: Path, there: Store, tmp_path: Path) -> None:
    """Other code with a manifest that fits it: the signature covers the manifest too, and trust doesn't skip hashes."""
    contents = members(bundle)
    name = f"{KEY.digest}/{MANIFEST}"
    evil = {**FILES, "graph.so": b"evil"}
    contents[name] = Manifest.describe(KEY, evil, {}).encode()
    contents[f"{KEY.digest}/graph.so"] = evil["graph.so"]
    for trust in (False, True):
        path = packed(tmp_path / "forged.tar", plainly(contents))
        assert "a manifest was changed" in refused(there, path, trust=trust)


def test_a_member_of_another_name(bundle: Path, there: Store, tmp_path: Path) -> None:
    """The right bytes in the right place under a name that leads elsewhere."""
    contents = {name.replace("blocks/0.pt2", "../../0.pt2"): data for name, data in members(bundle).items()}
    message = refused(there, packed(tmp_path / "renamed.tar", plainly(contents)))
    assert "../../0.pt2" in message


# -- hostile ----------------------------------------------------------------------------------------------------------


def built(files: dict[str, bytes], names: dict[str, str] | None = None) -> dict[str, bytes]:
    """Members of a bundle that is signed and consistent."""
    manifest = Manifest.describe(KEY, files, {}).encode()
    for old, new in (names or {}).items():
        manifest = manifest.replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    index = canonical({"schema": 1, "artifacts": {KEY.digest: sha256(manifest)}})
    named = {f"{KEY.digest}/{(names or {}).get(name, name)}": data for name, data in files.items()}
    return {
        INDEX: index,
        INDEX_SIGNATURE: sign(SECRET, index, "bundle"),
        f"{KEY.digest}/{MANIFEST}": manifest,
        **named,
    }


def test_the_hostile_ones_would_be_good_otherwise(there: Store, tmp_path: Path) -> None:
    """What the following tests change is a bundle that imports."""
    assert import_bundle(there, packed(tmp_path / "b.tar", plainly(built({"x": b"data"}))), secret=SECRET).added


@pytest.mark.parametrize("name", ["../../../evil", "/tmp/evil", "a/../../evil", "..", "./x", "a//b", "x\\u0000y"])
def test_names_that_lead_out(there: Store, tmp_path: Path, name: str) -> None:
    """Even in a signed bundle; nothing is written anywhere."""
    before = sorted(tmp_path.rglob("*"))
    path = packed(tmp_path / "b.tar", plainly(built({"x": b"evil"}, {"x": name})))
    refused(there, path)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "DIRTYPE", "CONTTYPE"])
def test_members_that_are_no_files(there: Store, tmp_path: Path, kind: str) -> None:
    """Links, devices, pipes and folders."""
    contents = plainly(built({"x": b"data"}))
    member = contents[-1][0]
    member.type, member.linkname = getattr(tarfile, kind), "/etc/passwd"
    assert "not a plain file" in refused(there, packed(tmp_path / "b.tar", [*contents[:-1], (member, b"")]))


def test_a_sparse_member(there: Store, tmp_path: Path) -> None:
    """A terabyte of nothing in a few bytes."""
    contents = plainly(built({"x": b"data"}))
    member, data = contents[-1]
    name = member.name
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(1 << 40),
    }
    contents[-1] = (member, b"1\n0\n4\n".ljust(512, b"\0") + data)
    refused(there, packed(tmp_path / "b.tar", contents))


def _compressed(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


_SPOILED: dict[str, Callable[[Path], object]] = {
    "compressed": _compressed,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not a bundle" * 100),
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut in a header": lambda path: os.truncate(path, 700),
    "absent": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("spoil", _SPOILED.values(), ids=_SPOILED)
def test_files_that_are_no_bundles(bundle: Path, there: Store, spoil: Callable[[Path], object]) -> None:
    """One sentence each. Compressed ones too: without compression there is no bomb."""
    spoil(bundle)
    refused(there, bundle)


def _without(contents: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {n: d for n, d in contents.items() if not n.endswith(name)}


_WRONG: dict[str, Callable[[dict[str, bytes]], Any]] = {
    "no index": lambda c: plainly(_without(c, INDEX)),
    "no manifest": lambda c: plainly(_without(c, MANIFEST)),
    "a file is missing": lambda c: plainly(_without(c, "/x")),
    "one more": lambda c: [*plainly(c), *plainly({"more": b""})],
    "a name twice": lambda c: [*plainly(c), *plainly(_without(c, INDEX))],
    "another order": lambda c: plainly(dict(reversed(c.items()))),
    "nothing but an index": lambda c: plainly({INDEX: c[INDEX]}),
    "a huge header": lambda c: [_claiming(c, 1 << 50), *plainly(c)],
}


def _claiming(contents: dict[str, bytes], size: int) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(INDEX)
    member.size = size
    return member, contents[INDEX]


@pytest.mark.parametrize("change", _WRONG.values(), ids=_WRONG)
@pytest.mark.parametrize("trust", [False, True])
def test_wrong_contents(there: Store, tmp_path: Path, change: Callable[[dict[str, bytes]], Any], trust: bool) -> None:
    """Missing, additional, repeated, in another order, larger than the file: refused, trusted or not."""
    contents = change(built({"x": b"data"}))
    path = tmp_path / "b.tar"
    with path.open("wb") as file:
        for member, data in contents:
            member.size = member.size or len(data)
            file.write(member.tobuf() + data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    refused(there, path, trust=trust)


def test_an_artifact_cannot_pose_as_another(there: Store, tmp_path: Path) -> None:
    """The index says one key and the manifest another."""
    manifest = Manifest.describe(SECOND, {}, {}).encode()
    index = canonical({"schema": 1, "artifacts": {KEY.digest: sha256(manifest)}})
    contents = {INDEX: index, INDEX_SIGNATURE: sign(SECRET, index, "bundle"), f"{KEY.digest}/{MANIFEST}": manifest}
    assert "another key" in refused(there, packed(tmp_path / "b.tar", plainly(contents)))


def test_no_room(bundle: Path, tmp_path: Path) -> None:
    """Said, with what to do; what was added before is whole."""
    small = Store(tmp_path / "small", limit_bytes=250)
    with pytest.warns(PolicyWarning), pytest.raises(CacheError, match="cannot be saved"):
        import_bundle(small, bundle, secret=SECRET)
    for entry in small.folders.artifacts():
        assert not isinstance(small.check(entry.digest), Miss)


def _extension(text: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo("PaxHeaders/x")
    member.type = tarfile.XHDTYPE
    return member, text


_EXTENSIONS = {
    "many": lambda contents: [_extension(b"11 path=ab\n")] * 3000 + contents,
    "large": lambda contents: [_extension(b"11 path=ab\n" + bytes(50 << 20)), *contents],
    "another size": lambda contents: [_extension(b"12 size=999\n"), *contents],
    "another length": lambda contents: [_extension(b"9999 path=a\n"), *contents],
    "for all": lambda contents: [_of_type(_extension(b"11 path=ab\n"), tarfile.XGLTYPE), *contents],
    "long name": lambda contents: [_of_type(_extension(b"bundle.json\0"), tarfile.GNUTYPE_LONGNAME), *contents],
    "alone": lambda contents: [_extension(b"11 path=ab\n")],
}


def _of_type(member: tuple[tarfile.TarInfo, bytes], kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member[0].type = kind
    return member


@pytest.mark.parametrize("spoil", _EXTENSIONS.values(), ids=_EXTENSIONS)
def test_extension_headers(there: Store, tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    """Refused for what they claim, in little memory, before anything is parsed or verified."""
    path = packed(tmp_path / "b.tar", spoil(plainly(built({"x": b"data"}))))
    tracemalloc.start()
    try:
        assert "is no bundle that can be used" in refused(there, path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_long_name(store: Store, there: Store, tmp_path: Path) -> None:
    """A name that does not fit into a header travels in an extension of it."""
    long = f"{'a' * 90}/{'b' * 100}"
    key = ArtifactKey({"long": True})
    assert store.save(key, {long: b"data"}, {})
    assert not export_bundle(store, tmp_path / "b.tar", [key.digest], secret=SECRET)
    assert import_bundle(there, tmp_path / "b.tar", secret=SECRET).added == (key.digest,)
    found = there.load(key)
    assert isinstance(found, Artifact) and found.files[long] == b"data"
