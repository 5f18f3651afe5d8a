"""Embedding, head and logits over a split vocabulary equal the dense layers, on one rank and on two."""

from __future__ import annotations

import copy
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from compile_policy.layers import LayerError, LogitsProcessor, ParallelLMHead, VocabParallelEmbedding
from compile_policy.layers.shards import in_id_order, vocab_shards
from compile_policy_transformers.layers import use_parallel_vocab_
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

DEADLINE_SECONDS = 120.0


def dense(vocab: int, width: int, bias: bool = False) -> tuple[nn.Embedding, nn.Linear]:
    torch.manual_seed(0)
    return nn.Embedding(vocab, width), nn.Linear(width, vocab, bias)


def split(vocab: int, org: int, padding: int, group: Any = None, **options: Any) -> tuple[Any, Any, LogitsProcessor]:
    """Embedding, head and processor loaded from the dense layers' ordinary state dicts."""
    embedding = VocabParallelEmbedding(vocab, 8, org_num_embeddings=org, padding_size=padding, group=group)
    head = ParallelLMHead(vocab, 8, True, org_num_embeddings=org, padding_size=padding, group=group)
    table, linear = dense(vocab, 8, True)
    embedding.load_state_dict(table.state_dict())
    head.load_state_dict(linear.state_dict())
    return embedding, head, LogitsProcessor(vocab, **options)


LAYOUTS = [(64, 64, 64), (50, 50, 64), (50, 50, 1), (26, 20, 4), (26, 10, 16), (3, 3, 1), (9, 1, 8)]


# -- one rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "org", "padding"), LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_id_has_one_place(vocab: int, org: int, padding: int, ranks: int) -> None:
    """Over all ranks each id has exactly one row, ranks are equally large, and columns return to the order of ids."""
    shards = vocab_shards(vocab, org, padding, ranks)
    assert len({shard.rows for shard in shards}) == 1
    assert (shards[0].rows * ranks) % padding == 0
    ids = torch.full((ranks, shards[0].rows), -1)
    for rank, shard in enumerate(shards):
        for row, first, count in shard.pieces():
            assert row + count <= shard.rows
            ids[rank, row : row + count] = torch.arange(first, first + count)
    assert torch.equal(ids[ids >= 0].sort().values, torch.arange(vocab))
    assert torch.equal(in_id_order(ids.view(1, -1), shards)[0], torch.arange(vocab))


def test_the_layout_of_the_documented_example() -> None:
    """1010 original and 16 added ids on two ranks, padded to 64, as vLLM documents it."""
    first, second = vocab_shards(1026, 1010, 64, 2)
    assert (first.org, first.added, first.rows) == ((0, 512), (1010, 1026), 544)
    assert (second.org, second.added, second.rows) == ((512, 1010), (1026, 1026), 544)


@pytest.mark.parametrize(("vocab", "org", "padding"), LAYOUTS)
def test_one_rank_equals_dense(vocab: int, org: int, padding: int) -> None:
    """Embedding and logits are exactly the dense ones, padding and added ids included."""
    table, linear = dense(vocab, 8, True)
    embedding, head, process = split(vocab, org, padding)
    ids, x = torch.arange(vocab).view(1, -1), torch.randn(2, 3, 8)
    assert torch.equal(embedding(ids), table(ids))
    torch.testing.assert_close(process(head, x), linear(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 26, 31])
def test_an_id_outside_the_vocabulary_raises(bad: int) -> None:
    """Padding rows are no embeddings: an id that the dense table would refuse is refused, not looked up as zeros."""
    for org in (20, 26):
        embedding, _, _ = split(26, org, 32)
        with pytest.raises(IndexError):
            embedding(torch.tensor([bad]))


def test_gradients_are_those_of_the_dense_layers() -> None:
    """On one rank both layers train, and the padding index takes no gradient."""
    table = nn.Embedding(10, 4, padding_idx=3)
    ours = VocabParallelEmbedding.from_layer(copy.deepcopy(table))
    for layer in (table, ours):
        layer(torch.tensor([1, 3, 3, 5])).pow(2).sum().backward()
    assert torch.equal(ours.weight.grad, table.weight.grad)
    assert ours.weight.grad[3].abs().sum() == 0


