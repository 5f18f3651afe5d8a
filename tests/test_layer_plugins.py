"""Layers of installed packages: found, isolated when they fail, refused when they conflict, and switched off."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOW = """
    import json, warnings
    from compile_policy.errors import PolicyWarning
    from compile_policy.layers import LayerError, ParallelLMHead, layer_rows, load_plugins, registry_state
    warnings.simplefilter("ignore", PolicyWarning)
    try:
        plugins = load_plugins({arguments})
        error = ""
    except LayerError as refused:
        plugins, error = (), str(refused)
    print(json.dumps({{
        "plugins": [[p.name, p.origin, p.status, p.error] for p in plugins],
        "head": type(ParallelLMHead(8, 4)).__name__,
        "row": [vars(row) for row in layer_rows() if row.name == "parallel_lm_head"][0],
        "state": str(registry_state()),
        "names": [row.name for row in layer_rows()],
        "error": error,
    }}))
"""
HEAD = """
    from compile_policy.layers import ParallelLMHead
    @ParallelLMHead.register_oot
    class {name}(ParallelLMHead):
        def forward(self, hidden_states):
            return -super().forward(hidden_states)
"""


def install(folder: Path, name: str, code: str, reference: str = "") -> None:
    """Put a package with one entry point into a folder, as an installer does."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[compile_policy.layers]\n{name} = {module}{reference}\n")
    (info / "top_level.txt").write_text(f"{module}\n")


def run(folder: Path, code: str) -> str:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}:{folder}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", textwrap.dedent(code)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def show(folder: Path, arguments: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(folder, SHOW.format(arguments=arguments)))
    return found


def test_an_installed_override_is_found_and_can_be_switched_off(tmp_path: Path) -> None:
    """The head is the plug-in's, with its origin; switched off, or skipped by name, nothing is even imported."""
    install(tmp_path, "fast-heads", HEAD.format(name="FastHead") + "    print(end='imported ')\n")
    imported, _, found = run(tmp_path, SHOW.format(arguments="")).partition(" ")
    on = json.loads(found)
    assert imported == "imported"
    assert on["plugins"] == [["fast-heads", "fast-heads 1.2", "loaded", ""]]
    assert on["head"] == "FastHead" and "FastHead" in on["state"]
    assert (on["row"]["override_origin"], on["row"]["count"]) == ("fast-heads 1.2", 1)
    for arguments in ("enabled=False", "skip=['fast-heads']"):
        off = show(tmp_path, arguments)
        assert off["plugins"] == [["fast-heads", "fast-heads 1.2", "skipped", ""]]
        assert (off["head"], off["state"]) == ("ParallelLMHead", "()")


def test_a_broken_plugin_is_isolated_and_named(tmp_path: Path) -> None:
    """One that raises at import is left out whole, with what it registered before; the other one works."""
    half = (
        HEAD.format(name="BrokenHead")
        + """
    from compile_policy.layers import PluggableLayer
    @PluggableLayer.register("half")
    class Half(PluggableLayer): pass
    raise RuntimeError("no driver")
    """
    )
    install(tmp_path, "broken-heads", half)
    install(tmp_path, "missing", "", ":nothing")
    install(tmp_path, "working", HEAD.format(name="WorkingHead"))
    found = show(tmp_path)
    statuses = {name: (status, error) for name, _, status, error in found["plugins"]}
    assert statuses["broken-heads"] == ("failed", "RuntimeError: no driver")
    assert statuses["missing"][0] == "failed" and "AttributeError" in statuses["missing"][1]
    assert statuses["working"] == ("loaded", "")
    assert found["head"] == "WorkingHead"
    assert "half" not in found["names"]


def test_the_warning_names_the_plugin(tmp_path: Path) -> None:
    """Whoever loads plug-ins hears which one failed, of which distribution, why, and what to do."""
    install(tmp_path, "broken-heads", "raise RuntimeError('no driver')")
    code = """
        import warnings
        from compile_policy.layers import load_plugins
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_plugins(); load_plugins()
        for one in caught: print(one.category.__name__, one.message)
    """
    lines = run(tmp_path, code).splitlines()
    assert len(lines) == 1, "told once, not at each look"
    for part in ("PolicyWarning", "'broken-heads' of broken-heads 1.2", "RuntimeError: no driver", "skip it by name"):
        assert part in lines[0]


def test_two_plugins_that_conflict_are_both_named(tmp_path: Path) -> None:
    """Both claim the head: neither wins by being first, both are named; with one skipped the other works."""
    install(tmp_path, "one-heads", HEAD.format(name="OneHead"))
    install(tmp_path, "two-heads", HEAD.format(name="TwoHead"))
    found = show(tmp_path)
    assert found["head"] == "ParallelLMHead"
    assert "OneHead (from one-heads 1.2) and by two_heads:TwoHead (from two-heads 1.2)" in found["error"]
    twice = """
        from compile_policy.layers import LayerError, load_plugins
        for _ in range(2):
            try: load_plugins()
            except LayerError: print("refused")
    """
    retry = textwrap.dedent(twice) + textwrap.dedent(SHOW.format(arguments="skip=['two-heads']"))
    lines = run(tmp_path, retry).splitlines()
    assert lines[:2] == ["refused", "refused"]
    assert json.loads(lines[2])["head"] == "OneHead"


