"""The embedded models from nothing: frames, losses, files that other libraries load, and numbers that are right."""

import json
import re
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from semore_bench.cli import run
from semore_bench.guidance import metrics
from semore_bench.guidance.evaluation import GRID, annotate, calibrate, measure, true_relevance
from semore_bench.guidance.frames import Shard, collect, load_shard, make_shard, plan
from semore_bench.guidance.models import MEAN, STD, answer_pieces, make_tokenizer, write_clip_config
from semore_bench.guidance.training import (
    Corpus,
    Settings,
    contrastive_loss,
    dense_loss,
    normalise,
    patch_shares,
    schedule,
    train,
    used_tokens,
)
from tests.tiny_guidance import TINY, toy_frames
from wrappers.backends.annotation import SceneObject
from wrappers.backends.annotators import VisionLanguageAnnotator
from wrappers.backends.captioners import TransformersCaptioner, parse_answer
from wrappers.backends.clip import ClipGrounding
from wrappers.backends.embedded import UNFAMILIAR, EmbeddedAnnotator
from wrappers.backends.scenes import BACKGROUND
from wrappers.errors import UserError

torch.set_num_threads(1)


def test_loss_falls_and_held_out_frames_are_described(trained):
    folder, _, _, losses = trained
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    held_out = toy_frames("box", 40, 1)
    threshold = calibrate(folder, [held_out])
    row = measure(folder, {"box": [held_out]}, threshold)["box"]
    assert row.exact_match > 0.9
    assert row.attributes >= row.exact_match
    assert row.retrieval > 0.9
    assert row.relevance_iou > 0.4
    assert row.unfamiliar < 0.1
    other = {"white": "orange", "orange": "white"}
    swapped = tuple(re.sub("white|orange", lambda colour: other[colour[0]], text) for text in held_out.captions)
    wrong = measure(folder, {"box": [replace(held_out, captions=swapped)]}, threshold)["box"]
    assert wrong.exact_match < 0.1
    assert wrong.retrieval < 0.1
    assert wrong.attributes == pytest.approx(0.5, abs=0.05)


def test_saved_models_compute_what_was_trained(trained):
    folder, corpus, model, _ = trained
    clip = ClipGrounding(folder / "clip", device="cpu")
    frames = list(corpus.images[:4])
    images = torch.from_numpy(corpus.images[:4]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = model.see(normalise(images))
    np.testing.assert_allclose(clip.patch_features(frames), features.patches, atol=2e-2)  # saved in half precision
    np.testing.assert_allclose(clip.image_embeddings(frames), features.images, atol=2e-2)
    assert clip.grid == GRID

    captioner = AutoModelForImageTextToText.from_pretrained(folder / "captioner", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "captioner")
    answers = torch.from_numpy(corpus.answers[:4])
    prompt = torch.full((4, 64), processor.image_token_id)
    with torch.no_grad():
        expected = model.answer_logits(features.tokens, answers)
        found = captioner(input_ids=torch.cat([prompt, answers[:, :-1]], 1), pixel_values=normalise(images)).logits[
            :, 63:
        ]
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)
    pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalise(images), atol=1e-4, rtol=1e-4)


def test_the_embedded_annotator_says_what_its_models_say_one_by_one(trained):
    """It runs the shared tower once and writes by itself; the libraries' own ways are the reference."""
    folder, corpus, *_ = trained
    clip = ClipGrounding(folder / "clip", device="cpu")
    reference = VisionLanguageAnnotator(TransformersCaptioner(folder / "captioner", device="cpu"), clip)
    frames = list(corpus.images[:12])
    annotator = EmbeddedAnnotator(device="cpu", folder=folder)
    annotator.dtype = torch.float32
    assert (annotator.embedding_dim, annotator.grid) == (reference.embedding_dim, reference.grid)
    found, expected = annotator.annotate(frames, range(12)), reference.annotate(frames, range(12))
    assert len({annotation.caption for annotation in expected}) == 2
    for one, other in zip(found, expected, strict=True):
        assert (one.caption, one.objects, one.class_names) == (other.caption, other.objects, other.class_names)
        assert (one.frame_step, one.source) == (other.frame_step, "embedded")
        np.testing.assert_allclose(one.caption_embedding, other.caption_embedding, atol=1e-5)
        np.testing.assert_allclose(one.patch_probabilities, other.patch_probabilities, atol=1e-4)
    captions = [annotation.caption for annotation in expected]
    similarities = (clip.image_embeddings(frames) * clip.encode(captions)).sum(1)
    np.testing.assert_allclose(annotator.similarities(captions), similarities, atol=1e-5)
    alone = annotator.annotate(frames[3:4], [7])[0]
    assert alone.caption == captions[3], "whatever else is in the batch"

    rough = EmbeddedAnnotator(device="cpu", folder=folder)
    rough.dtype = torch.bfloat16
    for one, other in zip(rough.annotate(frames, range(12)), expected, strict=True):
        assert (one.caption, one.objects) == (other.caption, other.objects)
        np.testing.assert_allclose(one.patch_probabilities, other.patch_probabilities, atol=0.05)
        assert np.linalg.norm(one.caption_embedding) == pytest.approx(1, abs=1e-5)


