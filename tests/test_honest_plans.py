"""What cannot be done as asked is said before the run, or named for what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from falling import falls_back

from compile_policy import CompilationConfig, apply, load_model, plan
from compile_policy.applied import regions
from compile_policy.cli import main
from compile_policy.errors import ConfigError
from compile_policy_transformers import tiny_inputs, tiny_model

#: Places below a temporary folder that holds the file "file", and the cause that is told of each.
UNWRITABLE = {"file": "it is there and is no folder", "file/below": "Not a directory"}


@pytest.mark.parametrize("place", UNWRITABLE)
def test_a_dump_that_cannot_be_written_is_an_error_at_once(place: str, tmp_path: Path) -> None:
    """Path, cause and remedy; the policy that the model had stays."""
    (tmp_path / "file").touch()
    model = tiny_model("llama")
    apply(model, CompilationConfig(backend="eager"))
    before = regions(model)
    config = CompilationConfig(backend="eager", debug_dump_path=tmp_path / place)
    with pytest.raises(ConfigError) as raised:
        apply(model, config)
    said = str(raised.value)
    assert f"cannot be written to {tmp_path / place}: {UNWRITABLE[place]}. Name a folder" in said
    assert regions(model) == before
    with pytest.raises(ConfigError, match="cannot be written"):
        load_model("a model that is not there", config=config)


@pytest.mark.skipif(not os.path.exists("/dev/full") or not os.path.isdir("/proc/self"), reason="Linux only")
def test_a_file_system_that_takes_no_files(tmp_path: Path) -> None:
    """A folder that exists and takes no file, whoever asks; a new folder does, and nothing of the try is left."""
    with pytest.raises(ConfigError, match="cannot be written to /proc/self"):
        apply(tiny_model("llama"), CompilationConfig(backend="eager", debug_dump_path="/proc/self"))
    model = tiny_model("llama")
    apply(model, CompilationConfig(backend="eager", debug_dump_path=tmp_path / "new" / "dump"))
    assert [path.name for path in (tmp_path / "new" / "dump").iterdir()] == ["runs"]
    with torch.no_grad():
        model(**tiny_inputs(model, text_len=5))
    assert (tmp_path / "new" / "dump" / "index.json").exists()


@pytest.mark.parametrize("place", UNWRITABLE)
def test_the_command_line_says_it_in_a_line(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line, and nothing was loaded."""
    (tmp_path / "file").touch()
    code = main(["generate", "tiny:llama", "--dump-graphs", str(tmp_path / place)])
    out, err = capsys.readouterr()
    assert (code, out, err.strip().count("\n")) == (2, "", 0), err
    assert "cannot be written to" in err and UNWRITABLE[place] in err


@pytest.mark.parametrize("by", ["argument", "configuration"])
@torch.no_grad()
def test_attention_weights_are_named(by: str) -> None:
    """A call that asks for weights runs eager for that reason; the next call without is compiled."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model, text_len=5)
    asked = {"output_attentions": True} if by == "argument" else {}
    model.config.output_attentions = by == "configuration"
    want = model(**inputs, **asked).attentions
    apply(model, CompilationConfig(backend="eager"))
    with falls_back("the decoder is asked for attention weights (output_attentions)"):
        got = model(**inputs, **asked).attentions
    assert len(got) == len(want) > 0 and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    model.config.output_attentions = False
    (region,) = regions(model)
    model(**inputs)
    assert (region.calls, region.eager_calls, region.graphs) == (2, 1, 1)


@pytest.mark.parametrize(("place", "named"), [("model.layers.1.mlp", "layers.1.mlp (LlamaMLP)"), ("model", "")])
@torch.no_grad()
def test_a_hook_of_accelerate_is_named(place: str, named: str) -> None:
    """The sub-module and how to take the hook off, after which the model is compiled."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=5)
    hooks.add_hook_to_module(model.get_submodule(place), hooks.AlignDevicesHook(execution_device="cpu"))
    apply(model, CompilationConfig(backend="eager"))
    owner = f"the sub-module {named}" if named else "the component"
    with falls_back(f"{owner} has a hook of accelerate (AlignDevicesHook)"):
        model(**inputs)
    assert "accelerate.hooks.remove_hook_from_module" in regions(model)[0].remedy
    hooks.remove_hook_from_module(model, recurse=True)
    apply(model, CompilationConfig(backend="eager"))
    model(**inputs)
    assert (regions(model)[0].eager_calls, regions(model)[0].graphs) == (0, 1)


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_the_plan_says_what_computes_attention(chosen: str) -> None:
    """Where it is another implementation than the one that the user chose, and only there; the graph agrees."""
    model = tiny_model("llama")
    model.set_attn_implementation(chosen)
    (decoder,) = [c for c in plan(model).components if c.role == "decoder"]
    assert ("attention 'eager' is computed by SDPA" in decoder.reason) == (chosen == "eager")
    inputs = tiny_inputs(model, text_len=5)
    with torch.no_grad():
        expected = model(**inputs).logits
        apply(model, CompilationConfig(backend="eager"))
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    (region,) = regions(model)
    assert region.eager_calls == 0
    ((entry,),) = region.entries.values()
    operators = [str(row["op"]) for row in entry.graph.sources]
    assert "compile_policy.masked_attention.default" in operators  # which calls SDPA
    assert not [name for name in operators if "softmax" in name]
