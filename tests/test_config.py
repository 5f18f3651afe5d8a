"""The configuration is frozen, refuses nonsense by name, and knows the origin of every value."""

from __future__ import annotations

import copy
import json
import os
import pickle
import pwd
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile_policy.config import CompilationConfig
from compile_policy.configured import store_of
from compile_policy.errors import ConfigError, EnvironmentNotSupported, PolicyWarning
from compile_policy.flags import parse_flags
from compile_policy.versions import check_versions


def test_defaults() -> None:
    """Without a word from anybody: decoders compile, encoders do not, a fault means eager."""
    config = CompilationConfig()
    assert (config.enabled, config.mode, config.backend) == (True, 2, "inductor")
    assert (config.compile_mm_encoder, config.on_fault, config.on_budget) == (False, "eager", "warn")
    assert {origin for _, _, origin in config.describe()} == {"default"}


def test_frozen() -> None:
    """No field can be set once the object exists."""
    config = CompilationConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.mode = 1  # type: ignore[misc]
    assert config.mode == 2


def test_the_callers_containers_are_copied() -> None:
    """Changing the list that was passed in does not change the configuration."""
    ops = ["+rms_norm"]
    config = CompilationConfig(custom_ops=ops)
    ops.append("nonsense")
    assert config.custom_ops == ["+rms_norm"]


def test_unknown_field_offers_a_near_match() -> None:
    """A typing error is refused with the field that was probably meant."""
    with pytest.raises(ConfigError, match=r"compile_mm_encodr.*Did you mean 'compile_mm_encoder'"):
        CompilationConfig(compile_mm_encodr=True)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"'zzz'.*Known: .*backend"):
        CompilationConfig(zzz=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"mode": "fast"}, "mode"),
        ({"mode": True}, "mode"),
        ({"mode": 4}, "mode"),
        ({"enabled": 1}, "enabled"),
        ({"backend": "tensorrt"}, "backend"),
        ({"max_entries": 0}, "max_entries"),
        ({"cache_dir": 3}, "cache_dir"),
        ({"custom_ops": "+a"}, "custom_ops"),
        ({"splitting_ops": ["a", 1]}, "splitting_ops.1"),
        ({"dynamic_arg_dims": {"LlamaModel": {"input_ids": "abc"}}}, "dynamic_arg_dims.LlamaModel.input_ids"),
        ({"dynamic_arg_dims": {"LlamaModel": {"input_ids": {0: 1}}}}, "dynamic_arg_dims.LlamaModel.input_ids"),
        ({"verify_calls": float("nan")}, "verify_calls"),
        ({"verify_calls": -1}, "verify_calls"),
    ],
)
def test_wrong_type_names_the_path(values: dict[str, object], path: str) -> None:
    """A value of the wrong type is refused with the path of the field and the value it got."""
    with pytest.raises(ConfigError) as caught:
        CompilationConfig(**values)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{path}: ")
    assert "got " in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"mode": 0, "compile_mm_encoder": True}, ("mode", "compile_mm_encoder")),
        ({"mode": 3, "backend": "eager"}, ("mode", "backend")),
        ({"mode": 1, "splitting_ops": ["aten::mm"]}, ("mode", "splitting_ops")),
        ({"cache_dir": "a", "debug_dump_path": "a"}, ("cache_dir", "debug_dump_path")),
        ({"custom_ops": ["+a", "-a"]}, ("'+a'", "'-a'")),
        ({"custom_ops": ["all", "none"]}, ("'all'", "'none'")),
    ],
)
def test_contradictions_name_both_sides(values: dict[str, object], fields: tuple[str, str]) -> None:
    """Two values that cannot be meant together are refused, and each is harmless alone."""
    with pytest.raises(ConfigError) as caught:
        CompilationConfig(**values)  # type: ignore[arg-type]
    assert all(field in str(caught.value) for field in fields)
    if len(values) == 2:
        for name, value in values.items():
            if (name, value) != ("mode", 1):
                CompilationConfig(**{name: value})  # type: ignore[arg-type]


def test_a_sentinel_rate_or_count() -> None:
    """`verify_calls` is a rate below 1 or a whole number of calls."""
    assert CompilationConfig(verify_calls=0.25).verify_calls == 0.25
    assert CompilationConfig(verify_calls=3).verify_calls == 3
    with pytest.raises(ConfigError, match=r"verify_calls=1\.5"):
        CompilationConfig(verify_calls=1.5)


