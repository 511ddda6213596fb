"""Annotations: validated, comparable, with texts and embeddings that are the same on every machine."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrappers.backends.annotation import (
    PRINTABLE,
    Annotation,
    Annotator,
    HashingTextEncoder,
    SceneObject,
    TextEncoder,
    clean_text,
    relevance_map,
)


def annotation(**changes) -> Annotation:
    encoder = HashingTextEncoder(dim=16)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 4)).transpose(2, 0, 1).astype(np.float32)
    objects = (SceneObject("ball", 1.0, "moving"), SceneObject("cup", 0.5))
    fields = {
        "caption": "the ball is above the cup",
        "objects": objects,
        "caption_embedding": encoder.encode(["the ball is above the cup"])[0],
        "class_names": ("ball", "cup", "floor"),
        "class_embeddings": encoder.encode(["ball", "cup", "floor"]),
        "patch_probabilities": probabilities,
        "relevance": relevance_map(objects, probabilities),
        "frame_step": 3,
        "source": "test",
    }
    return Annotation(**{**fields, **changes})


GOOD = annotation()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("caption", "two\nlines"),
        ("caption", "x" * 257),
        ("caption", "snow \u2603"),
        ("caption_embedding", np.zeros(15, np.float32)),
        ("class_embeddings", np.zeros((2, 16), np.float32)),
        ("class_embeddings", np.zeros((3, 16), np.float64)),
        ("class_names", ("cup", "ball", "floor")),
        ("class_names", ("ball", "cup")),
        ("objects", tuple(SceneObject("ball", 1.0) for _ in range(6))),
        ("patch_probabilities", GOOD.patch_probabilities * np.float32(0.9)),
        ("patch_probabilities", GOOD.patch_probabilities * np.float32(np.nan)),
        ("patch_probabilities", GOOD.patch_probabilities[:, :3]),
        ("patch_probabilities", np.stack([-GOOD.relevance, 1 + GOOD.relevance, 0 * GOOD.relevance])),
        ("relevance", GOOD.relevance + np.float32(1)),
        ("relevance", GOOD.relevance * np.float32(np.nan)),
        ("relevance", GOOD.relevance[:, :3]),
    ],
)
def test_annotation_refuses_what_breaks_its_contract(field, value):
    with pytest.raises(ValueError, match="must|at most"):
        annotation(**{field: value})


def test_more_than_ten_classes_are_refused():
    names = tuple(f"class {letter}" for letter in "abcdefghijk")
    with pytest.raises(ValueError, match="1-10 classes"):
        annotation(
            objects=(),
            class_names=names,
            class_embeddings=HashingTextEncoder(dim=16).encode(names),
            patch_probabilities=np.full((11, 4, 4), 1 / 11, np.float32),
        )


@pytest.mark.parametrize(("relevance", "motion"), [(1.01, "still"), (-0.1, "still"), (np.nan, "still"), (0.5, "fast")])
def test_scene_object_refuses_what_is_out_of_range(relevance, motion):
    with pytest.raises(ValueError, match="ball"):
        SceneObject("ball", relevance, motion)


def test_annotations_are_equal_when_all_of_their_content_is():
    assert annotation() == GOOD
    assert GOOD != "an annotation"
    for field, value in [("caption", "other"), ("frame_step", 4), ("relevance", GOOD.relevance / 2)]:
        assert dataclasses.replace(GOOD, **{field: value}) != GOOD


def test_relevance_is_the_weighted_sum_of_the_objects_probabilities():
    slow = np.zeros((4, 4))
    for y in range(4):
        for x in range(4):
            for index, thing in enumerate(GOOD.objects):
                slow[y, x] += thing.relevance * GOOD.patch_probabilities[index, y, x]
    np.testing.assert_allclose(GOOD.relevance, slow, rtol=1e-6)
    assert not relevance_map([], GOOD.patch_probabilities).any()


def test_relevance_stays_within_one_whatever_rounding_does():
    probabilities = np.full((10, 2, 2), np.float32(0.1))
    probabilities[0] += np.float32(1e-6)
    everything = [SceneObject(str(index), 1.0) for index in range(10)]
    assert relevance_map(everything, probabilities).max() <= 1


# ---- text ----


@given(st.text(max_size=400), st.integers(1, 300))
def test_clean_text_is_one_line_of_printable_ascii(text, length):
    cleaned = clean_text(text, length)
    assert len(cleaned) <= length
    assert set(cleaned) <= set(PRINTABLE)
    assert cleaned == cleaned.strip()
    assert "  " not in cleaned
    assert clean_text(cleaned, length) == cleaned


def test_clean_text_keeps_what_is_fine_and_drops_the_rest():
    assert clean_text("the cart is left; it moves.") == "the cart is left; it moves."
    assert clean_text("  Caf\u00e9\n\x1b[31mred\x00 \u2603 ball\t") == "Cafe [31mred ball"
    assert clean_text("one two", max_length=4) == "one"


# ---- embeddings ----

PINNED = [-1, -1, 1, 1, 1, 1, 1, -1, 1, 1, -1, 1, 1, -1, 1, -1]  # the bits of 0x3eda = SHAKE-256("pole")


def test_hashing_encoder_is_the_same_everywhere():
    embedding = HashingTextEncoder(dim=16).encode(["pole"])[0]
    np.testing.assert_array_equal(embedding, np.array(PINNED, np.float32) / 4)
    code = (
        "from wrappers.backends.annotation import HashingTextEncoder as E;"
        "print(E().encode(['the pole points up']).tobytes().hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {HashingTextEncoder().encode(["the pole points up"]).tobytes().hex()}


@pytest.mark.parametrize("dim", [3, 16, 64, 100])
def test_hashing_encoder_gives_unit_rows(dim):
    embeddings = HashingTextEncoder(dim).encode(["", "cart", "the cart is in the centre", "\u2603"])
    assert embeddings.shape == (4, dim)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)


def test_hashing_encoder_reflects_shared_words_and_their_order():
    base, similar, shouted, swapped, other = HashingTextEncoder(dim=256).encode(
        [
            "the cart is left, the pole is right",
            "the cart is left, the pole is down",
            "The cart is LEFT; the pole is right!",
            "the cart is right, the pole is left",
            "a green dog swims",
        ]
    )
    assert base @ similar > base @ other + 0.3
    np.testing.assert_array_equal(base, shouted)
    assert base @ swapped < 0.99


def test_protocols_recognise_what_implements_them():
    class Silent:
        source, embedding_dim, grid = "silent", 4, 8

        def annotate(self, frames, frame_steps):
            return [None] * len(frames)

    assert isinstance(Silent(), Annotator)
    assert not isinstance(object(), Annotator)
    assert isinstance(HashingTextEncoder(), TextEncoder)