def test_state_dicts_are_ordinary() -> None:
    """What one rank saves is the dense layer's state, and dense states load: whole, or without the added vocabulary."""
    table, _ = dense(26, 8)
    embedding, head, _ = split(26, 20, 16)
    saved = embedding.state_dict()
    assert saved.keys() == table.state_dict().keys() and torch.equal(saved["weight"], table.weight)
    assert head.state_dict()["bias"].shape == (26,)
    embedding.load_state_dict({"weight": table.weight[:20]})
    assert torch.equal(embedding(torch.arange(20)), table(torch.arange(20)))
    assert embedding(torch.arange(20, 26)).abs().sum() == 0
    nested = nn.ModuleDict({"embed": embedding})
    for state, message in (
        ({"embed.weight": torch.zeros(25, 8)}, "does not fit a vocabulary of 20 original and 6 added"),
        ({}, "Missing key.*embed.weight"),
        ({"embed.weight": table.weight, "embed.scale": torch.ones(1)}, "Unexpected key.*embed.scale"),
    ):
        with pytest.raises(RuntimeError, match=message):
            nested.load_state_dict(state)


def test_a_layer_without_memory_loads() -> None:
    """Built on the meta device, the layer takes its rows from a checkpoint."""
    with torch.device("meta"):
        embedding = VocabParallelEmbedding(26, 8, padding_size=16)
    table, _ = dense(26, 8)
    embedding.load_state_dict(table.state_dict(), assign=True)
    assert torch.equal(embedding(torch.arange(26)), table(torch.arange(26)))


def test_tied_weights_are_one_parameter() -> None:
    """A tied head uses the embedding's parameter; one that is split differently is refused."""
    embedding, head, _ = split(26, 20, 16)
    assert head.tie_weights(embedding).weight is embedding.weight
    with pytest.raises(LayerError, match="split in another way"):
        ParallelLMHead(26, 8, padding_size=16).tie_weights(embedding)


def test_logits_are_capped_then_scaled_and_cut() -> None:
    """Soft cap before scale, as in vLLM; the cut keeps the original ids, bias and dtype can be given."""
    _, linear = dense(26, 8, True)
    _, head, _ = split(26, 20, 16)
    x = torch.randn(2, 8)
    wanted = 0.5 * (3 * torch.tanh(linear(x) / 3))
    got = LogitsProcessor(26, org_vocab_size=20, scale=0.5, soft_cap=3.0)(head, x)
    torch.testing.assert_close(got, wanted[:, :20])
    assert torch.equal(LogitsProcessor(26, logits_as_input=True, scale=2.0)(None, x), 2 * x)
    wide = LogitsProcessor(26, head_dtype=torch.float64)(head, x)
    torch.testing.assert_close(wide, linear.double()(x.double()))
    local = LogitsProcessor(26)(head, x, torch.zeros(head.shard.rows), skip_gather=True)
    assert local.shape == (2, 48)


def test_sizes_that_make_no_sense_are_refused() -> None:
    """More original ids than ids, none, or a padding of nothing."""
    for options in ({"org_num_embeddings": 11}, {"org_num_embeddings": 0}, {"padding_size": 0}):
        with pytest.raises(ValueError, match=r"it must"):
            VocabParallelEmbedding(10, 4, **options)


def one_graph(module: nn.Module, calls: list[tuple[Any, ...]]) -> None:
    """Each call equals eager, and one graph served all of them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for args in calls:
        torch.testing.assert_close(compiled(*args), module(*args))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_one_rank_is_one_graph() -> None:
    """No break, and no second graph for another batch or length."""
    embedding, head, process = split(26, 20, 16)
    head.logits_processor = process
    shapes = [(2, 3), (4, 5), (3, 7)]
    one_graph(embedding, [(torch.randint(26, shape),) for shape in shapes])
    one_graph(head, [(torch.randn(*shape, 8),) for shape in shapes])


# -- two ranks --------------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    """One of two processes over gloo on the loopback interface; writes down what each check raised."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    try:
        for name, check in CHECKS.items():
            with torch.inference_mode():
                try:
                    check(dist.group.WORLD)
                    found = "passed"
                except BaseException:
                    found = traceback.format_exc()
            Path(folder, f"{name}.{rank}").write_text(found)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both processes run all checks, as starting them takes longer than the checks; they are killed at the deadline."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while not context.join(timeout=1.0) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            process.kill()
    return folder


