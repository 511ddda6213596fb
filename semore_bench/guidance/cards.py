"""The cards of the embedded models: what they are made of, how good they are, what they cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from semore_bench.guidance.evaluation import Measured
from semore_bench.guidance.frames import DISTRACTED_FRAMES, DOMAINS, NEVER_SHOWN_TASKS, UNFAMILIAR, UNFAMILIAR_TASKS
from wrappers.backends.familiarity import FALSE_ALARMS

_CARD = """# {title}

{what}

## Made from

{made[frames]:,} rendered frames of 64 x 64 pixels with {made[captions]:,} different captions, all written by the
simulator: what a single frame shows, without motion. Half of the states were reached by random actions, half were set
at random (Meta-World: random actions alone). Colours, lights, camera and field of view were varied, skies and floors
replaced.
Domains: {domains}. Examples of what is none of them: {unfamiliar}.
No pre-trained weights, no data from elsewhere.

    {made[command]}

{made[updates]:,} updates of CLIP and captioner took {made[minutes]} minutes, to a loss of {made[loss]:.2f}. The CLIP's
dense head was trained last, in {dense[updates]:,} updates and {dense[minutes]} minutes, to a loss of
{dense[loss]:.2f}, by

    {dense[command]}

on {dense[hardware]}. Measured, and the distances of unfamiliar scenes fitted, by

    {command}

## Measured

On states that training never saw, both models together, exactly as annotator `embedded` uses them.

- exact: captions equal to the simulator's, letter by letter
- attributes: phrases of them that are equal
- retrieval: frames whose nearest caption, among all different ones of the domain, is theirs
- IoU: of the 16 x 16 relevance map and the simulator's, sum of minima over sum of maxima
- things: the same of the map of each thing that matters in the scene, on average; one by one below
- unfamiliar: frames in which nothing is named because the scene is not known; should be 0 for known scenes and 1 for
  others. The captioner says so, or the frame's features lie further from those of every known scene (Mahalanobis
  distance, `familiarity.safetensors`) than those of all but {false_alarms} of the known frames in varied looks. Of
  "other scenes" the captioner was shown other frames in training, of "scenes never shown" ({never_shown}) none.

{tables}
On average over the known domains, the IoU of things is {class_iou[plain]:.3f} in their own look and
{class_iou[varied]:.3f} in varied looks. Thing by thing:

{things}
Under distractions (`Distraction`, in the looks that are kept for testing and were not trained on;
up to {distracted_frames} frames of each domain's first task, a look for every ten), the IoU of things on average, and
thing by thing:

{distracted}
`{left_out}` was left out of training: its row says what happens with a scene of a kind never seen.

## What it cannot do

- Describe other kinds of scenes. Such a scene gets the caption "{unfamiliar_caption}" and no names, or, as the table
  says of `{left_out}`, the caption of a scene that looks alike. Name a real vision-language model then.
- See motion, read text, count, follow a question: whatever the prompt asks, it names what matters in the scene.
- See what is smaller than a few pixels of 64 x 64.
"""

_WHAT = {
    "clip": (
        "Embedded CLIP",
        "A small image-text model in open_clip's format (`open_clip.create_model('local-dir:<this folder>')`): a\n"
        "vision transformer with patches of 8 pixels. It was trained with the symmetric contrastive loss, equal\n"
        "captions being positives of each other, and a dense one that teaches the features of patches the names of\n"
        "what the simulator's masks show there. Words that no caption uses have an embedding of 0.\n\n"
        "Beside it lies a dense head (`dense_head.safetensors`, which open_clip leaves alone): a small U-Net whose\n"
        "features of 16 x 16 patches were trained, against the same embeddings of names, to tell things apart; where\n"
        "things are is its answer.",
    ),
    "captioner": (
        "Embedded captioner",
        "A small LLaVA that `transformers` loads (`AutoModelForImageTextToText.from_pretrained('<this folder>')`):\n"
        "a copy of the embedded CLIP's vision transformer, and a language model whose words are phrases. It answers\n"
        "JSON with a caption and the objects that matter.",
    ),
}


def write_cards(
    folder: Path,
    facts: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Measured]],
    distracted: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    """Writes `README.md` next to each model; `distracted` is what `measure_things` says."""
    looks = {"plain": "In the environments' own look:", "varied": "In varied looks:"}
    tables = "\n".join(f"{looks[split]}\n\n{_table(rows, facts['left_out'])}" for split, rows in measured.items())
    domains = [f"{name} ({', '.join(DOMAINS[name])})" for name in facts["domains"]]
    for name, (title, what) in _WHAT.items():
        text = _CARD.format(
            **{**facts, "domains": "; ".join(domains)},
            title=title,
            what=what,
            tables=tables,
            things=_things(measured),
            distracted=_distracted(distracted),
            distracted_frames=DISTRACTED_FRAMES,
            unfamiliar=", ".join(UNFAMILIAR_TASKS),
            false_alarms=f"{FALSE_ALARMS:.1%}",
            never_shown=", ".join(NEVER_SHOWN_TASKS),
            unfamiliar_caption=UNFAMILIAR,
        )
        (folder / name / "README.md").write_text(text)


def _table(rows: Mapping[str, Measured], left_out: str) -> str:
    lines = ["| domain | exact | attributes | retrieval | IoU | things | unfamiliar |", "|---|---|---|---|---|---|---|"]
    for domain, row in rows.items():
        others = {"unfamiliar": "other scenes", "never shown": "scenes never shown"}
        label = ({left_out: f"{domain} (left out)"} | others).get(domain, domain)
        cells = ("" if value is None else f"{value:.2f}" for value in row.numbers().values())
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _things(measured: Mapping[str, Mapping[str, Measured]]) -> str:
    lines = ["| domain | thing | own look | varied looks |", "|---|---|---|---|"]
    for domain, row in measured["plain"].items():
        for name, value in row.by_class.items():
            lines.append(f"| {domain} | {name} | {value:.2f} | {measured['varied'][domain].by_class[name]:.2f} |")
    return "\n".join(lines) + "\n"


def _distracted(distracted: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row of means over domains, then one per thing; a column per distraction."""
    names = list(distracted)
    lines = [f"| domain | thing | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    means = (np.mean([np.mean(list(things.values())) for things in distracted[name].values()]) for name in names)
    lines.append(f"| **all** | **mean** | {' | '.join(f'**{mean:.2f}**' for mean in means)} |")
    for domain, things in distracted[names[0]].items():
        for thing in things:
            cells = (f"{distracted[name][domain][thing]:.2f}" for name in names)
            lines.append(f"| {domain} | {thing} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
