"""Forms: fields are found where they lie, files are stepped over, and what two readers could read in two ways is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import InvalidRequest
from proxy.exchange import Record, UsageSource
from proxy.wire import audio
from proxy.wire.audio import AudioRequest
from proxy.wire.form import boundary_of, read_form
from proxy.wire.stream import Terms

TYPE = b"multipart/form-data; boundary=XX"
TRANSCRIBE = audio.OPERATIONS[0]


def form(*parts: bytes, boundary: bytes = b"XX") -> bytes:
    return b"".join([b"--%b\r\n%b\r\n" % (boundary, part) for part in parts]) + b"--%b--\r\n" % boundary


def field(name: str, value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (name.encode(), data)


def file(name: str, data: bytes) -> bytes:
    head = b'Content-Disposition: form-data; name="%b"; filename="a.wav"\r\nContent-Type: audio/wav' % name.encode()
    return head + b"\r\n\r\n" + data


def read(*parts: bytes, content_type: bytes = TYPE) -> tuple[AudioRequest, Record]:
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    request = TRANSCRIBE.read(form(*parts), record, content_type)
    assert isinstance(request, AudioRequest)
    return request, record


@pytest.mark.parametrize("first", ["model", "file"])
def test_the_order_of_parts_is_the_clients(first: str) -> None:
    parts = [field("model", "whisper"), file("file", b"\x00\r\n--X\r\n\r\nRIFF"), field("stream", "True")]
    request, record = read(*(parts if first == "model" else reversed(parts)))
    assert (request.model, request.stream, record.model, record.stream) == ("whisper", True, "whisper", True)


def test_a_model_may_be_left_out() -> None:
    assert read(file("file", b"x"))[0].model == ""


@settings(deadline=None)
@given(st.binary(max_size=200), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20))
def test_a_file_may_hold_anything_but_its_boundary(data: bytes, model: str) -> None:
    boundary = b"a-boundary-that-is-nowhere-else"
    body = form(file("file", data), field("model", model), boundary=boundary)
    assert read_form(body, b'multipart/form-data; boundary="%b"' % boundary).fields == {"model": model.encode()}


@pytest.mark.parametrize("filename", ['"a.wav"', '""', '"a;b\\\\c.wav"', "a.wav", "a.wav; filename*=utf-8''a.wav"])
def test_a_file_is_what_has_a_filename_however_it_is_written(filename: str) -> None:
    body = form(f'Content-Disposition: form-data; name="model"; filename={filename}\r\n\r\nm'.encode())
    assert read_form(body, TYPE).fields == {}


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=XX", b"XX"),
        (b'multipart/form-data;boundary="X X"', b"X X"),
        (b"multipart/form-data; charset=utf-8; BOUNDARY=X-X ; a=b", b"X-X"),
    ],
)
def test_boundaries(content_type: bytes, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize("content_type", [b"multipart/form-data", b"multipart/form-data; boundary=", b'a; boundary="x\\"y"'])
def test_boundaries_that_are_none(content_type: bytes) -> None:
    with pytest.raises(InvalidRequest) as raised:
        boundary_of(content_type)
    assert raised.value.param == "Content-Type"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--XX",
        b"--XX--",
        b"preamble\r\n" + form(field("model", "m")),
        form(field("model", "m")) + b"epilogue",
        form(field("model", "m"))[:-8],
        b"--XXY\r\n" + form(field("model", "m")),
        b"--XX \r\n" + field("model", "m") + b"\r\n--XX--",
        form(b"\r\nvalue"),
        form(b'Content-Disposition: form-data; name="model"\n\r\n\r\nm'),
        form(b"Content-Disposition: form-data; name=\"model\"; filename*=UTF-8''a.wav\r\n\r\nm"),
        form(b'Content-Disposition: form-data; name="model"; filename="a\\"\r\n\r\nm'),
        b'--XX\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + form(field("model", "m")),
        form(b'Content-Disposition: attachment; name="model"\r\n\r\nm'),
        form(b"Content-Disposition: form-data; name=model\r\n\r\nm"),
        form(b'Content-Disposition: form-data; name="mod\\"el"\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="a"; name="model"\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="a"\r\nContent-Disposition: form-data; name="model"\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: base64\r\n\r\nbQ=='),
        form(*[field(f"x{index}", "") for index in range(100)]),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(body: bytes) -> None:
    try:
        read_form(body, TYPE)
    except InvalidRequest as error:
        assert "isn't a form" in error.message  # noqa: PT017
        return
    assert body == b"--XX--"  # a form without parts is one


def test_a_field_that_stands_twice_is_refused() -> None:  # failure 36
    with pytest.raises(InvalidRequest) as raised:
        read(field("model", "a"), field("model", "b"))
    assert raised.value.param == "model"
    several = [field("timestamp_granularities[]", "word"), field("timestamp_granularities[]", "segment")]
    assert read(field("model", "a"), *several)[0].model == "a"


@pytest.mark.parametrize("value", ["maybe", "2", "null"])
def test_a_flag_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(field("stream", value))
    assert raised.value.param == "stream"


def test_a_large_field_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="more than"):
        read(field("prompt", "x" * 100_000))


@pytest.mark.parametrize(
    ("parts", "kind", "asked", "terms"),
    [
        ([], "vllm", [], Terms()),
        ([field("stream", "true")], "openai", [], Terms()),
        (
            [field("stream", "true")],
            "vllm",
            [b"stream_continuous_usage_stats", b"stream_include_usage"],
            Terms(cut_usage=True, drop_usage_chunk=True),
        ),
        (
            [field("stream", "true"), field("stream_include_usage", "true")],
            "vllm",
            [b"stream_continuous_usage_stats"],
            Terms(cut_usage=True),
        ),
        (
            [field("stream", "1"), field("stream_include_usage", "1"), field("stream_continuous_usage_stats", "1")],
            "vllm",
            [],
            Terms(),
        ),
        ([field("stream", "1"), field("stream_include_usage", "false")], "vllm", [], Terms()),
        (
            [field("stream", "1"), field("stream_continuous_usage_stats", "false")],
            "vllm",
            [b"stream_include_usage"],
            Terms(cut_usage=True, drop_usage_chunk=True),
        ),
    ],
)
def test_usage_is_asked_for_before_the_clients_own_parts(
    parts: list[bytes], kind: str, asked: list[bytes], terms: Terms
) -> None:  # failure 17
    body = form(*parts, file("file", b"RIFF"))
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    upstream = TRANSCRIBE.prepare(body, TRANSCRIBE.read(body, record, TYPE), kind)
    assert upstream.body is body
    assert (upstream.terms, upstream.content_type) == (terms, b'multipart/form-data; boundary="XX"')
    sent = read_form(upstream.before + body, upstream.content_type)
    for name in asked:
        assert sent.fields[name.decode()] == b"true"
    assert upstream.before.count(b"form-data") == len(asked)


def test_a_files_bytes_are_no_tokens() -> None:
    record = Record(b"i" * 16, b"t" * 16, 1, 0, request_bytes=4_000_000)
    TRANSCRIBE.estimate(record, 80)
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (0, 20, UsageSource.ESTIMATED)


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (b'{"text":"x","usage":{"type":"duration","seconds":3}}', 3),
        (b'{"duration":2.5,"text":"x","segments":[]}', 3),
        (b'{"text":"x"}', 0),
        (b'{"usage":{"seconds":-4}}', 0),
        (b'{"usage":{"seconds":"x"}}', 0),
    ],
)
def test_what_was_heard_is_on_record(answer: bytes, seconds: int) -> None:
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    TRANSCRIBE.observe(answer, record)
    assert record.audio_seconds == seconds
