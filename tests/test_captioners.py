"""Captioners: answers of any kind made safe, a transformers model, and servers that misbehave."""

import base64
import contextlib
import copy
import csv
import http.server
import io
import json
import string
import threading

import cv2
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import HashingClip
from tests.tiny_models import ANSWER, save_vlm
from wrappers.backends.annotation import (
    MAX_CAPTION_LENGTH,
    MAX_OBJECTS,
    PRINTABLE,
    AnnotatorUnavailable,
    SceneObject,
)
from wrappers.backends.annotators import VisionLanguageAnnotator
from wrappers.backends.captioners import (
    Description,
    OpenAICaptioner,
    TransformersCaptioner,
    make_captioner,
    make_prompt,
    parse_answer,
)
from wrappers.errors import UserError

torch.set_num_threads(1)

POLE = Description("a cart with a pole", (SceneObject("pole", 1.0, "moving"),))


def random_frames(count: int, size: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


# ---- answers ----


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        f"```json\n{ANSWER}\n```",
        f"Sure! Here is what {{I}} see: {ANSWER} I hope that helps. {{}}",
        ANSWER.replace("a cart with a pole", "a  <i>cart</i>\\n\\twith\\u0007 a\\u001b pole\\u202e"),
        ANSWER.replace("]", ', "cart\\u4e2d\\u6587", {"name": "POLE", "relevance": 0}]').replace(
            ', "cart', ', "\\u4e2d'
        ),
    ],
)
def test_json_is_found_and_cleaned(answer):
    assert parse_answer(answer) == POLE


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I see a cart.",
        "[1, 2]",
        "{}",
        '{"caption": "", "objects": []}',
        '{"caption": "\u5c0f\u8eca", "objects": [{"name": "\u6746"}]}',
        '{"caption": 7, "objects": 7}',
        ANSWER[:-2],
        "{" * 50_000,
        '{"a":' * 50_000,
        '{"caption": ' + "[" * 50_000,
        '{"caption": "x", "n": ' + "9" * 10_000 + "}",
        "a" * 10_000_000 + ANSWER,
    ],
)
def test_what_is_no_answer_is_none(answer):
    assert parse_answer(answer) is None


def test_objects_are_limited_distinct_and_clipped():
    entries = [
        {"name": "cart", "relevance": 7, "motion": "moving"},
        {"name": "CART", "relevance": 0.1},
        {"name": "pole", "relevance": -1, "motion": "still"},
        {"name": "rail", "relevance": "much", "motion": "slowly"},
        "floor",
        {"relevance": 1},
        {"name": "x" * 1000, "relevance": float("nan"), "motion": ["moving"]},
        {"name": "wall", "relevance": 10**400},
    ]
    description = parse_answer(json.dumps({"caption": "", "objects": entries}))
    assert description.objects == (
        SceneObject("cart", 1.0, "moving"),
        SceneObject("pole", 0.0, "still"),
        SceneObject("rail", 0.5),
        SceneObject("floor", 0.5),
        SceneObject("x" * 40, 0.5),
    )
    assert description.caption.startswith("cart, pole, rail, floor"), "a caption is made of the objects"


class Parrot:
    source = identity = "parrot"

    def __init__(self, answers):
        self.answers = answers

    def describe(self, frames):
        return [parse_answer(answer) for answer in self.answers]


_texts = st.text(max_size=60) | st.text("<>&\"'{}[]\\,:\n\r\0\x1b=+-@ab\u202e\u4e2d", max_size=60)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=10,
)
_objects = st.fixed_dictionaries({}, optional={"name": _values, "relevance": _values, "motion": _values})
_documents = st.fixed_dictionaries(
    {}, optional={"caption": _values, "objects": st.lists(_objects | _values, max_size=9) | _values}
)
_answers = _texts | _documents.map(json.dumps) | st.tuples(_texts, _documents.map(json.dumps), _texts).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(_answers, min_size=1, max_size=4))
def test_no_answer_breaks_an_annotation_a_space_a_log_or_a_page(answers):
    annotator = VisionLanguageAnnotator(Parrot(answers), HashingClip())
    frames = [np.zeros((8, 8, 3), np.uint8)] * len(answers)
    space = spaces.Text(MAX_CAPTION_LENGTH, min_length=0, charset=PRINTABLE)
    for annotation in annotator.annotate(frames, range(len(frames))):  # an Annotation checks itself
        assert len(annotation.objects) <= MAX_OBJECTS
        assert annotation.caption in space
        for text in [annotation.caption, *annotation.class_names]:
            assert not set(text) & set("<>\n\r\0\x1b")
            assert set(text) <= set(string.printable)
        line = io.StringIO()
        csv.writer(line).writerow([annotation.caption, *annotation.class_names])
        assert len(line.getvalue().splitlines()) == 1
        [row] = csv.reader([line.getvalue()])
        assert row == [annotation.caption, *annotation.class_names]
    assert annotator.statistics()["answers"] == len(answers)


