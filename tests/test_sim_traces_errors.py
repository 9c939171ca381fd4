"""A malformed trace gets one line: file, line, field, value, rule. And may be skipped, and is counted."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import ANY_CSV, AZURE, BAILIAN, BURSTGPT, MOONCAKE, SHAREGPT, TEXTS, write

from sim.request import Request
from sim.traces import TraceError, read_trace

COLUMNS = "arrival=when,prompt=in,output=out"


def problem(path: Path, **arguments: Any) -> str:
    """Return the error's one line, behind the file's name."""
    with pytest.raises(TraceError) as caught:
        read_trace(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:").strip()


def changed(text: str, line: int, old: str, new: str) -> str:
    lines = text.splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    return "\n".join(lines) + "\n"


CSV_CASES = [
    ("azure", 3, ",8", "", "3: field 'GeneratedTokens' is missing: the row has 2 fields and must have 3"),
    ("azure", 3, "3180", "-3180", "3: field 'ContextTokens' (-3180) must be at least 1"),
    ("azure", 3, "3180", "0", "3: field 'ContextTokens' (0) must be at least 1"),
    ("azure", 3, ",8", ",0", "3: field 'GeneratedTokens' (0) must be at least 1"),
    ("azure", 3, "3180", "", "3: field 'ContextTokens' is missing"),
    ("azure", 3, "3180", "many", "3: field 'ContextTokens' ('many') must be an integer"),
    ("azure", 3, "3180", "nan", "3: field 'ContextTokens' ('nan') must be an integer"),
    ("azure", 3, "3180", "31.8", "3: field 'ContextTokens' ('31.8') must be an integer"),
    ("azure", 3, "3180", "100000001", "3: field 'ContextTokens' (100000001) must be at most 100000000"),
    ("azure", 3, "3180", "9" * 5000, "3: field 'ContextTokens' must have at most 30 digits"),
    (
        "azure",
        3,
        ",8",
        ",8,1",
        "3: field 'GeneratedTokens' must be the last: the row has 4 fields and must have 3",
    ),
    (
        "azure",
        3,
        "18:17:04",
        "17:17:04",
        "3: field 'TIMESTAMP' (3599.95 s before the row above) must not decrease",
    ),
    (
        "azure",
        3,
        "2023-11-16 18:17:04.0319601",
        "1700158624",
        "3: field 'TIMESTAMP' ('1700158624') must be a timestamp, YYYY-MM-DD HH:MM:SS[.fraction][offset]",
    ),
    (
        "azure",
        3,
        "2023-11-16 18:17:04.0319601",
        "2023-02-29 18:17:04",
        "3: field 'TIMESTAMP' ('2023-02-29 18:17:04') must be an existing date and time",
    ),
    ("azure", 3, "2023-11-16 18:17:04.0319601", "", "3: field 'TIMESTAMP' is missing"),
    (
        "azure",
        4,
        "2023-11-17",
        "2033-11-17",
        "4: field 'TIMESTAMP' (3654.0 days after the start) must be within 104.2 days of it",
    ),
    ("burstgpt", 3, "230", "-1", "3: field 'Response tokens' (-1) must be at least 1"),
    (
        "burstgpt",
        3,
        "230",
        "0",
        "3: field 'Response tokens' (0) must be at least 1; such a request got no answer, and skip_bad leaves it out",
    ),
    ("burstgpt", 3, "45.25", "soon", "3: field 'Timestamp' ('soon') must be a number"),
    ("burstgpt", 3, "45.25", "NaN", "3: field 'Timestamp' ('NaN') must be a finite number"),
    ("burstgpt", 3, "45.25", "inf", "3: field 'Timestamp' ('inf') must be a finite number"),
    ("burstgpt", 3, "45.25", "1e40", "3: field 'Timestamp' (1E+40) must have at most 30 digits"),
    ("burstgpt", 3, "45.25", "4.5", "3: field 'Timestamp' (0.5 s before the row above) must not decrease"),
    (
        "burstgpt",
        4,
        "118.0,ChatGPT,417,276,693,Conversation log",
        "118.0,ChatGPT,41",
        "4: field 'Response tokens' is missing: the row has 3 fields and must have 6",
    ),
    (
        "burstgpt",
        1,
        "Response tokens",
        "Answer",
        "1: field 'Response tokens' is missing in the header (Timestamp, Model, Request tokens, Answer, Total tokens, "
        "Log Type): the burstgpt format needs Timestamp, Request tokens, Response tokens",
    ),
    (
        "azure",
        1,
        "GeneratedTokens",
        "ContextTokens",
        "1: field 'ContextTokens' must not occur twice in the header (TIMESTAMP, ContextTokens, ContextTokens): "
        "the azure format needs TIMESTAMP, ContextTokens, GeneratedTokens",
    ),
]


@pytest.mark.parametrize(("name", "line", "old", "new", "message"), CSV_CASES)
def test_malformed_csv(tmp_path: Path, name: str, line: int, old: str, new: str, message: str) -> None:
    assert problem(write(tmp_path, changed(TEXTS[name], line, old, new))) == message


def without(field: str) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.pop(field)


def having(field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.update({field: value})


JSON_CASES = [
    ("mooncake", without("hash_ids"), "field 'hash_ids' is missing"),
    ("mooncake", without("timestamp"), "field 'timestamp' is missing"),
    ("mooncake", having("timestamp", None), "field 'timestamp' (null) must not be null"),
    ("mooncake", having("timestamp", "5"), None),  # a number in quotes is a number still
    ("mooncake", having("timestamp", float("nan")), "field 'timestamp' (nan) must be a finite number"),
    ("mooncake", having("timestamp", float("inf")), "field 'timestamp' (inf) must be a finite number"),
    ("mooncake", having("timestamp", True), "field 'timestamp' (True) must be an integer"),
    ("mooncake", having("timestamp", [1]), "field 'timestamp' ([1]) must be a finite number"),
    ("mooncake", having("timestamp", 10**16), "must be within 104.2 days of it"),
    (
        "mooncake",
        having("timestamp", 27481),
        "field 'timestamp' (0.001 s before the row above) must not decrease",
    ),
    ("mooncake", having("input_length", -5), "field 'input_length' (-5) must be at least 1"),
    (
        "mooncake",
        having("input_length", 10**12),
        "field 'input_length' (1000000000000) must be at most 100000000",
    ),
    ("mooncake", having("input_length", 10**40), "field 'input_length' must have at most 30 digits"),
    ("mooncake", having("input_length", 1024.5), "field 'input_length' (1024.5) must be an integer"),
    ("mooncake", having("output_length", 0), "field 'output_length' (0) must be at least 1"),
    (
        "mooncake",
        having("hash_ids", [1]),
        "field 'hash_ids' (1 ids) must have 2 for 1024 tokens in chunks of 512",
    ),
    (
        "mooncake",
        having("hash_ids", [1, 2, 3]),
        "field 'hash_ids' (3 ids) must have 2 for 1024 tokens in chunks of 512",
    ),
    (
        "mooncake",
        having("hash_ids", []),
        "field 'hash_ids' (0 ids) must have 2 for 1024 tokens in chunks of 512",
    ),
    ("mooncake", having("hash_ids", [1, -2]), "field 'hash_ids' (-2) must hold no negative id"),
    (
        "mooncake",
        having("hash_ids", [1, 2**63]),
        "field 'hash_ids' (9223372036854775808) must hold no id above",
    ),
    ("mooncake", having("hash_ids", [1, "2"]), "field 'hash_ids' ('2') must hold integers only"),
    ("mooncake", having("hash_ids", [1, True]), "field 'hash_ids' (True) must hold integers only"),
    ("mooncake", having("hash_ids", [1, 2.5]), "field 'hash_ids' (2.5) must hold integers only"),
    ("mooncake", having("hash_ids", 7), "field 'hash_ids' (7) must be a list"),
    ("bailian", without("parent_chat_id"), "field 'parent_chat_id' is missing"),
    ("bailian", without("chat_id"), "field 'chat_id' is missing"),
    (
        "bailian",
        having("hash_ids", [1]),
        "field 'hash_ids' (1 ids) must have 2 for 32 tokens in chunks of 16",
    ),
    (
        "bailian",
        having("timestamp", 60),
        "field 'timestamp' (1.114 s before the row above) must not decrease",
    ),
    ("bailian", having("chat_id", "x"), "field 'chat_id' ('x') must be an integer"),
    (
        "sharegpt",
        having("input_tok_ids", [1, 2, 3]),
        "field 'input_tok_ids' (3 ids) must have 2, one a token",
    ),
    (
        "sharegpt",
        having("input_tok_ids", [1, 2**31]),
        "field 'input_tok_ids' (2147483648) must hold no id above",
    ),
    ("sharegpt", having("output_tok_ids", [1]), "field 'output_tok_ids' (1 ids) must have 2, one a token"),
    ("sharegpt", without("input_tok_ids"), "field 'input_tok_ids' is missing"),
    ("sharegpt", having("arrival_time_ns", -1), "field 'arrival_time_ns' (1.001e-06 s before the row above)"),
]


@pytest.mark.parametrize(("name", "change", "message"), JSON_CASES)
def test_malformed_json_lines(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], message: str | None
) -> None:
    lines = TEXTS[name].splitlines()
    record = json.loads(lines[1])
    change(record)
    lines[1] = json.dumps(record)
    path = write(tmp_path, "\n".join(lines))
    if message is None:
        path = write(tmp_path, lines[1])
        assert len(read_trace(path)) == 1
        return
    found = problem(path)
    assert found.startswith("2: field")
    assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp": 27482, "input_len', "2: line must be one JSON object, but: Unterminated string"),
        ('{"timestamp": 27482', "2: line must be one JSON object, but: Expecting ',' delimiter at column 20"),
        ("[1, 2]", "2: line ('[1, 2]') must be one JSON object"),
        ("7", "2: line ('7') must be one JSON object"),
        ("[" * 100_000, "2: line must be one JSON object, but: "),
    ],
)
def test_lines_that_are_no_object(tmp_path: Path, line: str, message: str) -> None:
    first = MOONCAKE.splitlines()[0]
    assert problem(write(tmp_path, f"{first}\n{line}")).startswith(message)
    # in the first line nothing tells the format, unless it was named
    named = problem(write(tmp_path, line), format="mooncake")
    assert named.startswith(message.replace("2:", "1:", 1))


@pytest.mark.parametrize("name", ["mooncake", "bailian", "sharegpt"])
@pytest.mark.parametrize("value", ["5", "5" * 6000])
def test_a_key_that_occurs_twice(tmp_path: Path, name: str, value: str) -> None:
    first, second, *rest = TEXTS[name].splitlines()
    field = re.findall('"([a-z_]+)"', first)[2]
    doubled = second.removesuffix("}") + f', "x": {{}}, "{field}": {value}}}'
    path = write(tmp_path, "\n".join([first, doubled, *rest]))
    assert problem(path) == f"2: field {field!r} must not occur twice"
    assert read_trace(path, skip_bad=True).skipped == 1
    assert problem(write(tmp_path, doubled)) == f"1: field {field!r} must not occur twice"


@pytest.mark.parametrize("number", ["1e9999999999999999999", "-1.5E+1000000000", "1e-99999999999999999999"])
def test_an_endless_exponent_is_named(tmp_path: Path, number: str) -> None:
    rule = f"('{number}') must have an exponent of at most 9 digits"
    first = MOONCAKE.splitlines()[0]
    path = write(tmp_path, f"{first}\n{first.replace('27482', number, 1)}\n")
    if "99999" in number:
        assert problem(path) == f"2: field 'timestamp' {rule}"
        assert read_trace(path, skip_bad=True).skipped == 1
    path = write(tmp_path, f"Timestamp,Request tokens,Response tokens\n{number},1,1\n")
    assert problem(path) == f"2: field 'Timestamp' {rule}"
    whole = write(tmp_path, first.replace("1030", number, 1))
    assert problem(whole).startswith("1: field 'input_length' (")


@pytest.mark.parametrize("offset", ["+99:99", "-24:00", "+00:60", "+9999"])
def test_an_offset_is_less_than_a_day(tmp_path: Path, offset: str) -> None:
    time = f"2023-11-16 18:17:04{offset}"
    path = write(tmp_path, f"{AZURE.splitlines()[0]}\n{time},1,1\n")
    assert problem(path) == f"2: field 'TIMESTAMP' ('{time}') must have an offset from UTC of at most 23:59"
    assert len(read_trace(write(tmp_path, f"{AZURE.splitlines()[0]}\n{time[: -len(offset)]}-23:59,1,1"))) == 1


def test_line_ends_in_names_do_not_break_the_line(tmp_path: Path) -> None:
    header = 'TIMESTAMP,"Context\r\nTokens",GeneratedTokens\n'
    message = "2: field 'ContextTokens' is missing in the header (TIMESTAMP, Context Tokens, GeneratedTokens)"
    assert problem(write(tmp_path, header)).startswith(message)
    wide = ",".join(f"column{place}" for place in range(1000))
    assert len(problem(write(tmp_path, wide), format="azure")) < 250
    with pytest.raises(TraceError) as caught:
        read_trace(write(tmp_path, header, "two\nlines"))
    assert str(caught.value).startswith(f"{tmp_path}/two lines:{message}")
    with pytest.raises(TraceError) as caught:
        read_trace(tmp_path / "no\u2028file")
    assert str(caught.value) == f"{tmp_path}/no file: cannot be read: No such file or directory"


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    header = "TIMESTAMP,\x1b[2JContext\x18Tokens\u202e,Größe\u00a0(B)\n"
    told = r"(TIMESTAMP, \x1b[2JContext\x18Tokens\u202e, Größe (B))"
    assert f"is missing in the header {told}: " in problem(write(tmp_path, header), format="azure")
    assert problem(write(tmp_path, '{"\\u001b[2J\\ud800": 1}')).startswith(
        r"1: keys (\x1b[2J\ud800) must be "
    )
    table = pl.DataFrame({"\x1b[2J": [1]})
    table.write_parquet(tmp_path / "t")
    assert problem(tmp_path / "t").endswith(r"is missing among the columns (\x1b[2J)")


def outcome(path: Path, name: str) -> int | str:
    """Return how many requests were read, or the error's message."""
    try:
        return len(read_trace(path, format=name))
    except TraceError as error:
        return str(error)