def _equal_dense(group: Any) -> None:
    """Embedding, gathered and all-gathered logits, saved and reloaded state: the dense layers', in any layout."""
    for vocab, org, padding in LAYOUTS:
        table, linear = dense(vocab, 8, True)
        embedding, head, process = split(vocab, org, padding, group)
        ids, x = torch.arange(vocab).view(1, -1), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(embedding(ids), table(ids)), (vocab, org, padding)
        torch.testing.assert_close(process(head, x), linear(x), rtol=1e-6, atol=1e-6)
        gathered = LogitsProcessor(vocab, use_all_gather=False)(head, x)
        assert (gathered is None) == (dist.get_rank() == 1)
        if gathered is not None:
            torch.testing.assert_close(gathered, linear(x), rtol=1e-6, atol=1e-6)
        whole = head.whole_state_dict()
        assert torch.equal(whole["weight"], linear.weight) and torch.equal(whole["bias"], linear.bias)
        own = copy.deepcopy(head)
        own.reset_parameters()
        own.load_state_dict(head.state_dict())
        assert head.state_dict().keys() == {"weight_shard", "bias_shard"} and torch.equal(own.weight, head.weight)


def _compiled(group: Any) -> None:
    """The collectives are inside the one graph."""
    embedding, head, process = split(26, 20, 16, group)
    head.logits_processor = process
    torch.manual_seed(2)
    shapes = [(2, 3), (4, 5), (3, 7)]
    one_graph(embedding, [(torch.randint(26, shape),) for shape in shapes])
    one_graph(head, [(torch.randn(*shape, 8),) for shape in shapes])


def _refusals(group: Any) -> None:
    """An unknown id raises on both ranks: none waits; a lost gradient is an error; without a sum each has its own."""
    embedding, head, _ = split(26, 20, 16, group)
    for bad in (-1, 26):
        with pytest.raises(IndexError):
            embedding(torch.tensor([bad]))
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(LayerError, match="carries no gradient"):
        head(torch.randn(1, 8, requires_grad=True))
    assert not embedding.weight.requires_grad
    unsummed = VocabParallelEmbedding(26, 8, group=group, padding_size=2, reduce_results=False)
    owned = [bool(row.any()) for row in unsummed(torch.tensor([0, 25]))]
    assert owned == [dist.get_rank() == 0, dist.get_rank() == 1]


def _generation(group: Any, model_type: str, tied: bool) -> None:
    """A Llama with its vocabulary split over two ranks gives the tokens of the whole one, also after restoring."""
    model = tiny_model(model_type)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    inputs = tiny_inputs(model, text_len=6)
    wanted = model.generate(**inputs, max_new_tokens=6)
    done = use_parallel_vocab_(model, group=group)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.shape[0] * 2 == embedding.num_embeddings
    assert (head.weight is embedding.weight) == tied
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), wanted)
    done.restore_()
    assert type(model.get_output_embeddings()) is nn.Linear
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), wanted)


CHECKS: dict[str, Callable[[Any], None]] = {
    "equal_dense": _equal_dense,
    "one_graph": _compiled,
    "refusals": _refusals,
    "tokens": partial(_generation, model_type="llama", tied=False),
    "tokens_tied": partial(_generation, model_type="llama", tied=True),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", list(CHECKS))
def test_two_ranks(folder: Path, name: str, rank: int) -> None:
    """The checks above, each on both ranks; one that hangs has left nothing behind."""
    result = folder / f"{name}.{rank}"
    assert result.exists(), f"rank {rank} did not finish {name} within {DEADLINE_SECONDS:.0f} s"
    assert result.read_text() == "passed"
