"""The configuration's flags are taken out of a command line wherever they stand; the rest is left in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compile_policy.errors import ConfigError
from compile_policy.flags import parse_flags


def _values(*argv: str) -> dict[str, Any]:
    flags, rest = parse_flags(argv)
    assert rest == []
    return {name: setting.value for name, setting in flags.settings.items()}


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--compile-mm-encoder"], {"compile_mm_encoder": True}),
        (["--no-compile-mm-encoder"], {"compile_mm_encoder": False}),
        (["-cc.compile_mm_encoder=true"], {"compile_mm_encoder": True}),
        (["-cc.compile-mm-encoder=false"], {"compile_mm_encoder": False}),
        (["-O0"], {"mode": 0}),
        (["-O", "3"], {"mode": 3}),
        (["-O=1"], {"mode": 1}),
        (["-cc.custom_ops=[+a, -b]"], {"custom_ops": ["+a", "-b"]}),
        (["-cc.verify_calls=1e-2"], {"verify_calls": 0.01}),
        (["-cc.cache_dir=/a=b"], {"cache_dir": "/a=b"}),
        (["-cc.cache_dir="], {"cache_dir": None}),
        (["-cc", '{"mode": 1, "on_fault": "error"}'], {"mode": 1, "on_fault": "error"}),
        (['-cc={"mode": 1}'], {"mode": 1}),
        (["-cc.dynamic_arg_dims.A.x=0", "-cc.dynamic_arg_dims.A.y=1"], {"dynamic_arg_dims": {"A": {"x": 0, "y": 1}}}),
        (["-O1", "-O2"], {"mode": 2}),
        (["-cc.compile_mm_encoder", "true"], {"compile_mm_encoder": True}),
        (["-cc.dynamic_arg_dims.A.x", "0"], {"dynamic_arg_dims": {"A": {"x": 0}}}),
        (["--compilation-config", '{"mode": 1, "on-fault": "error"}'], {"mode": 1, "on_fault": "error"}),
        (['--compilation-config={"mode": 1}'], {"mode": 1}),
        (["--compilation-config.mode=1"], {"mode": 1}),
        (["--compilation-config.mode", "1"], {"mode": 1}),
        (["--compilation_config.max-entries=3"], {"max_entries": 3}),
        (["--compile_mm_encoder"], {"compile_mm_encoder": True}),
        (["-cc.custom_ops+", "+a", "-cc.custom_ops+=-b"], {"custom_ops": ["+a", "-b"]}),
        (["-cc.custom_ops=[none]", "-cc.custom_ops+=[+a, +b]"], {"custom_ops": ["none", "+a", "+b"]}),
        (["-cc.custom_ops+=+a", "-cc.custom_ops=[none]"], {"custom_ops": ["none"]}),
        (["--compile-mm-encoder", "-cc.compile_mm_encoder=false"], {"compile_mm_encoder": False}),
        (["-cc.compile_mm_encoder=false", "--compile-mm-encoder"], {"compile_mm_encoder": True}),
    ],
)
def test_spellings(argv: list[str], values: dict[str, Any]) -> None:
    """Every spelling gives the same kind of setting, and the last one wins."""
    assert _values(*argv) == values


def test_rest_is_kept_in_order() -> None:
    """What is not ours stays as it was, also when it only looks a little like ours."""
    argv = [
        "generate",
        "-O1",
        "tiny:llama",
        "--prompt",
        "hi",
        "-cc.mode=1",
        "-c",
        "--compile-mm",
        "-o",
        "--compilation-configs",
    ]
    _, rest = parse_flags(argv)
    assert rest == ["generate", "tiny:llama", "--prompt", "hi", "-c", "--compile-mm", "-o", "--compilation-configs"]


def test_double_dash_ends_the_flags() -> None:
    """After ``--`` nothing is ours."""
    flags, rest = parse_flags(["-O1", "--", "-O2"])
    assert flags.settings["mode"].value == 1
    assert rest == ["--", "-O2"]


def test_each_setting_names_its_flag() -> None:
    """The origin is the flag as the user wrote it."""
    flags, _ = parse_flags(["-O", "1", "-cc.backend=eager", "-cc", "{max_entries: 2}", "--no-compile-mm-encoder"])
    assert {name: setting.origin for name, setting in flags.settings.items()} == {
        "mode": "flag -O1",
        "backend": "flag -cc.backend",
        "max_entries": "flag -cc",
        "compile_mm_encoder": "flag --no-compile-mm-encoder",
    }


_FILES = [["--compilation-config", "a.yaml"], ["--compilation-config=a.yaml"], ["--compilation_config=a.yaml"]]


@pytest.mark.parametrize("argv", _FILES)
def test_file(argv: list[str]) -> None:
    """The file is only named here; reading it is the configuration's business."""
    flags, rest = parse_flags(argv)
    assert flags.file == Path("a.yaml")
    assert rest == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["-O4"], "no optimisation level '4'"),
        (["-Ofast"], "no optimisation level 'fast'"),
        (["-O"], "-O needs a value"),
        (["-cc"], "-cc needs a value"),
        (["--compilation-config"], "--compilation-config needs a value"),
        (["-cc.mode"], "-cc.mode needs a value"),
        (["-cc.mode", "-O1"], "-cc.mode needs a value"),
        (["-cc.mode", "--json"], "-cc.mode needs a value"),
        (["--compilation-config.mode"], "--compilation-config.mode needs a value"),
        (["--compilation-config.=1"], "cannot read '--compilation-config.'"),
        (["--compilation-config", "{mode: "], "is not a mapping"),
        (["-cc.=1"], "cannot read '-cc.'"),
        (["-cc.a..b=1"], "cannot read"),
        (["-ccmode=1"], "cannot read '-ccmode=1'"),
        (["-cc", "[1, 2]"], "is not a mapping"),
        (["-cc", "{mode: "], "is not a mapping"),
        (["-cc.custom_ops=[a"], "cannot read the value '[a'"),
    ],
)
def test_bad_flags(argv: list[str], says: str) -> None:
    """One clear sentence, and what to write instead."""
    with pytest.raises(ConfigError) as caught:
        parse_flags(argv)
    assert says in caught.value.message
    assert caught.value.remedy
