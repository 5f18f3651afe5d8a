"""The command line: one line and a remedy for every mistake, and the truth in what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from compile_policy.cli import main
from compile_policy.cli.inputs import check_model, open_picture, question_for
from compile_policy.errors import InputError


def _fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that is the user's mistake; returns its one line."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate", "--imag", "x"], "--image?"),
        (["generate", "--compile-mm-encodr"], "--compile-mm-encoder?"),
        (["gnerate"], "'generate'?"),
        (["config", "-cc.moda=1"], "Did you mean 'mode'?"),
        (["config", "-cc.mode=fast"], "mode: input should be a valid integer, got 'fast' (from flag -cc.mode)"),
        (["config", "-cc.dynamic_arg_dims.A.x=no"], "dynamic_arg_dims.A.x: "),
        (["config", "-O0", "--compile-mm-encoder"], "compile_mm_encoder"),
        (["config", "--compilation-config", "absent.yaml"], "absent.yaml"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["plan", "./no/such/folder"], "no model folder './no/such/folder'"),
        (["generate", "./no/such/folder", "--json"], "no model folder"),
        (["generate", "tiny:llama", "--image", "absent.png"], "no picture absent.png"),
        (["plan", "tiny:qwen2_5_vll"], "qwen2_5_vl"),
        (["plan", "nobody/such-model-exists"], "nobody/such-model-exists"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    """Each is one line that names the thing, with exit code 2 and nothing on standard output."""
    assert says in _fails(capsys, *argv)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--debug``, anywhere, the traceback comes first; the exit code stays."""
    assert main(["config", "--debug", "-cc.moda=1"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ConfigError" in err


def test_unsupported_versions_are_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An old Transformers stops the run before it is imported."""
    monkeypatch.setattr("importlib.metadata.version", {"torch": "2.13.0", "transformers": "4.57.0"}.__getitem__)
    line = _fails(capsys, "plan", "tiny:llama")
    assert "transformers 4.57.0 is not supported" in line
    assert "pip install" in line


def _weights(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(data)
    return folder


def test_damaged_model_folders(tmp_path: Path) -> None:
    """No configuration, a broken one, and weights cut anywhere are refused by file; a whole folder passes."""
    save_file({"w": torch.zeros(8)}, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    check_model(str(_weights(tmp_path / "m", good)))
    for data in (b"", good[:4], good[:20], good[:-1], good + b"x", b"\xff" * 8 + good[8:], b"\x02" + bytes(7) + b"[]"):
        with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
            check_model(str(_weights(tmp_path / "m", data)))
    _weights(tmp_path / "m", good)
    (tmp_path / "m/tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        check_model(str(tmp_path / "m"))
    (tmp_path / "m/tokenizer.json").unlink()
    (tmp_path / "m/config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        check_model(str(tmp_path / "m"))
    (tmp_path / "m/config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is not"):
        check_model(str(tmp_path / "m"))
    with pytest.raises(InputError, match="is a file"):
        check_model(str(tmp_path / "good.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        check_model(str(tmp_path / "empty"))
    for fine in (None, "tiny:llama", "owner/name", "gpt2"):
        check_model(fine)


def test_unreadable_pictures(tmp_path: Path) -> None:
    """0 bytes, no picture at all, cut in the middle, a folder: each in one sentence; a good one opens as RGB."""
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 48), 90).save(whole)
    name, image = open_picture(str(whole))
    assert (name, image.mode, image.size) == ("whole.png", "RGB", (64, 48))
    for name, data, says in (
        ("empty.png", b"", "0 bytes"),
        ("text.png", b"not a picture", "not a picture"),
        ("cut.png", whole.read_bytes()[:1500], "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=says) as caught:
            open_picture(str(tmp_path / name))
        assert name in str(caught.value)
        assert caught.value.remedy
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        open_picture(str(tmp_path))


def test_what_is_asked(tmp_path: Path) -> None:
    """The embedded model comes with a picture and a question; another model needs at least a question."""
    Image.new("RGB", (32, 24)).save(tmp_path / "demo.png")
    (tmp_path / "demo.json").write_text('{"image": "demo.png", "prompt": "How many?", "answer": "two"}')
    demo = question_for(None, [], None, tmp_path)
    assert (demo.prompt, demo.pictures[0].name, demo.pictures[0].image.size) == ("How many?", "demo.png", (32, 24))
    own = open_picture(str(tmp_path / "demo.png"))._replace(name="own.png")
    assert question_for(None, [], "What colour?", tmp_path).pictures[0].name == "demo.png"
    assert [name for name, _ in question_for(None, [own], None, tmp_path).pictures] == ["own.png"]
    assert question_for("owner/name", [], "Hi", tmp_path).pictures == ()
    assert question_for("owner/name", [own], None, tmp_path).prompt
    with pytest.raises(InputError, match="nothing to ask"):
        question_for("owner/name", [], None, tmp_path)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_config_shows_origins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and the flags reach the configuration, and each value says where it came from."""
    monkeypatch.setenv("COMPILE_POLICY_MAX_ENTRIES", "3")
    assert main(["config", "-O1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mode"] == {"value": 1, "origin": "flag -O1"}
    assert values["max_entries"] == {"value": 3, "origin": "environment COMPILE_POLICY_MAX_ENTRIES"}
    assert values["backend"] == {"value": "inductor", "origin": "default"}
    assert main(["-O1", "config"]) == 0
    assert "environment COMPILE_POLICY_MAX_ENTRIES" in capsys.readouterr().out


def test_help_names_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The help of a command lists its options and the configuration's flags."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--image", "--verify", "--dump-graphs", "--json", "--compile-mm-encoder", "-cc.FIELD=VALUE", "-O3"):
        assert flag in out
    for argv in ([], ["layers"]):
        assert main(argv) == 0
        assert "Usage: compile-policy" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