def test_open_clip_loads_the_folder_with_its_own_preprocessing(trained):
    folder, corpus, model, _ = trained
    clip = open_clip.create_model(f"local-dir:{folder / 'clip'}")
    assert tuple(open_clip.get_model_preprocess_cfg(clip)["mean"]) == MEAN
    assert tuple(open_clip.get_model_preprocess_cfg(clip)["std"]) == STD
    kept = clip.token_embedding.weight.abs().sum(1) > 0
    assert set(kept.nonzero().flatten().tolist()) <= set(used_tokens(corpus, model).tolist())
    write_clip_config(folder / "clip", model.config, familiar_similarity=0.25)
    assert json.loads((folder / "clip" / "open_clip_config.json").read_text())["familiar_similarity"] == 0.25
    open_clip.create_model(f"local-dir:{folder / 'clip'}")


def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr("semore_bench.guidance.training.CHECKPOINT_EVERY", 2)
    corpus = Corpus([toy_frames("box", 16, 0), toy_frames("crate", 16, 1)])
    settings = Settings(updates=4, batch_size=8)
    whole, losses = train(corpus, settings, tmp_path / "whole.pt", TINY)

    calls = []

    def killed(progress):
        calls.append(progress)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return schedule(progress)

    with monkeypatch.context() as patch:
        patch.setattr("semore_bench.guidance.training.schedule", killed)
        with pytest.raises(KeyboardInterrupt):
            train(corpus, settings, tmp_path / "parts.pt", TINY)
    resumed, again = train(corpus, settings, tmp_path / "parts.pt", TINY)
    assert again == losses
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=0, rtol=0)
    other, _ = train(corpus, replace(settings, seed=1), tmp_path / "parts.pt", TINY)
    assert not torch.equal(other.head.weight, whole.head.weight), "a checkpoint of other settings is not continued"


def test_shards_are_seeded_complete_and_not_made_twice(tmp_path):
    shard = Shard("cartpole", "dm_control/cartpole-swingup-v0", "varied", 0, 6, seed=3)
    [frames] = collect([shard], tmp_path, workers=1)
    file = tmp_path / f"{shard.name}.npz"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert frames.images.shape == (6, 64, 64, 3)
    assert frames.class_names == ("pole", "cart", *BACKGROUND)
    assert {thing.name for thing in frames.objects} == {"pole", "cart"}
    before = file.stat().st_mtime_ns
    collect([shard], tmp_path, workers=1)
    assert file.stat().st_mtime_ns == before
    file.unlink()
    make_shard(shard, tmp_path)
    again = load_shard(shard, tmp_path)
    np.testing.assert_array_equal(again.images, frames.images)
    assert again.captions == frames.captions
    make_shard(replace(shard, split="plain"), tmp_path)
    plain = load_shard(replace(shard, split="plain"), tmp_path)
    assert (plain.classes == 0).any(), "the pole is seen"
    assert abs(plain.images.astype(int) - frames.images).mean() > 1


def test_unfamiliar_scenes_have_no_objects(tmp_path):
    shard = Shard("unfamiliar", "dm_control/fish-swim-v0", "plain", 0, 2, seed=0)
    make_shard(shard, tmp_path)
    frames = load_shard(shard, tmp_path)
    assert set(frames.captions) == {UNFAMILIAR}
    assert frames.objects == ()
    assert frames.class_names == BACKGROUND
    assert set(np.unique(frames.classes)) <= set(range(len(BACKGROUND)))


def test_plan_holds_the_asked_for_frames():
    shards = plan(["cartpole", "metaworld", "unfamiliar"], "train", 1200, 0)
    frames = {}
    for shard in shards:
        frames[shard.domain] = frames.get(shard.domain, 0) + shard.frames
    assert frames == {"cartpole": 1200, "metaworld": 1600, "unfamiliar": 600}
    assert len({shard.name for shard in shards}) == len(shards)


def test_contrastive_loss_equals_loops():
    random = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 8, generator=random), dim=1) for n in (5, 4))
    labels = torch.tensor([0, 2, 0, 2, 1])  # text 3 belongs to none
    similar = (7 * images @ texts.T).double().numpy()
    rows = [-np.log(np.exp(similar[i])[labels[i]] / np.exp(similar[i]).sum()) for i in range(5)]
    columns = []
    for text in range(3):
        shares = np.exp(similar[:, text]) / np.exp(similar[:, text]).sum()
        columns.append(np.mean([-np.log(shares[i]) for i in range(5) if labels[i] == text]))
    expected = (np.mean(rows) + np.mean(columns)) / 2
    assert contrastive_loss(images, texts, labels, 7.0).item() == pytest.approx(expected, rel=1e-5)