@pytest.mark.parametrize(("name", "text"), sorted(TEXTS.items()))
def test_every_cut_of_a_file_is_read_or_refused_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    whole = 0
    for size in range(len(text)):
        path = write(tmp_path, text[:size])
        found = outcome(path, name)
        if isinstance(found, int):
            whole += 1
            assert 1 <= found <= 3
        else:
            assert re.fullmatch(rf"{re.escape(str(path))}(:[1-4])?: [^\n]+", found)
    assert 2 <= whole < len(text) / 4


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_line(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = write(Path(folder), data)
        for start in (b"", *(text.encode()[:60] for text in TEXTS.values()), b"PAR1"):
            path.write_bytes(start + data)
            with pytest.raises(TraceError) as caught:
                read_trace(path)
            assert "\n" not in str(caught.value)
            assert str(caught.value).startswith(str(path))


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    assert problem(write(tmp_path, "")) == "must hold at least one request, but is empty"
    assert problem(write(tmp_path, "\n\n")) == "must hold at least one request, but is empty"
    assert problem(write(tmp_path, AZURE.splitlines()[0])) == "must hold at least one request"
    assert problem(write(tmp_path, ""), format="mooncake") == "must hold at least one request"
    assert problem(write(tmp_path, b"\x89PNG\r\n\x1a\n\0\0\0")) == "1: byte 1 must be UTF-8 text"
    assert problem(write(tmp_path, b"a,b\0c\n")) == "1: must be text, but holds a NUL byte"
    assert problem(write(tmp_path, AZURE.encode() + b"\r\n\xff")) == "5: byte 1 must be UTF-8 text"
    for data, kind in ((gzip.compress(AZURE.encode()), "gzip"), (AZURE.encode("utf-16"), "UTF-16")):
        said = problem(write(tmp_path, data))
        assert said.endswith(f"must be UTF-8 text, but looks like {kind}")
    assert problem(write(tmp_path, '{"a": 1}')) == (
        "1: keys (a) must be those of one of "
        "bailian (chat_id, parent_chat_id, timestamp, input_length, output_length, hash_ids), "
        "sharegpt (arrival_time_ns, input_toks, output_toks, input_tok_ids), "
        "mooncake (timestamp, input_length, output_length, hash_ids)"
    )
    assert problem(write(tmp_path, "a,b,c\n1,2,3\n")) == (
        "1: header (a, b, c) must be that of one of azure (TIMESTAMP, ContextTokens, GeneratedTokens), "
        "burstgpt (Timestamp, Request tokens, Response tokens), or columns be named: "
        "arrival=NAME,prompt=NAME,output=NAME"
    )
    assert problem(write(tmp_path, 'a,b\n"1,2\n'), columns="arrival=a,prompt=a,output=b") == (
        "2: must be CSV: unexpected end of data"
    )
    assert problem(tmp_path / "absent") == "cannot be read: No such file or directory"
    assert problem(tmp_path) == "must be a regular file"
    assert problem(tmp_path, format="azure") == "must be a regular file"
    assert problem(write(tmp_path, BURSTGPT), format="azure").startswith(
        "1: field 'TIMESTAMP' is missing in the header"
    )
    assert problem(write(tmp_path, MOONCAKE), format="bailian").startswith(
        "1: field 'parent_chat_id' is missing"
    )


def test_csv_columns_are_looked_up_and_typed_alike(tmp_path: Path) -> None:
    path = write(tmp_path, ANY_CSV)
    assert problem(path, columns="arrival=when,prompt=in,output=outt") == (
        "1: field 'outt' is missing in the header (when, in, what, out, urgency): the csv format needs when, in, outt"
    )
    mixed = write(tmp_path, "when,in,out\n5,1,1\n2024-01-01 00:00:00,1,1\n", "mixed")
    assert problem(mixed, columns=COLUMNS) == "3: field 'when' ('2024-01-01 00:00:00') must be a number"
    mixed = write(tmp_path, "when,in,out\n2024-01-01 00:00:00,1,1\n5,1,1\n", "mixed")
    assert problem(mixed, columns=COLUMNS).startswith("3: field 'when' ('5') must be a timestamp")
    neither = write(tmp_path, "when,in,out\nnoon,1,1\n", "neither")
    assert problem(neither, columns=COLUMNS) == "2: field 'when' ('noon') must be a number"
    rushed = changed(ANY_CSV, 3, "-2", "99999999999")
    assert problem(write(tmp_path, rushed), columns=f"{COLUMNS},priority=urgency") == (
        "3: field 'urgency' (99999999999) must fit in 32 bits"
    )


def test_skip_bad_counts_and_goes_on(tmp_path: Path) -> None:
    lines = AZURE.splitlines()
    bad = ["2023-11-16 18:17:03.98,x,1", "2023-11-16", "2020-01-01 00:00:00,5,5", "2023-11-16 18:17:04,0,5"]
    path = write(
        tmp_path, "\n".join([lines[0], bad[0], lines[1], bad[1], bad[2], lines[2], bad[3], lines[3]])
    )
    trace = read_trace(path, skip_bad=True)
    assert trace.skipped == 4
    whole = read_trace(write(tmp_path, AZURE, "whole"))
    assert [(request.request_id, request.arrival_ps) for request in trace] == [
        (request.request_id, request.arrival_ps) for request in whole
    ]
    nothing = write(tmp_path, "\n".join([lines[0], bad[0], bad[1]]), "nothing")
    assert problem(nothing, skip_bad=True) == (
        "must hold at least one request (2 malformed rows skipped, "
        "the first in line 2: field 'ContextTokens' ('x') must be an integer)"
    )


def test_a_trace_of_which_no_request_was_answered(tmp_path: Path) -> None:
    header, *rows = BURSTGPT.splitlines()
    fields = [row.split(",") for row in rows]
    place = header.split(",").index("Response tokens")
    silent = "\n".join([header, *(",".join([*row[:place], "0", *row[place + 1 :]]) for row in fields)])
    why = "field 'Response tokens' (0) must be at least 1; such a request got no answer, and skip_bad leaves it out"
    assert problem(write(tmp_path, silent)) == f"2: {why}"
    assert problem(write(tmp_path, silent), skip_bad=True) == (
        f"must hold at least one request ({len(rows)} malformed rows skipped, the first in line 2: {why})"
    )


@pytest.mark.parametrize("kind", ["azure", "burstgpt", "mooncake", "bailian"])
def test_lines_that_end_in_cr_alone(tmp_path: Path, kind: str) -> None:
    text = TEXTS[kind]
    path = tmp_path / "trace"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert list(map(vars_of, read_trace(path))) == list(map(vars_of, read_trace(write(tmp_path, text, "lf"))))
    path.write_bytes(text.replace("\n", "\r").encode())
    rule = "must end in LF or CRLF, and a CR stands alone"
    if kind in ("azure", "burstgpt"):
        rule = "must end its lines in LF or CRLF, but holds a CR alone"
    assert problem(path).startswith("1: ")
    assert problem(path).endswith(rule)


def vars_of(request: Request) -> tuple[int, ...]:
    return request.arrival_ps, request.prompt_tokens, request.output_tokens


@pytest.mark.parametrize("digits", ["9" * 6000, "-" + "9" * 6000, "9" * 4000])
def test_a_number_of_more_digits_than_python_reads_is_one_of_its_field(tmp_path: Path, digits: str) -> None:
    first = MOONCAKE.splitlines()[0]
    row = {"timestamp": "0", "input_length": "512", "output_length": "3", "hash_ids": "[7]"}

    def problem_of(**fields: str) -> str:
        named = ", ".join(f'"{name}": {value}' for name, value in {**row, **fields}.items())
        return problem(write(tmp_path, f"{first}\n{{{named}}}\n"))

    for name in ("timestamp", "input_length", "output_length"):
        assert problem_of(**{name: digits}) == f"2: field {name!r} must have at most 30 digits"
    assert problem_of(timestamp=f"{digits}.5").startswith("2: field 'timestamp' (")
    told = problem_of(hash_ids=f"[{digits}]")
    rule = "no negative id" if digits.startswith("-") else f"no id above {2**63 - 1}"
    assert re.fullmatch(rf"2: field 'hash_ids' \(-?[0-9]{{30,37}}\S*\) must hold {rule}", told)
    assert problem_of(input_length=f"{digits},").startswith("2: line must be one JSON object, but: ")


def test_skip_bad_keeps_sessions_right(tmp_path: Path) -> None:
    lines = BAILIAN.splitlines()
    path = write(tmp_path, "\n".join(["{", lines[0], "{}", lines[1], lines[2]]))
    trace = read_trace(path, format="bailian", skip_bad=True)
    assert trace.skipped == 2
    assert [request.parent for request in trace] == [-1, -1, 0]
    orphaned = write(tmp_path, "\n".join([lines[1], lines[2]]))
    assert [request.parent for request in read_trace(orphaned)] == [-1, -1]


def test_skip_bad_mooncake(tmp_path: Path) -> None:
    lines = MOONCAKE.splitlines()
    trace = read_trace(
        write(tmp_path, "\n".join([lines[0], lines[1][:40], lines[2], SHAREGPT])), skip_bad=True
    )
    assert (len(trace), trace.skipped) == (2, 3)