def test_prompt_holds_the_task():
    prompt = make_prompt("balance the {pole}\n on the cart")
    assert "balance the {pole} on the cart" in prompt
    assert '{"caption":' in prompt
    assert "task of the agent" not in make_prompt("")


# ---- transformers ----


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def noisy_vlm(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("noisy"), answer=None)


def test_a_transformers_model_describes_frames(vlm):
    captioner = make_captioner(f"transformers:{vlm}", "balance the pole")
    assert captioner.describe(random_frames(3)) == [POLE] * 3
    assert captioner.source == f"transformers:{vlm}"
    assert "balance the pole" in captioner.prompt


def test_answers_depend_on_the_frame_but_not_on_its_batch(noisy_vlm):
    captioner = TransformersCaptioner(noisy_vlm, batch_size=2, max_new_tokens=6)
    small, large, wide = random_frames(1)[0], random_frames(1, 300)[0], np.zeros((20, 90, 3), np.uint8)
    frames = [small, large, wide, 255 - small, wide]
    together = [answer for start in (0, 2, 4) for answer in captioner._answer(frames[start : start + 2])]
    assert together == [captioner._answer([frame])[0] for frame in frames]
    assert len(set(together)) > 1
    assert captioner.describe(frames) == [None] * 5, "random bytes are no answer"


def test_a_frame_is_not_split_into_tiles(vlm, monkeypatch):
    captioner = TransformersCaptioner(vlm)
    lengths = []
    generate = captioner._model.generate

    def spy(**inputs):
        lengths.append((inputs["input_ids"] == captioner._model.config.image_token_id).sum().item())
        return generate(**inputs)

    monkeypatch.setattr(captioner._model, "generate", spy)
    captioner.describe(random_frames(1, 1000))
    assert lengths == [4], "as many tokens as one tile has"
    assert captioner._processor.image_processor.do_image_splitting is False


def test_identity_of_a_transformers_model(vlm, noisy_vlm):
    captioners = [
        TransformersCaptioner(vlm),
        TransformersCaptioner(vlm, "balance"),
        TransformersCaptioner(vlm, image_size=64),
        TransformersCaptioner(vlm, dtype="bfloat16"),
        TransformersCaptioner(noisy_vlm),
    ]
    assert len({captioner.identity for captioner in captioners}) == 5
    assert captioners[0].identity == TransformersCaptioner(vlm).identity
    assert captioners[3].describe(random_frames(1)) == [POLE]
    assert copy.deepcopy(captioners[0]) is captioners[0]


