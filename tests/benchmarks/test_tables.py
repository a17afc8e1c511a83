import pytest

from transfusion.benchmarks.flops import Peak
from transfusion.benchmarks.results import Place, Result
from transfusion.benchmarks.tables import cells, markdown, print_tables, seconds
from transfusion.benchmarks.timing import Samples


PLACE = Place("train", "row", "S", "fp32", "step")
PEAK = Peak({"fp32": 1e9}, read=1e9)
RESULTS = [
    Result(PLACE, "ours", Samples([0.1, 0.2]), parameters=5_110_000, tokens=30, flops=75_000_000),
    Result(PLACE, "peer", Samples([0.3, 0.6]), parameters=15_200_000),
    Result(PLACE, "plain", None, note="MemoryError: no room"),
]


@pytest.mark.parametrize(
    ("value", "written"), [(12.34, "12.3 s"), (1.234, "1234 ms"), (0.01234, "12.3 ms"), (0.0012, "1.20 ms")]
)
def test_times_are_written_with_three_digits(value: float, written: str) -> None:
    assert seconds(value) == written


def test_a_table_has_what_somebody_fills() -> None:
    headings, *rows = cells(RESULTS, PEAK)
    table = [dict(zip(headings, row, strict=True)) for row in rows]
    assert table[0]["median"] == "150 ms" and table[0]["lowest to highest"] == "100 ms to 200 ms"
    assert table[0]["real tokens/s"] == "200" and table[0]["GFLOP/s (of the best product)"] == "0 (50 %)"
    assert table[0]["peer / this"] == "3.00" and table[1]["peer / this"] == ""
    assert table[0]["parameters"] == "5.11 M"
    assert table[2]["median"] == "failed" and table[2]["note"] == "MemoryError: no room"
    assert "GB/s (of the best reading)" not in headings and "plain / this" not in headings


def test_bytes_and_megabytes() -> None:
    token = Place("decode", "text", "S", "bf16", "token")
    memory = Place("memory", "row", "S", "fp32", "MB")
    text = markdown(
        [
            Result(token, "ours", Samples([0.01]), bytes=5_000_000),
            Result(memory, "ours", Samples([283.4])),
            Result(memory, "peer", Samples([850.2])),
        ],
        PEAK,
    )
    assert "**decode: text, S, bf16, per token**" in text and "| ours | 10.0 ms | 0.5 (50 %) |" in text
    assert "**memory: row, S, fp32**" in text and "| ours | 283 MB | 3.00 |" in text


def test_markdown_is_rectangular(capsys: pytest.CaptureFixture) -> None:
    lines = markdown(RESULTS).splitlines()
    assert lines[0] == "**train: row, S, fp32, per step**" and lines[3].startswith("| --- | ---: |")
    assert len({line.count("|") for line in lines[2:]}) == 1
    print_tables(RESULTS, PEAK)
    printed = capsys.readouterr().out
    assert "train: row, S, fp32, per step" in printed and "15.2 M" in printed
