"""Guidance models of another folder, and what results say of who trained the models that guide an agent."""

import json
import shutil

import numpy as np
import pytest

from agents import clip_sac, semore_sac
from semore_bench.guidance.models import add_to_clip_config
from semore_bench.teachers import teacher
from wrappers.backends.annotators import annotation_shape, make_annotator
from wrappers.backends.embedded import EmbeddedAnnotator, learned_from
from wrappers.errors import UserError

FRAMES = [np.full((64, 64, 3), 90, np.uint8)]


def test_models_of_another_folder_are_used_and_named_with_it(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "mine")
    add_to_clip_config(tmp_path / "mine" / "clip", learned_from={"domains": ["pendulum"], "left_out": "cartpole"})
    spec = f"embedded:{tmp_path / 'mine'}"
    annotator = make_annotator(spec, device="cpu")
    assert isinstance(annotator, EmbeddedAnnotator)
    assert (annotator.folder, annotator.source) == (tmp_path / "mine", spec)
    assert annotation_shape(spec) == (annotator.embedding_dim, annotator.grid)
    [found], [expected] = (a.annotate(FRAMES, [0]) for a in (annotator, EmbeddedAnnotator("cpu", trained[0])))
    assert found.caption == expected.caption
    mixed = make_annotator(spec, clip="embedded", device="cpu")
    assert mixed.captioner.source == spec
    assert mixed.embedding_dim == make_annotator("embedded", device="cpu").embedding_dim

    args = semore_sac.Args(annotator=spec)
    args.resolve()
    assert args.guidance_source == f"{spec} (without cartpole)"
    args.clip = "embedded"
    assert args.guidance_source == f"{spec} (without cartpole), CLIP embedded"
    unsaid = f"embedded:{trained[0]}"
    assert semore_sac.Args(annotator=unsaid).guidance_source == unsaid


@pytest.mark.parametrize("spec", ["embedded:nowhere", "embedded:/dev/null"])
def test_a_folder_without_models_is_explained(spec):
    folder = spec.partition(":")[2]
    for ask in (make_annotator, annotation_shape, lambda spec: semore_sac.Args(annotator=spec).guidance_source):
        with pytest.raises(UserError, match=f"missing from {folder}; `semore-bench train-guidance --output {folder}`"):
            ask(spec)


@pytest.mark.parametrize("learned", [1, [], {}, {"domains": 1, "left_out": "x"}, {"left_out": "walker"}])
def test_a_damaged_word_on_what_was_learned_is_explained(tmp_path, learned):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"learned_from": learned}))
    with pytest.raises(UserError, match="learned_from must say domains and left_out"):
        learned_from(f"embedded:{tmp_path}")


@pytest.mark.parametrize("content", [None, "", "{", "{}", "1", "[1]", b"\xff"])
def test_a_damaged_configuration_is_explained(tmp_path, content):
    (tmp_path / "clip").mkdir()
    if content is not None:
        file = tmp_path / "clip" / "open_clip_config.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = (make_annotator,) if content == "{}" else (learned_from, make_annotator, annotation_shape)
    for ask in asked:
        with pytest.raises(UserError, match="open_clip_config.json is missing or damaged"):
            ask(f"embedded:{tmp_path}")


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        (None, ()),
        ("none", ()),
        ("a name of one's own", ()),
        ("simulator", ("the simulator itself", "privileged")),
        ("embedded", ("simulator's captions and masks of cartpole, reacher", "never of acrobot")),
        ("embedded:models/x (without walker)", ("the domains that their card lists", "never of walker")),
        ("CLIP embedded", ("the CLIP was trained on the simulator's", "never of acrobot")),
        ("CLIP ViT-B-32:openai", ("by others",)),
        ("transformers:a/b", ("others trained",)),
        ("openai:http://h/v1#m, CLIP embedded", ("others trained", "the CLIP was trained on the simulator's")),
    ],
)
def test_it_is_said_who_trained_the_models(guidance, words):
    said = teacher(guidance) or ""
    assert bool(said) == bool(words)
    assert [word for word in words if word not in said] == []


def test_the_models_of_the_package_say_what_their_card_says():
    learned = learned_from("embedded")
    for name in ("clip", "captioner"):
        card = (make_annotator("embedded").folder / name / "README.md").read_text()
        assert [domain for domain in learned["domains"] if f"| {domain} |" not in card] == []
        assert f"| {learned['left_out']} (left out) |" in card


def test_every_guided_agent_has_a_teacher():
    for args in (semore_sac.Args(), semore_sac.Args(true_maps=True), clip_sac.Args()):
        assert teacher(args.guidance_source), "its rows would stand unlabelled"
