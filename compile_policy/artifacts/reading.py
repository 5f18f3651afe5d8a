"""An artifact read into memory, and verified before any byte of it is used."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compile_policy.artifacts.disk import PRIVATE_FILE, PRIVATE_FOLDER, open_folder, read_at_most
from compile_policy.artifacts.key import JSON
from compile_policy.artifacts.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    SCHEMA,
    SIGNATURE,
    Damaged,
    FileRecord,
    Manifest,
    name_on_disk,
    sha256,
)


@dataclass(frozen=True)
class Artifact:
    """Verified bytes by name, and what was said about them when they were saved."""

    files: Mapping[str, bytes] = field(repr=False)
    meta: Mapping[str, JSON]

    def extract(self, folder: Path) -> None:
        """Write the files below ``folder``, a private directory that the caller has just made.

        Raises:
            OSError: a file could not be written, or exists already.
        """
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
            with open(path, "xb", opener=_private) as file:
                file.write(data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE_FILE)


def sign(secret: bytes, text: bytes, purpose: str) -> bytes:
    """HMAC-SHA256 (RFC 2104) in hexadecimal; what is signed for one purpose is no signature for another."""
    key = hmac.digest(secret, f"compile-policy {purpose} {SCHEMA}".encode(), "sha256")
    return hmac.new(key, text, "sha256").hexdigest().encode()


def read_text(folder: int) -> bytes:
    """The text of the manifest in an open folder.

    Raises:
        Damaged: it is not there, or too large.
        OSError: it cannot be read.
    """
    try:
        text, size = read_at_most(MANIFEST, MANIFEST_BYTES, folder)
    except FileNotFoundError:
        raise Damaged("missing", "there is no manifest") from None
    if size > MANIFEST_BYTES:
        raise Damaged("manifest", f"the manifest has {size} bytes; {MANIFEST_BYTES} is the most")
    return text


def _check_signature(folder: int, text: bytes, secret: bytes | None) -> None:
    try:
        signature, _ = read_at_most(SIGNATURE, 256, folder)
    except FileNotFoundError:
        if secret is not None:
            raise Damaged("mac", "the artifact is not signed") from None
        return
    if secret is None:
        raise Damaged("mac", "the artifact is signed, and there is no key to check it with")
    if not hmac.compare_digest(signature.strip(), sign(secret, text, "artifact")):
        raise Damaged("mac", "the artifact was changed, or signed with another key")


def read_artifact(path: Path, wanted: str, secret: bytes | None) -> tuple[Manifest, Artifact]:
    """Read an artifact into memory and verify exactly these bytes.

    Args:
        path: its folder.
        wanted: digest of the key that it should have.

    Raises:
        Damaged: it is not what its manifest says, or not the one that is wanted.
        FileNotFoundError: there is no such folder.
        OSError: something of it cannot be read.
    """
    folder = open_folder(path)
    try:
        text = read_text(folder)
        _check_signature(folder, text, secret)  # before it is parsed
        manifest = Manifest.decode(text)
        if manifest.key.digest != wanted:
            raise Damaged("key", "the artifact belongs to another key")
        files = {name: _read_file(folder, name, record) for name, record in manifest.files.items()}
    finally:
        os.close(folder)
    return manifest, Artifact(files, manifest.meta)


def _read_file(folder: int, name: str, record: FileRecord) -> bytes:
    try:
        data, size = read_at_most(name_on_disk(name), record.size, folder)
    except FileNotFoundError:
        raise Damaged("missing", f"{name} is not there") from None
    if size != record.size:
        raise Damaged("size", f"{name} has {size} bytes instead of {record.size}")
    return verified(name, data, record)


def verified(name: str, data: bytes, record: FileRecord) -> bytes:
    """The same bytes, once they are those of the manifest.

    Raises:
        Damaged: they are not.
    """
    if len(data) != record.size:
        raise Damaged("size", f"{name} has {len(data)} bytes instead of {record.size}")
    if sha256(data) != record.sha256:
        raise Damaged("hash", f"{name} was changed")
    return data