def test_dense_loss_is_small_for_right_patches_alone():
    texts = torch.eye(4)
    shares = patch_shares(torch.tensor([[[0] * 32 + [1] * 32] * 64]), 3)
    assert shares.shape == (1, 8, 8, 3)
    assert shares[0, 0, 0].tolist() == [1, 0, 0]
    names = torch.tensor([[2, 1, -1]])
    right = texts[torch.tensor([[[2] * 4 + [1] * 4] * 8])]
    wrong = texts[torch.tensor([[[1] * 4 + [2] * 4] * 8])]
    assert dense_loss(right, texts, names, shares) < 1e-6
    assert dense_loss(wrong, texts, names, shares) > 10


def test_metrics_against_numbers_by_hand():
    true = ["the cart is left; the pole points up", "the cart is right; the pole points down"]
    said = ["the cart is left; the pole points up", "the cart is right; the pole points up and to the right"]
    assert metrics.exact_match(said, true) == 0.5
    assert metrics.attribute_accuracy(said, true) == 0.75
    assert metrics.attribute_accuracy(["", ""], true) == 0
    maps = np.random.default_rng(0).random((3, 8, 8))
    assert metrics.map_iou(maps, maps) == 1
    assert metrics.map_iou(maps, np.zeros_like(maps)) == 0
    assert metrics.map_iou(np.zeros((1, 8, 8)), np.zeros((1, 8, 8))) == 1
    masks = np.random.default_rng(1).random((2, 4, 8, 8)) > 0.5
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert metrics.map_iou(*masks.astype(float)) == pytest.approx(expected)


def test_true_relevance_is_the_objects_share_of_each_patch():
    frames = toy_frames("box", 3, 0)
    expected = (frames.classes == 0).reshape(3, 8, 8, 8, 8).mean((2, 4))
    np.testing.assert_allclose(true_relevance(frames), expected, atol=1e-6)


def test_answers_survive_the_tokenizer_and_the_parser():
    objects = [SceneObject("near leg", 0.8), SceneObject("ball", 1.0)]
    caption = "the hopper's foot is below and left of it, up (a.b); it points up and to the right and is far"
    pieces = answer_pieces(caption, objects)
    tokenizer = make_tokenizer([*pieces, *answer_pieces("the hopper's foot is below; it is far", [])])
    numbers = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    assert len(numbers) == len(pieces)
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "".join(pieces)
    description = parse_answer(tokenizer.decode(numbers))
    assert description.caption == caption
    assert description.objects == tuple(objects)


def test_unusable_answers_count_as_wrong(trained):
    annotator = EmbeddedAnnotator(folder=trained[0])
    annotator._writer = lambda tokens: [""] * len(tokens)
    answers = annotate(annotator, toy_frames("box", 2, 0).images)
    assert answers.captions == ["", ""]
    assert not answers.relevance.any()
    assert (answers.similarity == -1).all()


def test_the_command_makes_models_and_cards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wrappers.backends.writer.MAX_PIECES", 6)  # two updates do not teach it to come to an end
    monkeypatch.setattr("semore_bench.guidance.frames.UNFAMILIAR_TASKS", ("dm_control/fish-swim-v0",))
    models = tmp_path / "models"
    numbers = "--frames 10 --updates 2 --batch-size 8 --workers 1".split()
    names = "--domains pendulum cartpole --leave-out cartpole".split()
    places = ["--output", str(models), "--cache", str(tmp_path / "cache")]
    assert not run(["train-guidance", *numbers, *names, *places])
    assert re.search(r"cartpole \(left out\) +│", capsys.readouterr().out)
    threshold = json.loads((models / "clip" / "open_clip_config.json").read_text())["familiar_similarity"]
    for name in ("clip", "captioner"):
        card = (models / name / "README.md").read_text()
        assert "--frames 10 --updates 2 --batch-size 8 --seed 0 --leave-out cartpole" in card
        assert f"below {threshold:.3f}" in card
        assert len(re.findall(r"^\| pendulum \| [01]\.\d\d \|", card, re.MULTILINE)) == 2
        assert len(re.findall(r"^\| cartpole \(left out\) \| [01]\.\d\d \|", card, re.MULTILINE)) == 2
    assert sum(file.stat().st_size for file in models.rglob("*")) < 20e6
    EmbeddedAnnotator(folder=models).annotate([np.zeros((64, 64, 3), np.uint8)], [0])


def test_mistakes_are_explained(tmp_path, capsys):
    assert run(["train-guidance", "--leave-out", "moon", "--cache", str(tmp_path)]) == 2
    assert "unknown domain 'moon': expected one of cartpole" in capsys.readouterr().err
    assert run(["train-guidance", "--frames", "0", "--cache", str(tmp_path)]) == 2
    assert "--frames must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        collect([], tmp_path / "file" / "frames")
