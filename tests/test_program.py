"""Lowered code as data: slots, segments, shared packages, and what is refused."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from compile_policy.program import Package, Program, Segment, Special


def _package(fn: object) -> Package:
    return Package(b"", lambda inputs: [t.clone() for t in fn(*inputs)])  # type: ignore[operator]


ADD = _package(lambda a, b: (a + b,))
SPLIT = _package(lambda a: (a * 2, a * 3))


def _chain() -> Program:
    """(w, x) -> x+w, then +w again, then (2y, 3y), then their sum; returns the sum and x itself."""
    segments = [
        Segment(0, (0, 1), (2,)),
        Segment(0, (0, 2), (3,)),
        Segment(1, (3,), (4, 5)),
        Segment(0, (4, 5), (6,)),
    ]
    return Program([ADD, SPLIT], segments, (6, 1), 2)


def test_segments_share_a_package_and_pass_slots_on() -> None:
    """Every result lands in its own slot, whichever segment made it, and inputs can be results."""
    w, x = torch.rand(3), torch.rand(3)
    for _ in range(2):
        total, same = _chain().run([w, x])
        torch.testing.assert_close(total, 5 * (x + 2 * w))
        assert same is x


def test_intermediate_results_are_let_go() -> None:
    """A result is alive from its segment to its last use, and one that nothing uses is let go at once."""
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def noted(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        made = [inputs[-1] + 1, inputs[-1] + 2]
        inputs.clear()
        counts.append(sum(r() is not None for r in alive))
        alive.extend(weakref.ref(t) for t in made)
        return made

    chain = [Segment(0, (0 if i == 0 else 2 * i - 1,), (2 * i + 1, 2 * i + 2)) for i in range(5)]
    (result,) = Program([Package(b"", noted)], chain, (9,), 1).run([torch.rand(3)])
    assert counts == [0, 1, 1, 1, 1]
    assert [r() is not None for r in alive].count(True) == 1 and alive[-2]() is result


def test_a_program_travels_as_json() -> None:
    """The description without the packages survives JSON and runs the same."""
    program = _chain()
    again = Program.from_dict(json.loads(json.dumps(program.to_dict())), program.packages)
    assert again.segments == program.segments and again.outputs == program.outputs
    w, x = torch.rand(3), torch.rand(3)
    torch.testing.assert_close(again.run([w, x])[0], program.run([w, x])[0])


def test_frequent_sizes_have_packages_of_their_own() -> None:
    """The other packages run when every size is the frequent one, and only then; they travel along."""
    plain, single = _package(lambda a: (a + 1,)), _package(lambda a: (a + 2,))
    special = Special(((0, 0, 1), (0, 1, 3)), (1, 0), ())
    program = Program([plain, single], [Segment(0, (0,), (1,)), Segment(0, (1,), (2,))], (2,), 1, special)
    again = Program.from_dict(json.loads(json.dumps(program.to_dict())), program.packages)
    for known in (program, again):
        for shape, added in (((1, 3), 3), ((2, 3), 2), ((1, 2), 2)):
            assert torch.equal(known.run([torch.zeros(shape)])[0], torch.full(shape, float(added)))


def test_masks_of_frequent_sizes_come_without_their_tail() -> None:
    """Cut behind the last key that is seen, in steps; whole where none is, where the memory is strided, and for other
    sizes. Padding in front, and holes, stay."""
    lengths: list[int] = []

    def note(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        lengths.append(mask.shape[3])
        return (x,)

    noted = _package(note)
    program = Program([noted], [Segment(0, (0, 1), (2,))], (2,), 2, Special(((0, 0, 1),), (0,), (1,)))
    program = Program.from_dict(json.loads(json.dumps(program.to_dict())), program.packages)

    def length(*seen: int, rows: int = 1, strided: bool = False) -> int:
        mask = torch.zeros(1, 1, 1, 100, dtype=torch.bool)
        mask[..., list(seen)] = True
        mask = mask.repeat_interleave(2, dim=3)[..., ::2] if strided else mask
        program.run([torch.zeros(rows), mask])
        return lengths[-1]

    assert [length(0), length(15), length(3, 16), length(95), length(96), length(99)] == [16, 16, 32, 96, 100, 100]
    assert [length(), length(5, rows=2), length(5, strided=True)] == [100, 100, 100]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": [[2, [0], [2]]]}, "package 2 of 2"),
        ({"segments": [[-1, [0], [2]]]}, "package -1 of 2"),
        ({"segments": [[0, [0, 2], [2]]]}, "not filled yet"),
        ({"segments": [[0, [0, -1], [2]]]}, "not filled yet"),
        ({"segments": [[0, [0, 1], [3]]]}, "wrong slots"),
        ({"outputs": [9]}, "nothing fills"),
        ({"segments": [[0, [0, 1]]]}, "not the description"),
        ({"n_inputs": None}, "not the description"),
        ({"special": [[[0, 0, 1]], [0, 0, 7, 0], []]}, "do not fit"),
        ({"special": [[[0, 0, 1]], [0], []]}, "do not fit"),
        ({"special": [[[5, 0, 1]], [0, 0, 1, 0], []]}, "those of inputs"),
        ({"special": [[], [0, 0, 1, 0], []]}, "those of inputs"),
        ({"special": [[[0, 0, 1]], [0, 0, 1, 0], [7]]}, "those of inputs"),
        ({"special": [[[0, 0]], [0, 0, 1, 0], []]}, "not the description"),
    ],
)
def test_a_damaged_description_is_refused(change: dict[str, object], message: str) -> None:
    """Slots that do not exist, results that would overwrite others, packages that are not there: all before a run."""
    data = _chain().to_dict() | change
    with pytest.raises(ValueError, match=message):
        Program.from_dict(data, [ADD, SPLIT])