def test_a_second_look_applies_nothing_twice(tmp_path: Path) -> None:
    """Loading again is no conflict of a plug-in with itself; an entry point may be a function."""
    code = "def register():\n" + textwrap.indent(textwrap.dedent(HEAD.format(name="FastHead")), "    ")
    install(tmp_path, "fast-heads", code, ":register")
    found = run(tmp_path, "from compile_policy.layers import load_plugins; load_plugins(); load_plugins()")
    assert found == ""
    assert show(tmp_path)["head"] == "FastHead"


def test_a_wheel_installed_into_an_environment(tmp_path: Path) -> None:
    """A plug-in package in a virtual environment of its own overrides the head of a Transformers model there."""
    python = make_environment(tmp_path / "venv")
    wheel = make_wheel(tmp_path, "fast-heads", HEAD.format(name="FastHead"))
    target = str(next((tmp_path / "venv" / "lib").glob("python*/site-packages")))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, str(wheel)]
    subprocess.run(pip, check=True, timeout=120)
    code = """
        import torch
        from compile_policy.layers import load_plugins
        from compile_policy_transformers.layers import use_parallel_vocab_
        from compile_policy_transformers.tiny import tiny_inputs, tiny_model
        load_plugins()
        model = tiny_model("llama")
        inputs = tiny_inputs(model, text_len=6)
        with torch.no_grad():
            before = model(**inputs).logits
            use_parallel_vocab_(model)
            after = model(**inputs).logits
        print(type(model.lm_head).__module__, type(model.lm_head).__name__, torch.equal(after, -before))
    """
    ran = subprocess.run([python, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=180)
    assert ran.stdout.split() == ["fast_heads", "FastHead", "True"], ran.stderr


def make_environment(folder: Path) -> str:
    """A virtual environment that also sees the packages of this one, and this source."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    site = next((folder / "lib").glob("python*/site-packages"))
    paths = [sysconfig.get_path("purelib"), str(ROOT), str(ROOT / "backends")]
    (site / "outside.pth").write_text("\n".join(dict.fromkeys(paths)))
    return str(folder / "bin" / "python")


def make_wheel(folder: Path, name: str, code: str) -> Path:
    """A wheel, built by hand so that no build backend is needed."""
    source = folder / "source"
    source.mkdir()
    install(source, name, code)
    info = next(source.glob("*.dist-info"))
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    files = [path for path in source.rglob("*") if path.is_file()]
    lines = [f"{path.relative_to(source)},sha256={_digest(path)},{path.stat().st_size}" for path in files]
    (info / "RECORD").write_text("\n".join([*lines, f"{info.name}/RECORD,,", ""]))
    wheel = folder / f"{name.replace('-', '_')}-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in [*files, info / "RECORD"]:
            archive.write(path, path.relative_to(source))
    return wheel


def _digest(path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def layers_ls(folder: Path, *words: str) -> str:
    code = f"""
        import warnings
        warnings.filterwarnings("default", "The layer plug-in 'broken-heads' of broken-heads 1.2 failed")
        from compile_policy.cli.layers import app
        from compile_policy.cli.session import Session
        from compile_policy.cli.terminal import Terminal
        from compile_policy.flags import parse_flags
        flags, rest = parse_flags({["ls", *words]!r})
        app(args=rest, standalone_mode=False, obj=Session(Terminal(), flags))
    """
    return run(folder, code)


def test_the_list_shows_origin_override_and_plugins(tmp_path: Path) -> None:
    """``compile-policy layers ls`` shows who brought what, and what became of each plug-in."""
    install(tmp_path, "broken-heads", "raise RuntimeError('no driver')")
    install(tmp_path, "fast-heads", HEAD.format(name="FastHead"))
    found = json.loads(layers_ls(tmp_path, "--json", '-cc.custom_ops=["+rms_norm"]'))
    rows = {row["name"]: row for row in found["layers"]}
    assert rows["parallel_lm_head"]["override_origin"] == "fast-heads 1.2"
    assert (rows["rms_norm"]["state"], rows["silu_and_mul"]["state"]) == ("on", "off")
    assert {p["name"]: p["status"] for p in found["plugins"]} == {"broken-heads": "failed", "fast-heads": "loaded"}
    text = layers_ls(tmp_path)
    for part in ("fast_heads:FastHead (from fast-heads 1.2)", "failed: RuntimeError: no driver", "custom_op"):
        assert part in text
    norm = """
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
        from compile_policy.layers import override
        @override(LlamaRMSNorm)
        class Norm(LlamaRMSNorm): pass
    """
    install(tmp_path, "fast-norms", norm)
    rows = json.loads(layers_ls(tmp_path, "--json", "tiny:llama"))["layers"]
    assert [(row["origin"], row["override_origin"], row["count"]) for row in rows if row["kind"] == "model"] == [
        ("", "fast-norms 1.2", 5)
    ]
    off = json.loads(layers_ls(tmp_path, "--json", "--no-plugins"))
    assert {p["status"] for p in off["plugins"]} == {"skipped"}
    assert not any(row["override"] for row in off["layers"])