def _write(tmp_path: Path, text: str, name: str = "policy.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    """default < file < environment < flags < arguments, and each value says which it was."""
    file = _write(tmp_path, "mode: 1\nmax_entries: 2\non_fault: error\nbackend: eager\n")
    flags, _ = parse_flags(["-cc.backend=aot_eager", "-cc.on_fault=eager"])
    environ = {"COMPILE_POLICY_MAX_ENTRIES": "3", "COMPILE_POLICY_BACKEND": "inductor", "PATH": "/bin"}
    config = CompilationConfig.from_sources(file=file, environ=environ, flags=flags, on_fault="error")
    rows = {name: (value, origin) for name, value, origin in config.describe()}
    assert rows["mode"] == (1, f"file {file}")
    assert rows["max_entries"] == (3, "environment COMPILE_POLICY_MAX_ENTRIES")
    assert rows["backend"] == ("aot_eager", "flag -cc.backend")
    assert rows["on_fault"] == ("error", "argument")
    assert rows["enabled"] == (True, "default")


def test_file_as_json_and_yaml_and_from_flag(tmp_path: Path) -> None:
    """One reader for both formats; ``--compilation-config`` names the file."""
    yaml_file = _write(tmp_path, "compile_mm_encoder: true\ncache_dir: ~/artifacts\n")
    json_file = _write(tmp_path, '{"compile_mm_encoder": true, "cache_dir": "~/artifacts"}', "policy.json")
    config = CompilationConfig.from_file(yaml_file)
    assert config.compile_mm_encoder is True
    assert config.cache_dir == Path.home() / "artifacts"
    assert config == CompilationConfig.from_file(json_file)
    flags, rest = parse_flags(["--compilation-config", str(json_file)])
    assert CompilationConfig.from_sources(flags=flags) == config
    assert rest == []


def test_home_in_a_path_is_the_account_s_or_the_one_that_is_given(tmp_path: Path) -> None:
    """``~`` does not depend on the environment; a command line says what it means."""
    account = Path(pwd.getpwuid(os.getuid()).pw_dir)
    name = pwd.getpwuid(os.getuid()).pw_name
    file = _write(tmp_path, "cache_dir: ~/a\ncache_key_file: ~\n")
    flags, _ = parse_flags(["-cc.debug_dump_path=~/d"])
    config = CompilationConfig.from_sources(file, flags=flags, cache_dir=f"~{name}/a")
    assert (config.cache_dir, config.cache_key_file) == (account / "a", None)  # YAML's ~ alone is nothing
    assert config.debug_dump_path == account / "d"
    there = CompilationConfig.from_sources(file, flags=flags, home=tmp_path)
    assert (there.cache_dir, there.debug_dump_path) == (tmp_path / "a", tmp_path / "d")
    assert there.origin("cache_dir") == f"file {file}"
    with pytest.raises(ConfigError, match="'~nobody-at-all', which has no entry in the password database"):
        CompilationConfig(cache_dir="~nobody-at-all/a")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["mode: [1", "- mode\n", "just words", "\x00"])
def test_bad_file_is_named(tmp_path: Path, text: str) -> None:
    """A file that is no mapping is refused by its name."""
    file = _write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"policy\.yaml"):
        CompilationConfig.from_file(file)


def test_missing_file_and_wrong_field_in_a_file(tmp_path: Path) -> None:
    """The message says which file."""
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        CompilationConfig.from_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"'moda' \(from file .*policy\.yaml\).*'mode'"):
        CompilationConfig.from_file(_write(tmp_path, "moda: 1"))
    with pytest.raises(ConfigError, match=r"mode: .*got 'x' \(from file .*policy\.yaml\)"):
        CompilationConfig.from_file(_write(tmp_path, "mode: x"))
    assert CompilationConfig.from_file(_write(tmp_path, "")) == CompilationConfig()


def test_environment_values_and_unknown_variables() -> None:
    """Variables are read as YAML; one that is no setting warns with a near match and changes nothing."""
    environ = {"COMPILE_POLICY_CUSTOM_OPS": "[+a, none]", "COMPILE_POLICY_VERIFY_CALLS": "1e-3"}
    config = CompilationConfig.from_sources(environ=environ)
    assert config.custom_ops == ["+a", "none"]
    assert config.verify_calls == 1e-3
    with pytest.warns(PolicyWarning, match=r"COMPILE_POLICY_MODEE.*'mode'"):
        assert CompilationConfig.from_sources(environ={"COMPILE_POLICY_MODEE": "1"}) == CompilationConfig()
    with pytest.raises(ConfigError, match="from environment COMPILE_POLICY_MODE"):
        CompilationConfig.from_sources(environ={"COMPILE_POLICY_MODE": "fast"})


def test_kill_switch_wins_over_everything() -> None:
    """``COMPILE_POLICY_DISABLE=1`` turns the policy off even where an argument says on."""
    config = CompilationConfig.from_sources(environ={"COMPILE_POLICY_DISABLE": "1"}, enabled=True)
    assert config.enabled is False
    assert config.origin("enabled") == "environment COMPILE_POLICY_DISABLE"
    assert CompilationConfig.from_sources(environ={"COMPILE_POLICY_DISABLE": "0"}).enabled is True
    with pytest.raises(ConfigError, match="COMPILE_POLICY_DISABLE='maybe'"):
        CompilationConfig.from_sources(environ={"COMPILE_POLICY_DISABLE": "maybe"})


def test_the_process_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the command line only the mapping that was passed counts."""
    monkeypatch.setenv("COMPILE_POLICY_MODE", "0")
    monkeypatch.setenv("COMPILE_POLICY_DISABLE", "1")
    assert CompilationConfig.from_sources() == CompilationConfig()


def test_dynamic_arg_dims_merge_per_argument(tmp_path: Path) -> None:
    """A flag for one argument leaves the file's other arguments alone, and replaces its own whole."""
    file = _write(tmp_path, "dynamic_arg_dims: {A: {x: {0: batch}, y: 1}, B: {z: [0, 1]}}")
    flags, _ = parse_flags(["-cc.dynamic_arg_dims.A.x={1: length}"])
    config = CompilationConfig.from_sources(file=file, flags=flags)
    assert config.dynamic_arg_dims == {"A": {"x": {1: "length"}, "y": 1}, "B": {"z": [0, 1]}}
    assert config.origin("dynamic_arg_dims") == f"file {file}, flag -cc.dynamic_arg_dims.A.x"


def test_replace_checks_again_and_keeps_origins() -> None:
    """A changed copy is a configuration like any other."""
    config = CompilationConfig.from_sources(environ={"COMPILE_POLICY_MODE": "0"})
    changed = config.replace(max_entries=2)
    assert (changed.mode, changed.origin("mode")) == (0, "environment COMPILE_POLICY_MODE")
    assert (changed.max_entries, changed.origin("max_entries")) == (2, "argument")
    assert config.max_entries == 8
    with pytest.raises(ConfigError, match="compile_mm_encoder"):
        config.replace(compile_mm_encoder=True)
    with pytest.raises(ConfigError, match="'mode'"):
        config.origin("moda")


_DIMS = st.one_of(
    st.integers(-4, 4),
    st.lists(st.integers(-4, 4), max_size=3),
    st.dictionaries(st.integers(-4, 4), st.text(max_size=4)),
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "enabled": st.booleans(),
            "mode": st.integers(1, 2),
            "backend": st.sampled_from(["inductor", "aot_eager", "eager"]),
            "compile_mm_encoder": st.booleans(),
            "dynamic_arg_dims": st.dictionaries(st.text(max_size=4), st.dictionaries(st.text(max_size=4), _DIMS)),
            "cache_dir": st.none() | st.sampled_from(["cache", "~/cache", "/a b/c"]),
            "max_entries": st.integers(1, 99),
            "verify_calls": st.floats(0, 1),
        },
    )
)
def test_round_trips(values: dict[str, object]) -> None:
    """A configuration survives dict, JSON, pickle and copy; equality and hash go by values."""
    config = CompilationConfig(**values)  # type: ignore[arg-type]
    for other in (
        CompilationConfig.from_dict(config.to_dict()),
        CompilationConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert other == config
        assert hash(other) == hash(config)
    assert CompilationConfig(max_entries=100) != config


@pytest.mark.parametrize(
    ("torch", "transformers", "named"),
    [
        ("2.10.1", "5.23.0", "torch 2.10.1"),
        ("1.13.0", "5.23.0", "torch 1.13.0"),
        ("2.13.0+cpu", "4.57.0", "transformers 4.57.0"),
        ("2.11.0", "5.9.0", "transformers 5.9.0"),
        ("unknown", "5.23.0", "torch unknown"),
    ],
)
def test_unsupported_versions(torch: str, transformers: str, named: str) -> None:
    """Older than the oldest tested version is refused with the command that mends it."""
    with pytest.raises(EnvironmentNotSupported, match=named) as caught:
        check_versions(torch, transformers)
    assert "pip install" in caught.value.remedy


def test_supported_versions() -> None:
    """The floors themselves and everything later pass, local and development versions too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for torch, transformers in (("2.11.0", "5.17.0"), ("2.13.0+cpu", "5.23.0"), ("3.0.0a0+git", "6.0.0.dev0")):
            check_versions(torch, transformers)


def test_the_limit_of_the_cache_is_bytes_or_a_size(tmp_path: Path) -> None:
    """``10GiB`` and a number mean the same, reach the store, and what is no size is refused with an example."""
    assert CompilationConfig().cache_limit == CompilationConfig(cache_limit="10GiB").cache_limit == 10 << 30
    config = CompilationConfig.from_sources(
        environ={"COMPILE_POLICY_CACHE_LIMIT": "1.5 kB"}, cache_dir=tmp_path / "cache"
    )
    assert config.cache_limit == 1500 and config.origin("cache_limit") == "environment COMPILE_POLICY_CACHE_LIMIT"
    store = store_of(config)
    assert store is not None and store.limit_bytes == 1500
    for bad in ("much", "-1", -1, True, 1.5):
        with pytest.raises(ConfigError, match="cache_limit"):
            CompilationConfig(cache_limit=bad)
