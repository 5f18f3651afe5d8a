"""Where the cache may be: private to its user, wherever that is, or signed with a key from elsewhere."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compile_policy.artifacts import Artifact, ArtifactKey, Miss, Store, open_store
from compile_policy.artifacts.disk import Disk
from compile_policy.artifacts.locations import default_cache_dir, default_key_file
from compile_policy.errors import PolicyWarning

KEY = ArtifactKey({"torch": "2.13.0"})
FILES = {"graph.so": b"\x7fELF", "blocks/0.pt2": b"package"}
NOBODY, NAMELESS = 65534, 54321
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="gives files to other users")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return home


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    try:
        yield os.umask
    finally:
        os.umask(before)


def opened(cache_dir: Path | None, home: Path | None = None, **environ: str) -> Store:
    """A store without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = open_store(cache_dir, environ | ({"HOME": str(home)} if home else {}))
    assert store is not None
    return store


def refused(cache_dir: Path | None, home: Path | None = None, **environ: str) -> str:
    """The one warning of a cache that isn't used."""
    with pytest.warns(PolicyWarning) as seen:
        assert open_store(cache_dir, environ | ({"HOME": str(home)} if home else {})) is None
    assert len(seen) == 1
    return str(seen[0].message)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def as_user(uid: int, body: Callable[[], object]) -> None:
    """Run in a child process of another user, which has no rights beyond a user's."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            warnings.simplefilter("error")
            os._exit(0 if body() else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# -- private ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(home: Path, umask: Callable[[int], int], mask: int) -> None:
    """Folders 0700, files 0600: the cache, its key, locks, quarantine."""
    umask(mask)
    store = opened(None, home)
    with store.lock(KEY) as held:
        assert held
        assert store.save(KEY, FILES, {})
    store.discard(KEY, "test")
    assert store.save(KEY, FILES, {})
    assert isinstance(store.load(KEY), Artifact)
    made = [*(home / ".cache").rglob("*"), home / ".cache", *(home / ".config").rglob("*"), home / ".config"]
    assert len(made) > 15
    for path in made:
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("bits", [0o020, 0o002])
@pytest.mark.parametrize("where", ["cache", "parent"])
def test_writable_by_others(tmp_path: Path, home: Path, bits: int, where: str) -> None:
    """The directory itself, or one above it: refused, with the command that repairs it, which does."""
    parent = tmp_path / "above"
    cache = parent / "cache"
    cache.mkdir(parents=True)
    guilty = cache if where == "cache" else parent
    for folder in (cache, parent):
        folder.chmod(0o700)
    guilty.chmod(0o700 | bits)
    message = refused(cache, home)
    assert f"{guilty}" in message and f"(mode {0o700 | bits:04o})" in message
    assert ("chmod 700" if where == "cache" else "chmod go-w") in message
    guilty.chmod(mode(guilty) & ~0o022)
    assert opened(cache, home).save(KEY, FILES, {})


def test_a_sticky_parent_is_safe(tmp_path: Path, home: Path) -> None:
    """As in /tmp, names belong to their owners there."""
    parent = tmp_path / "tmp"
    parent.mkdir()
    parent.chmod(0o1777)
    assert opened(parent / "cache", home).save(KEY, FILES, {})


@needs_root
@pytest.mark.parametrize("where", ["cache", "parent"])
def test_another_owner(tmp_path: Path, home: Path, where: str) -> None:
    """Who owns a directory can write it, whatever its mode says."""
    cache = tmp_path / "above" / "cache"
    cache.mkdir(mode=0o700, parents=True)
    os.chown(cache if where == "cache" else cache.parent, NOBODY, NOBODY)
    message = refused(cache, home)
    assert "belongs to another user" in message and "cache_dir" in message


def test_links(tmp_path: Path, home: Path) -> None:
    """A link in place of the directory is refused; links above it are followed once and for all."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "symbolic link" in refused(tmp_path / "link", home)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "symbolic link" in refused(tmp_path / "dangling", home)
    assert opened(tmp_path / "link" / "cache", home).root == tmp_path / "real" / "cache"
    (tmp_path / "file").write_text("")
    assert "not a directory" in refused(tmp_path / "file", home)
    assert "cannot be made: Not a directory" in refused(tmp_path / "file" / "cache", home)


@needs_root
def test_a_directory_that_may_only_be_read(public: Path) -> None:
    """Hits are hits, one warning for what cannot be kept, and no exception."""
    home, cache = public / "home", public / "cache"
    home.mkdir()
    assert Store(cache).save(KEY, FILES, {})
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)

    def read() -> bool:
        store = opened(cache, home)
        other = ArtifactKey({"n": 1})
        with store.lock(other) as held, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            saved = [store.save(other, FILES, {}) for _ in range(2)]
        hit = isinstance(store.load(KEY), Artifact) and isinstance(store.load(other), Miss)
        return hit and not held and saved == [False, False] and len(seen) == 1

    as_user(NOBODY, read)

    def cannot_even_read() -> bool:
        store = opened(cache, home)
        found = store.load(KEY)
        return isinstance(found, Miss) and found.reason == "unreadable"

    (cache / "v1").chmod(0o700)
    as_user(NOBODY, cannot_even_read)


# -- which directory --------------------------------------------------------------------------------------------------


