import pytest

from transfusion.benchmarks.workloads import (
    GPU_ONE_8K,
    LONG_4K,
    LONG_8K,
    MIXED,
    PACKED_8K,
    ROW,
    SIZES,
    Denoising,
    num_patches,
    num_tokens,
)


def test_a_document_has_two_tags_for_each_image_and_an_end() -> None:
    document = (3, (2, 3), 4, (1, 1))
    assert num_tokens(document) == 3 + (6 + 2) + 4 + (1 + 2) + 1
    assert num_patches(document) == 7


def test_the_declared_lengths() -> None:
    assert [num_tokens(document) for document in MIXED] == [311, 25, 101, 118, 605, 362, 151, 323]
    assert num_tokens(ROW) == 307
    assert PACKED_8K.tokens == 26 * 307 <= PACKED_8K.longest == 8192
    for workload, length in ((LONG_4K, 4096), (LONG_8K, 8192), (GPU_ONE_8K, 8192)):
        assert 0.95 * length < workload.tokens <= length == workload.longest


def test_the_branch_without_text_sees_begin_of_image_alone() -> None:
    assert Denoising("", 2, 32, guidance=3.0).prefixes == [33, 33, 1, 1]
    assert Denoising("", 2, 32, guidance=1.0).prefixes == [33, 33]


@pytest.mark.parametrize(("name", "inner"), [("S", 680), ("M", 1368), ("0.3B", 2728)])
def test_feed_forward_layers_are_as_wide_as_the_peers(name: str, inner: int) -> None:
    assert SIZES[name].inner == inner
    assert abs(inner / (SIZES[name].width * 8 / 3) - 1) < 0.005
