"""Artifacts in one file, for a container image or a fleet.

A bundle is a tar file without compression: nothing in it can unpack to more than the file's own size, and unlike a zip
file it has one table of contents, not two that can disagree. It holds, in this order, ``bundle.json`` (the SHA-256 of
every manifest), ``bundle.mac`` when it is signed, and for each artifact its manifest and its files. Members are read
into memory and verified; nothing is unpacked by name.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import os
import secrets
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from compile_policy.artifacts.disk import PRIVATE_FILE
from compile_policy.artifacts.key import JSON, canonical
from compile_policy.artifacts.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    SCHEMA,
    Damaged,
    Manifest,
    Miss,
    is_digest,
    sha256,
)
from compile_policy.artifacts.parsing import load_json
from compile_policy.artifacts.reading import Artifact, sign, verified
from compile_policy.artifacts.store import Store
from compile_policy.artifacts.tar import Member, Members
from compile_policy.errors import CacheError

INDEX = "bundle.json"
INDEX_SIGNATURE = "bundle.mac"
ARTIFACTS = 10_000
_PURPOSE = "bundle"


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    Attributes:
        signed: whether the signature was checked, and is good.
        added: digests that were not there before.
        present: digests that were there already, verified, and stayed.
    """

    signed: bool
    added: tuple[str, ...]
    present: tuple[str, ...]


def export_bundle(store: Store, path: Path, digests: Sequence[str], *, secret: bytes | None) -> list[Miss]:
    """Write artifacts that verify into a new file, signed when there is a secret.

    Returns:
        One miss for each artifact that was left out because it doesn't verify.

    Raises:
        CacheError: the file cannot be written, or nothing is left to write.
    """
    left_out: list[Miss] = []
    index: dict[str, JSON] = {}
    for digest in digests:
        found = store.check(digest)
        if isinstance(found, Miss):
            left_out.append(found)
        else:
            index[digest] = sha256(found[0].encode())
    if not index:
        raise CacheError("there is no artifact to export.", remedy="Run compile-policy cache ls.")
    with _whole_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as bundle:
        text = canonical({"schema": SCHEMA, "artifacts": index})
        _add(bundle, INDEX, text)
        if secret is not None:
            _add(bundle, INDEX_SIGNATURE, sign(secret, text, _PURPOSE))
        for digest in index:
            found = store.check(digest)
            if isinstance(found, Miss) or sha256(found[0].encode()) != index[digest]:
                raise CacheError("an artifact changed while it was exported.", remedy="Run it again.")
            manifest, artifact = found
            _add(bundle, f"{digest}/{MANIFEST}", manifest.encode())
            for name in sorted(manifest.files):
                _add(bundle, f"{digest}/{name}", artifact.files[name])
    return left_out


def import_bundle(store: Store, path: Path, *, secret: bytes | None, trust: bool = False) -> Imported:
    """Verify a whole bundle, then save what is in it.

    Args:
        secret: what it has to be signed with.
        trust: take one that isn't signed, or not with this secret. Its hashes are checked all the same, but hashes
            only show that it is whole, not who made it, and what is in it is code.

    Raises:
        CacheError: it isn't trusted, it is no bundle, or an artifact couldn't be saved. Then nothing, or only whole
            artifacts, were added.
    """
    try:
        with path.open("rb") as file:
            signed = _check_all(file, secret, trust)
            file.seek(0)
            added, present = [], []
            for manifest, artifact in _artifacts(_Reader(file), secret, trust):
                digest = manifest.key.digest
                if not isinstance(store.check(digest), Miss):
                    present.append(digest)
                elif store.save(manifest.key, artifact.files, artifact.meta):
                    added.append(digest)
                else:
                    raise CacheError(f"{digest[:12]} cannot be saved.", remedy="Free space, or raise the limit.")
    except (Damaged, ValueError, tarfile.TarError, EOFError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{path} is no bundle that can be used: {error}.", remedy="Export it again.") from error
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror or error}."
        raise CacheError(problem, remedy="Name a file that compile-policy cache export wrote.") from error
    return Imported(signed, tuple(added), tuple(present))