def test_what_is_no_model_is_explained(vlm, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        make_captioner(f"transformers:{tmp_path}")
    for file in vlm.iterdir():
        if file.name not in ("processor_config.json", "chat_template.jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="conversation with images|cannot be loaded"):
        make_captioner(f"transformers:{tmp_path}")


def test_code_of_a_model_is_never_run(vlm, tmp_path):
    for file in vlm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((vlm / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        make_captioner(f"transformers:{tmp_path}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "spec",
    ["", "gpt", "transformers:", "openai:", "openai:http://localhost:1/v1", "openai:localhost#m", "openai:ftp://a#m"],
)
def test_unknown_captioners_are_explained(spec):
    with pytest.raises(UserError, match="expected embedded, transformers:"):
        make_captioner(spec)


# ---- servers ----


@contextlib.contextmanager
def scripted_server(reply):
    """A server on loopback that answers with what `reply(request, number)` says: (status, type, body)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((request, {name.lower(): value for name, value in self.headers.items()}))
            status, kind, body = reply(request, len(requests))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have given up
                for part in body if isinstance(body, list) else [body]:
                    self.wfile.write(part)
                    self.wfile.flush()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content: str | None = ANSWER) -> tuple[int, str, bytes]:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, "application/json", json.dumps(body).encode()


ERROR = b'{"error": {"message": "no"}}'


def test_a_server_gets_image_prompt_and_schema(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    frames = random_frames(1, 224)
    with scripted_server(lambda request, number: completion()) as (url, requests):
        captioner = make_captioner(f"openai:{url}#my/model", "balance the pole")
        assert captioner.describe(frames) == [POLE]
    [(request, headers)] = requests
    assert request["model"] == "my/model"
    assert request["response_format"]["json_schema"]["schema"]["properties"]["objects"]["maxItems"] == 5
    assert headers["authorization"] == "Bearer secret"
    image, text = request["messages"][0]["content"]
    assert "balance the pole" in text["text"]
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), frames[0])


def test_requests_are_concurrent_and_answers_keep_their_order():
    barrier = threading.Barrier(3, timeout=30)  # breaks unless three requests are there at once
    frames = random_frames(3)

    def reply(request, number):
        barrier.wait()
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        return completion(json.dumps({"caption": f"mean {picture.mean():.0f}", "objects": []}))

    frames = [np.full((16, 16, 3), grey, np.uint8) for grey in (10, 200, 90)]
    with scripted_server(reply) as (url, _):
        captions = [description.caption for description in OpenAICaptioner(url, "m").describe(frames)]
    assert captions == ["mean 10", "mean 200", "mean 90"]


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_schemas_is_asked_without(status):
    def reply(request, number):
        return (status, "application/json", ERROR) if "response_format" in request else completion()

    with scripted_server(reply) as (url, requests):
        captioner = OpenAICaptioner(url, "m")
        for _ in range(2):
            assert captioner.describe(random_frames(1)) == [POLE]
    assert ["response_format" in request for request, _ in requests] == [True, False, False]


def test_a_request_that_fails_is_tried_again():
    with scripted_server(lambda r, number: completion() if number > 1 else (503, "application/json", ERROR)) as (
        url,
        _,
    ):
        assert OpenAICaptioner(url, "m").describe(random_frames(1)) == [POLE]


@pytest.mark.parametrize(
    "reply",
    [
        completion(""),
        completion(None),
        completion("\0" * 100_000),
        (200, "text/html", b"<h1>It works!</h1>"),
        (200, "application/json", b'{"choices": []}'),
        (200, "application/json", b'"<script>"'),
        (200, "application/json", b"null"),
    ],
)
def test_nonsense_is_no_answer(reply):
    with scripted_server(lambda request, number: reply) as (url, _):
        assert OpenAICaptioner(url, "m").describe(random_frames(2)) == [None, None]


def test_one_failure_does_not_spoil_the_batch():
    def reply(request, number):
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        return completion() if picture.any() else (404, "application/json", ERROR)

    frames = random_frames(3)
    frames[1] = 0
    with scripted_server(reply) as (url, _):
        assert OpenAICaptioner(url, "m").describe(frames) == [POLE, None, POLE]


@pytest.mark.parametrize("trouble", ["error", "silence", "drips", "no json", "nobody"])
def test_no_answer_at_all_is_unavailability(trouble):
    ended = threading.Event()

    class Drips(list):
        def __iter__(self):
            while not ended.wait(0.1):
                yield b" "

        def __len__(self):
            return 1_000_000

    def reply(request, number):
        if trouble == "silence":
            ended.wait(30)
        if trouble == "drips":
            return 200, "application/json", Drips()
        return (200, "application/json", b"{") if trouble == "no json" else (401, "application/json", ERROR)

    with scripted_server(reply) as (url, _):
        captioner = OpenAICaptioner("http://127.0.0.1:9/v1" if trouble == "nobody" else url, "m", timeout=0.7)
        with pytest.raises(AnnotatorUnavailable, match="does not answer"):
            captioner.describe(random_frames(2))
        ended.set()
