"""Transcriptions and translations: what a form asks, what was heard; a file's bytes are nowhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.records.content import Conversation
from tests.support.scripted_vllm.audio import tone
from tests.unit.collectors.content.said import read, stream, text

SOUND = tone(0.1)
FILE = b'Content-Disposition: form-data; name="file"; filename="secret name.wav"\r\nContent-Type: audio/wav\r\n\r\n'
FIELDS = {"model": b"whisper", "language": b"en", "prompt": "Grüße".encode()}


def form(fields: dict[str, bytes], sound: bytes = SOUND, head: bytes = FILE, *, file_first: bool = False) -> bytes:
    texts = [b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (name.encode(), value) for name, value in fields.items()]
    parts = [head + sound, *texts] if file_first else [*texts, head + sound]
    return b"".join([b"--b0undary\r\n%b\r\n" % part for part in parts]) + b"--b0undary--\r\n"


def asked(said: Conversation) -> list[str]:
    return [part["content"] for message in said.input_messages for part in message["parts"]]


@pytest.mark.parametrize("operation", ["transcriptions", "translations"])
@pytest.mark.parametrize("file_first", [False, True])
def test_fields_are_shown_and_of_the_file_its_type_and_size(operation: str, file_first: bool) -> None:
    said = read(operation, form(FIELDS, file_first=file_first))
    shown = ["model: whisper", "language: en", "prompt: Grüße"]
    note = [f"[file: audio/wav, {len(SOUND)} bytes]"]
    assert asked(said) == (note + shown if file_first else shown + note)
    assert [message["role"] for message in said.input_messages] == ["user"]


def test_a_form_that_was_cut_off_in_its_file() -> None:
    body = form(FIELDS)
    cut = body[: body.index(FILE) + len(FILE) + 100]
    assert asked(read("transcriptions", cut))[-1] == "[file: audio/wav, cut off after 100 bytes]"
    first = form(FIELDS, file_first=True)[: len(b"--b0undary\r\n") + len(FILE) + 100]
    assert asked(read("transcriptions", first)) == ["[file: audio/wav, cut off after 100 bytes]"]


def test_a_form_that_was_cut_off_anywhere() -> None:
    body = form(FIELDS, sound=b"RIFF" + b"\xfe\xfd" * 30)
    for cut in range(len(body)):
        for shown in asked(read("transcriptions", body[:cut])):
            assert shown.startswith(("model: ", "language: ", "prompt: ", "[file: audio/wav, "))
            assert "RIFF" not in shown


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="file"\r\n\r\n',
        b"Content-Disposition: form-data; name=\"sound\"; filename*=UTF-8''a.wav\r\n\r\n",
        b'Content-Disposition: form-data; name="sound"\r\ncontent-type: application/octet-stream\r\n\r\n',
    ],
)
def test_whatever_may_be_a_file_is_one(head: bytes) -> None:
    (*_, shown) = asked(read("transcriptions", form({}, b"RIFF1234", head)))
    assert shown in ("[file: unknown type, 8 bytes]", "[file: application/octet-stream, 8 bytes]")


@given(st.binary(min_size=20, max_size=200), st.integers(0, 400))
def test_the_bytes_of_a_file_are_nowhere(data: bytes, cut: int) -> None:
    marked = b"MARK" + data.replace(b"\r\n--b0undary", b"") + b"MARK"
    said = read("transcriptions", form(FIELDS, marked)[: len(form(FIELDS, b"")) - cut + len(marked)])
    assert "MARK" not in json.dumps([*said.input_messages, said.input_text])


@pytest.mark.parametrize(
    "body", [b"", b"--", b"--x", b"--x\r\n", b"--x\r\n\r\n", b"--x--\r\n", b"no form", b'{"file": 1}', SOUND]
)
def test_what_is_no_form_says_nothing(body: bytes) -> None:
    assert asked(read("transcriptions", body)) == []


def chunk(**choice: Any) -> dict[str, Any]:
    return {"object": "transcription.chunk", "choices": [choice]}


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "Hello there.", "usage": {"type": "duration", "seconds": 3}},
        {"text": "Hello there."},
        {
            "duration": 2.5,
            "language": "en",
            "text": "Hello there.",
            "segments": [{"id": 0, "text": "Hello there."}],
            "words": None,
        },
        stream(
            chunk(delta={"content": "Hello"}),
            chunk(delta={"content": " there."}, finish_reason="stop", stop_reason=None),
            {"object": "transcription.chunk", "choices": [], "usage": {"prompt_tokens": 3}},
        ),
        b"Hello there.",
    ],
    ids=["json", "translation", "verbose", "stream", "text"],
)
def test_what_was_heard(answer: object) -> None:
    said = read("transcriptions", b"", answer)
    assert said.output_text == "Hello there."
    assert said.output_messages == [{**text("assistant", "Hello there."), "finish_reason": "stop"}]


def test_an_engines_error_is_no_answer() -> None:
    assert read("transcriptions", b"", {"error": {"message": "Invalid or unsupported audio file."}}).output_messages == []
    assert read("transcriptions", b"", b"").output_messages == []
    assert read("transcriptions", b"", stream({"error": {"message": "died"}})).output_messages == []