def _check_all(file: IO[bytes], secret: bytes | None, trust: bool) -> bool:
    reader = _Reader(file)
    for _ in _artifacts(reader, secret, trust):
        pass
    return reader.signed


class _Reader:
    """Members in order; a member that isn't a plain file with the expected name and a bounded size is refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self._members = Members(file)
        self._ahead: Member | None = None
        self.signed = False

    def peek(self) -> str | None:
        if self._ahead is None:
            self._ahead = self._members.next()
        return None if self._ahead is None else self._ahead.name

    def read(self, name: str, limit: int) -> bytes:
        found, member = self.peek(), self._ahead
        if member is None:
            raise ValueError(f"{name} is missing")
        if found != name:
            raise ValueError(f"it holds {str(found)[:120]!r} where {name[:120]!r} belongs")
        if not member.plain:
            raise ValueError(f"{name} in it is not a plain file")
        if member.size > limit:
            raise ValueError(f"{name} in it is too large")
        data = self._members.read(member)
        self._ahead = None
        return data


def _artifacts(reader: _Reader, secret: bytes | None, trust: bool) -> Iterator[tuple[Manifest, Artifact]]:
    """Verified artifacts, one at a time.

    Raises:
        CacheError: the bundle isn't trusted.
        ValueError: something is missing, too much, too large, or not a plain file.
        Damaged: something was changed.
    """
    index = reader.read(INDEX, MANIFEST_BYTES)
    signature = reader.read(INDEX_SIGNATURE, 256) if reader.peek() == INDEX_SIGNATURE else None
    reader.signed = _signed(index, signature, secret)
    if not reader.signed and not trust:
        problem = "is not signed" if signature is None else "is signed with another key"
        raise CacheError(
            f"the bundle {problem}, and what is in it is code.",
            remedy="Give the key that it was exported with (--key), or --trust if you know where it comes from.",
        )
    for digest, manifest_hash in _index(index).items():
        text = reader.read(f"{digest}/{MANIFEST}", MANIFEST_BYTES)
        if sha256(text) != manifest_hash:
            raise Damaged("hash", "a manifest was changed")
        manifest = Manifest.decode(text)
        if manifest.key.digest != digest:
            raise Damaged("key", "an artifact belongs to another key")
        files = {
            name: verified(name, reader.read(f"{digest}/{name}", manifest.files[name].size), manifest.files[name])
            for name in sorted(manifest.files)
        }
        yield manifest, Artifact(files, manifest.meta)
    if (more := reader.peek()) is not None:
        raise ValueError(f"it holds {more[:120]!r}, which nothing names")


def _signed(index: bytes, signature: bytes | None, secret: bytes | None) -> bool:
    if signature is None or secret is None:
        return False
    return hmac.compare_digest(signature, sign(secret, index, _PURPOSE))


def _index(text: bytes) -> dict[str, str]:
    values = load_json(text)
    if set(values) != {"schema", "artifacts"} or values["schema"] != SCHEMA:
        raise ValueError("its index is of another version")
    artifacts = values["artifacts"]
    if not isinstance(artifacts, dict) or len(artifacts) > ARTIFACTS:
        raise ValueError("its index is none, or too long")
    if not all(is_digest(digest) and is_digest(manifest) for digest, manifest in artifacts.items()):
        raise ValueError("its index names something that is no digest")
    return artifacts


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A private file that appears at ``path`` when it is whole."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror or error}."
        raise CacheError(problem, remedy="Name a file in a folder that you may write.") from error


def _add(bundle: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner, no time: the same artifacts are the same bytes
    member.size, member.mode = len(data), PRIVATE_FILE
    bundle.addfile(member, io.BytesIO(data))
