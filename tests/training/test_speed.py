from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch._inductor.exc import InvalidCxxCompiler

from tests.tiny import make_batch, tiny_model
from transfusion.training import speed
from transfusion.training.speed import choose_attention, choose_packing, compile_for_training, not_compiling


@pytest.mark.parametrize(
    ("on_cuda", "longest", "expected"),
    [(False, 35, "eager"), (False, 311, "sdpa"), (True, 35, "flex_attention"), (True, 8192, "flex_attention")],
)
def test_attention_is_chosen_for_the_machine(
    on_cuda: bool, longest: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    monkeypatch.setattr(speed, "has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name)
    model = tiny_model()
    choose_attention(model, longest)
    assert model.config._attn_implementation == expected
    choose_attention(model, longest, "eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("triton", "compiler"), [(False, True), (True, False)])
def test_a_gpu_without_compilers_is_used_as_it_is(
    triton: bool, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed, "has_triton", lambda: triton)
    monkeypatch.setattr("shutil.which", lambda name: name if compiler else None)
    model = tiny_model()
    choose_attention(model, 8192)
    assert model.config._attn_implementation == "sdpa" and not speed.can_compile()


def test_rows_of_a_mixture_are_sampled_from_all_sources() -> None:
    rows = [{"input_ids": [0] * (70 if index % 2 else 2000)} for index in range(10240)]
    lengths = speed.sample_lengths(rows)
    assert len(lengths) == 256 and set(lengths) == {70, 2000}
    assert len(speed.sample_lengths(rows[:5])) == 5


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([300, 100, 100], 1200), ([300, 290, 280], None), ([60, 10, 10], None), ([300], None)],
    ids=["ragged", "alike", "short", "one"],
)
def test_ragged_rows_are_packed(lengths: list[int], expected: int | None) -> None:
    assert choose_packing(lengths, 4) == expected


@pytest.mark.parametrize(
    ("wanted", "minutes", "steps", "compiles"),
    [
        (None, 12.0, None, True),
        (None, 3.0, None, False),
        (None, None, 5000, True),
        (None, None, 100, False),
        (None, None, None, False),
        (True, 1.0, None, True),
        (False, 60.0, None, False),
    ],
)
def test_long_trainings_are_compiled(
    wanted: bool | None, minutes: float | None, steps: int | None, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny_model(), []
    monkeypatch.setattr(type(model), "compile_layers", lambda self, **options: asked.append(options))
    compile_for_training(model, wanted, minutes, steps)
    assert asked == [{"dynamic": True}] * compiles


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thinnest seam: torch says that there is none."""

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    assert not speed.can_compile()
    model, asked = tiny_model(), []
    monkeypatch.setattr(type(model), "compile_layers", lambda self, **options: asked.append(options))
    compile_for_training(model, None, 60.0, None)
    assert not asked
    with pytest.raises(ValueError, match="compile=True, and there is no C"):
        compile_for_training(model, True, 60.0, None)


def test_one_graph_serves_batches_of_all_lengths_and_none_is_made_in_between() -> None:
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    model = tiny_model(objective="flow")
    batches: list[dict[str, Any]] = [make_batch([[5] * length + [(2, 2)], [6, 7]]) for length in (3, 5, 8)]
    expected = [model(**batch).logits for batch in batches]
    model.compile_layers(backend=graphs, dynamic=True)
    with not_compiling():
        model(**batches[0])
    assert graphs.frame_count == 0
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(**batch, use_cache=False).logits, logits)
    assert graphs.frame_count == 1