def test_default_directories(home: Path, tmp_path: Path) -> None:
    """The XDG variables when they are absolute, the home otherwise."""
    uid = os.getuid()
    assert default_cache_dir({"HOME": str(home)}, uid) == home / ".cache" / "compile_policy"
    assert default_cache_dir({"HOME": str(home), "XDG_CACHE_HOME": "rel"}, uid) == home / ".cache" / "compile_policy"
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}, uid) == Path("/x/compile_policy")
    assert default_key_file({"XDG_CONFIG_HOME": "/x"}, uid) == Path("/x/compile_policy/cache.key")
    assert default_cache_dir({"TMPDIR": str(tmp_path)}, NAMELESS) == tmp_path / f"compile_policy-{NAMELESS}"
    assert default_cache_dir({"HOME": "/nonexistent"}, uid).name == f"compile_policy-{uid}"
    assert default_key_file({"HOME": "/"}, uid) is None


@needs_root
def test_a_user_without_name_or_home(public: Path) -> None:
    """A container that runs under a number: a private directory in the temporary one, or no cache."""
    temporary = public / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)

    def run() -> bool:
        store = opened(None, TMPDIR=str(temporary))
        return store.secret is None and store.save(KEY, FILES, {}) and isinstance(store.load(KEY), Artifact)

    as_user(NAMELESS, run)
    assert mode(temporary / f"compile_policy-{NAMELESS}") == 0o700

    def taken() -> bool:
        return "belongs to another user" in refused(None, TMPDIR=str(temporary))

    os.chown(temporary / f"compile_policy-{NAMELESS}", NOBODY, NOBODY)
    as_user(NAMELESS, taken)
    temporary.chmod(0o755)
    (temporary / f"compile_policy-{NAMELESS}").rename(temporary / "gone")
    as_user(NAMELESS, lambda: "cannot be made: Permission denied" in refused(None, TMPDIR=str(temporary)))


# -- keys -------------------------------------------------------------------------------------------------------------


def test_the_users_own_key(home: Path, tmp_path: Path) -> None:
    """Made once, outside the cache; without it a copy of the cache is worth nothing."""
    store = opened(None, home)
    assert store.save(KEY, FILES, {})
    key_file = home / ".config" / "compile_policy" / "cache.key"
    assert opened(None, home).secret == store.secret == key_file.read_bytes().strip()
    assert isinstance(opened(None, home).load(KEY), Artifact)
    assert [path.name for path in key_file.parent.iterdir()] == ["cache.key"]
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    found = opened(store.root, stranger).load(KEY)
    assert isinstance(found, Miss)
    assert found.reason == "mac"


def test_processes_that_start_together_have_one_key(home: Path) -> None:
    """Whoever is second reads what the first has made, whole."""
    (home / "keys").mkdir()

    def start(number: int) -> None:
        secret = opened(None, home).secret
        assert secret is not None
        (home / "keys" / str(number)).write_bytes(secret)

    children = []
    for number in range(8):
        child = os.fork()
        if not child:
            try:
                start(number)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert len(list((home / "keys").iterdir())) == 8
    assert len({path.read_bytes() for path in (home / "keys").iterdir()}) == 1


def test_a_disk_without_room_for_a_key(home: Path) -> None:
    """Then the directory's own privacy has to do."""

    class Full(Disk):
        def step(self, name: str, path: Path) -> None:
            if ".config" in path.parts:
                raise OSError(28, "No space left on device")

    store = open_store(None, {"HOME": str(home)}, disk=Full())
    assert store is not None
    assert store.secret is None
    assert store.save(KEY, FILES, {})


@pytest.mark.parametrize("how", ["variable", "argument"])
def test_a_shared_directory_needs_a_key(tmp_path: Path, home: Path, how: str) -> None:
    """With a key file of one's own choice a directory may be open to others: what isn't signed isn't loaded."""
    shared, key_file = tmp_path / "shared", tmp_path / "team.key"
    shared.mkdir()
    shared.chmod(0o777)
    assert "COMPILE_POLICY_CACHE_KEY_FILE" in refused(shared, home)
    key_file.write_text("team secret, long enough for anybody\n")
    key_file.chmod(0o600)
    environ = {"HOME": str(home)} | ({"COMPILE_POLICY_CACHE_KEY_FILE": str(key_file)} if how == "variable" else {})
    store = open_store(shared, environ, key_file=key_file if how == "argument" else None)
    assert store is not None
    assert store.save(KEY, FILES, {})
    assert isinstance(store.load(KEY), Artifact)
    Store(shared).remove(KEY.digest)
    assert Store(shared).save(KEY, FILES, {})
    found = store.load(KEY)
    assert isinstance(found, Miss)
    assert found.reason == "mac"


@pytest.mark.parametrize(
    ("content", "bits", "says"),
    [
        (None, 0o600, "cannot be read: No such file"),
        ("x" * 40, 0o640, "chmod 600"),
        ("x" * 40, 0o604, "chmod 600"),
        ("tiny", 0o600, "too short"),
    ],
)
def test_key_files_that_are_none(tmp_path: Path, home: Path, content: str | None, bits: int, says: str) -> None:
    """Missing, open to others, or short: no cache, one line with the remedy, nothing of the content."""
    key_file = tmp_path / "team.key"
    if content is not None:
        key_file.write_text(content)
        key_file.chmod(bits)
    message = refused(tmp_path / "cache", home, COMPILE_POLICY_CACHE_KEY_FILE=str(key_file))
    assert says in message
    assert content is None or content not in message
