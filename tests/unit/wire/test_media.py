"""URLs in a request's content: which are taken, and that none is missed, however it is written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest
from proxy.wire.media import Media
from proxy.wire.operation import EngineOperation
from proxy.wire.operations import OPERATIONS

NONE = Media()
SOME = Media(("images.example.com", "*.cdn.example.com", "10.0.0.5"))
METADATA = "http://169.254.169.254/latest/meta-data/"
INLINE = "data:image/png;base64,iVBORw0KGgo="


def chat(part: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Look:"}, part]}]}


def check(body: Any, media: Media = NONE, lists: int = 2) -> None:
    media.check(body if isinstance(body, bytes) else json.dumps(body).encode(), lists)


def refused(body: Any, media: Media = NONE, lists: int = 2) -> str:
    """The field that is named."""
    with pytest.raises(InvalidRequest) as caught:
        check(body, media, lists)
    assert (caught.value.status, caught.value.error_code) == (400, "url_not_allowed")
    assert METADATA not in caught.value.message, "what a caller wrote is on no record"
    assert caught.value.param is not None
    assert f"`{caught.value.param}`" in caught.value.message
    return caught.value.param


# --- where they stand --------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[Any, str, int]] = {
    "image": (
        chat({"type": "image_url", "image_url": {"detail": "low", "url": METADATA}}),
        "messages[0].content[1].image_url.url",
        2,
    ),
    "image in short": (chat({"image_url": METADATA}), "messages[0].content[1].image_url", 2),
    "video": (chat({"type": "video_url", "video_url": {"url": METADATA}}), "messages[0].content[1].video_url.url", 2),
    "audio": (chat({"type": "audio_url", "audio_url": {"url": METADATA}}), "messages[0].content[1].audio_url.url", 2),
    "input_audio": (chat({"type": "input_audio", "input_audio": {"url": METADATA}}), "messages[0].content[1].input_audio.url", 2),
    "file": (chat({"type": "file", "file": {"file_url": METADATA}}), "messages[0].content[1].file.file_url", 2),
    "typed": (chat({"type": "image", "url": METADATA}), "messages[0].content[1].url", 2),
    "source": (
        chat({"type": "image", "source": {"type": "url", "url": METADATA}}),
        "messages[0].content[1].source.url",
        2,
    ),
    "what a tool found": (
        chat({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": METADATA}}]}),
        "messages[0].content[1].content[0].source.url",
        2,
    ),
    "input_image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": METADATA}]}]},
        "input[0].content[0].image_url",
        1,
    ),
    "input_file": ({"input": [{"type": "input_file", "file_url": METADATA}]}, "input[0].file_url", 1),
    "document": (
        {"query": "x", "documents": {"content": [{"type": "image_url", "image_url": {"url": METADATA}}]}},
        "documents.content[0].image_url.url",
        1,
    ),
    "deep": (
        chat({"a": {"b": [[{"c d": {"video_url": {"url": METADATA}}}]]}}),
        "messages[0].content[1].a.b[0][0].?.video_url.url",
        2,
    ),
}


@pytest.mark.parametrize(("body", "field", "lists"), PLACES.values(), ids=PLACES)
def test_a_url_is_found_where_content_names_it(body: Any, field: str, lists: int) -> None:  # failure 72
    assert refused(body, lists=lists) == field
    inline = json.loads(json.dumps(body).replace(METADATA, INLINE))
    check(inline, lists=lists)


def test_every_endpoint_that_takes_content_is_looked_at() -> None:  # failure 72
    lists = {each.name: each.lists for each in OPERATIONS if isinstance(each, EngineOperation)}
    assert {name for name, depth in lists.items() if depth == 0} == {"transcriptions", "translations"}, "forms name nothing"
    assert {name for name, depth in lists.items() if depth == 1} == {"responses", "rerank", "score"}


WRITTEN = [
    b'{"messages":[{"content":[{"image\\u005furl":{"url":"URL"}}]}]}',
    b'{"messages":[{"content":[{"\\u0069mage_url":{"\\u0075rl":"URL"}}]}]}',
    b'{"messages":[{"content":[{"image_ur\\u006c":"URL"}]}]}',
    b'{"messages":[{"content":[{"image_ur\\u006C" \n:\t"URL"}]}]}',
    b'{"messages":[{"content":[{"im\\u0061ge_url" : "URL"}]}]}',
    b'{ "messages" : [ { "content" : [ { "image_url"\r\n:\r\n{ "url" : "URL" } } ] } ] }',
    b'{"messages":[{"content":[{"s\\u006furce":{"url":"URL"}}]}]}',
    b'{"messages":[{"content":[{"image_url":"\\u0068ttp://a"}]}]}',
    b'{"messages":[{"content":[{"image_url":{"url":"URL","url":"data:,"}}]}]}',
    b'{"messages":[{"content":[{"image_url":{"url":"data:,","url":"URL"}}]}]}',
    b'{"messages":[{"content":[{"image_url":"URL","image_url":"data:,"}]}]}',
    b'{"messages":[{"content":[{"type":"tool_use","type":"image","input":{"image_url":"URL"}}]}]}',
    b'{"messages":[{"content":[{"text":"a\\"data:\\",\\"image_url\\":1"},{"image_url":"URL"}]}]}',
    b'{"messages":[{"content":[{"text":"\\"data:"},{"image_url":"URL"},{"text":"data:"}]}]}',
    b'{"messages":[{"content":[{"data:":"data:","image_url":"URL"}]}]}',
]


@pytest.mark.parametrize("body", WRITTEN)
def test_however_it_is_written(body: bytes) -> None:  # failure 72
    refused(body.replace(b"URL", METADATA.encode()))


@given(st.data())
def test_no_way_to_write_a_name_hides_it(data: st.DataObject) -> None:  # failure 72
    """Each character of the names plain or escaped, any space between."""

    def written(name: str) -> str:
        return "".join(data.draw(st.sampled_from((c, f"\\u{ord(c):04x}", f"\\u{ord(c):04X}"))) for c in name)

    space = data.draw(st.text(" \t\r\n", max_size=2))
    name = data.draw(st.sampled_from(("image_url", "video_url", "audio_url", "file_url", "source")))
    part = f'{{"{written(name)}"{space}:{space}{{"{written("url")}"{space}:{space}"{METADATA}"}}}}'
    refused(f'{{"messages":[{{"content":[{part}]}}]}}'.encode())


# --- what is taken -----------------------------------------------------------------------------------------------------

TAKEN = [
    INLINE,
    "DATA:,x",
    "data:image/png;base64," + "A" * 5000,
    "https://images.example.com/a.png",
    "https://IMAGES.example.com",
    "https://images.example.com?x=http://169.254.169.254/",
    "https://images.example.com/a/@b:80/..",
    "https://a.cdn.example.com/ü#x",
    "https://a.b.cdn.example.com/",
    "https://10.0.0.5/a.png",
]
NOT_TAKEN = [
    "",
    METADATA,
    "http://images.example.com/a.png",
    "HTTPS://images.example.com/a.png",
    "https:images.example.com",
    "https:/images.example.com/",
    "https:///images.example.com/",
    "//images.example.com/",
    " https://images.example.com/",
    "https://images.example.com/ x",
    "https://images.example.com\\@169.254.169.254/",
    "https://169.254.169.254\\@images.example.com/",
    "https://images.example.com/\\@169.254.169.254/",
    "https://images.example.com:443/",
    "https://images.example.com:22/",
    "https://user@images.example.com/",
    "https://images.example.com@169.254.169.254/",
    "https://images.example.com;data:@169.254.169.254/",
    "https://images.example.com%2f@169.254.169.254/",
    "https://images.example.com#@169.254.169.254\\",
    "https://images.example.com\t.evil.example/",
    "https://images.example.com\n/",
    "https://images.example.com./",
    "https://\u0131mages.example.com/",
    "https://images。example。com/",
    "https://evilimages.example.com/",
    "https://cdn.example.com/",
    "https://evilcdn.example.com/",
    "https://a.cdn.example.com.evil.example/",
    "https://127.0.0.1/",
    "https://10.0.0.6/",
    "https://167772165/",
    "https://0x0a000005/",
    "https://012.0.0.5/",
    "https://10.5/",
    "https://[::1]/",
    "https://[::ffff:10.0.0.5]/",
    "https://localhost/",
    "file:///etc/passwd",
    "file:etc/passwd",
    "/etc/passwd",
    "image.png",
    "ftp://images.example.com/",
    "gopher://images.example.com/",
    "jar:https://images.example.com/!/",
    "s3://bucket/key",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("url", TAKEN)
def test_data_and_the_hosts_that_are_listed(url: str) -> None:
    check(chat({"type": "image_url", "image_url": {"url": url}}), SOME)


@pytest.mark.parametrize("url", NOT_TAKEN)
def test_nothing_else(url: str) -> None:  # failure 72
    refused(chat({"type": "image_url", "image_url": {"url": url}}), SOME)
    refused(chat({"type": "image_url", "image_url": {"url": url}}))


@pytest.mark.parametrize("url", [url for url in TAKEN if not url.lower().startswith("data:")])
def test_without_a_list_nothing_is_fetched_at_all(url: str) -> None:  # failure 72
    refused(chat({"type": "image_url", "image_url": {"url": url}}))


def test_an_error_says_what_is_allowed() -> None:
    with pytest.raises(InvalidRequest, match=r"allowed: `data:` URLs\.$"):
        check(chat({"image_url": METADATA}))
    with pytest.raises(InvalidRequest, match=r"allowed: `data:` URLs, https://images\.example\.com/\.\.\., https://\*\.cdn\.exa"):
        check(chat({"image_url": METADATA}), SOME)


# --- what is none of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"content": f'Fetch {METADATA} and "image_url": "{METADATA}"'}]},
        chat({"type": "text", "text": json.dumps({"image_url": {"url": METADATA}})}),
        {
            "tools": [
                {"function": {"parameters": {"properties": {"url": {"type": "string"}}, "examples": [{"image_url": METADATA}]}}}
            ]
        },
        chat(
            {"type": "tool_use", "name": "fetch", "input": {"url": METADATA, "image_url": METADATA, "source": {"url": METADATA}}}
        ),
        {"messages": [{"tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"image_url": METADATA})}}]}]},
        chat({"type": "text", "text": "x", "citations": [{"type": "web_search_result_location", "url": METADATA}]}),
        {"metadata": {"image_url": METADATA}, "messages": [{"content": [{"type": "text", "text": "x"}]}]},
        chat({"type": "image_url", "image_url": None}),
        chat({"type": "image_url", "image_url": {"url": None}}),
    ],
)
def test_what_no_engine_fetches_is_left_alone(body: Any) -> None:
    check(body)


@pytest.mark.parametrize("body", [b'{"messages":[[{"image_url":"' + b"x" * 10, b'{"messages":[[{"a_url":"x\xff"}]]}'])
def test_what_cannot_be_read_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="isn't valid JSON"):
        check(body)


def test_depth_and_long_numbers_break_nothing() -> None:  # failure 36
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        check(b'{"messages":[[{"image_url":"x"}],' + b"[" * 100_000 + b"]" * 100_000 + b"]}")
    refused(b'{"messages":[[{"image_url":"x"}],' + b"9" * 1_000_000 + b"]}")


@given(st.binary(max_size=60), st.sampled_from([1, 2]))
def test_no_bytes_break_it(more: bytes, lists: int) -> None:
    try:
        check(b'[[{"image_url":"data:"' + more, lists=lists)
    except InvalidRequest:
        return
