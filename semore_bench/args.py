"""The command-line flags that every agent shares, as one dataclass to inherit from."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from semore_bench.eval_settings import Setting, all_settings
from wrappers.backends.annotators import check_annotator, check_grid
from wrappers.backends.specs import EMBEDDED, is_embedded, loads_models
from wrappers.backends.vision_language import check_background
from wrappers.distractions import check_distraction
from wrappers.errors import UserError

if TYPE_CHECKING:
    from semore_bench.envs import EnvConfig

_FREE = {"run_dir", "fresh", "track", "capture_video", "cuda", "annotation_cache"}
"""flags that say where and how to look at a run, not what it computes"""


@dataclass
class CommonArgs:
    """Flags shared by all agents. A field left at None is filled in by `resolve` and written to config.json."""

    env_id: str = "dm_control/cartpole-swingup-v0"
    """any Gymnasium id, or Meta-World/<task>-v3; `semore-bench list envs` shows them"""
    seed: int = 1
    """seeds networks, exploration, replay sampling and, through (seed, episode), every episode"""
    total_env_steps: Annotated[int, tyro.conf.arg(aliases=["--total-timesteps"])] = 100_000
    """budget in simulator steps, action repeat included"""
    action_repeat: int = 4
    """simulator steps per agent step, with the same action"""
    preset: Literal["auto", "reference", "lite"] = "auto"
    """reference: 84 pixels, conv strides 2,1,1,1 and hidden layers of 1024 as published, batches of 128; lite (laptop):
    64 pixels, strides 2,2,1,1, hidden layers of 256, batches of 64; auto: lite where --image-size is at most 64"""
    image_size: int | None = None
    """height and width of the frames in pixels (reference 84, lite 64)"""
    pixel_source: Literal["observation", "render"] | None = None
    """source of the pixels: an image in the observation, or env.render (default: the first of these that there is)"""
    pixel_key: str | None = None
    """key of the image in a Dict observation that has several"""
    distraction: str = "none"
    """how pictures are changed in training: none, or <kind>-<difficulty>[-static]; kinds: background, colour, camera,
    light, all; difficulties: easy, medium, hard; evaluation draws from visual seeds and pictures that are held out"""
    distraction_folder: str | None = None
    """folder with videos or pictures for backgrounds (default: textures of the project's own)"""
    frame_stack: int = 3
    """frames stacked into an observation"""
    num_envs: int = 1
    """environments stepped in parallel, each in its own process"""
    annotator: str = "none"
    """annotator of frames: none, simulator (MuJoCo state; privileged), embedded (small, needs no network),
    embedded:<folder> (as `semore-bench train-guidance --output` makes it), transformers:<model or folder> or
    openai:<base url>#<model>"""
    annotate_every: int = 8
    """agent steps between annotated frames"""
    annotation_grid: int | None = None
    """patches per side of the annotations' maps (default: 16 for simulator and embedded, 28 for others with ViT-B-16,
    the native grid of another --clip)"""
    task_description: str = ""
    """description of the task in a sentence, for the prompt of a vision-language model"""
    background_classes: tuple[str, ...] | None = None
    """names of what else may be seen, for a vision-language model's annotations: up to 5, such as road grass sky
    (default: floor wall sky background); the embedded model has its own"""
    clip: str | None = None
    """CLIP that locates objects: <model>:<weights> as open_clip names them, a folder, or embedded (default: embedded
    with that annotator, ViT-B-16 with others)"""
    annotation_cache: str | None = None
    """cache folder of a vision-language model's annotations; runs may share one (default: in the run directory)"""
    flow_estimator: Literal["dis", "farneback", "simulator"] = "dis"
    """optical flow estimator, for agents that use flow"""
    random_steps: int | None = None
    """agent steps with uniformly random actions before learning starts (default: 500, at most a quarter of them all)"""
    batch_size: int | None = None
    """transitions per update (reference 128, lite 64)"""
    updates_per_step: int = 1
    """gradient updates per agent step (update-to-data ratio)"""
    critic_layer_norm: bool = False
    """LayerNorm in the critics' hidden layers"""
    replay_capacity: int = 100_000
    """capacity of the replay buffer in transitions"""
    eval_every: int = 10_000
    """env steps between evaluations; the last one is always at the end of the budget"""
    eval_episodes: int = 10
    """episodes per evaluation, with fixed seeds"""
    evaluations: tuple[str, ...] = ()
    """further settings to be evaluated in at the end of the run, each [<name>=]<distraction>[:<episodes>][:always],
    such as background-hard or wild=all-hard:20; with :always at every evaluation"""
    checkpoint_every: int = 1000
    """agent steps between checkpoints (also written every two minutes and on Ctrl-C)"""
    run_dir: str | None = None
    """folder of this run (default: runs/<env>/<agent>/seed-<seed>)"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one"""
    cuda: bool = True
    """for command lines of CleanRL: --no-cuda is --device cpu"""
    bfloat16: bool = False
    """mixed precision: the encoders' convolutions in bfloat16, nearly half of an update's time on GPUs and on CPUs with
    bfloat16 instructions (AVX512-BF16, AMX)"""
    compile: bool = False
    """compile the losses with torch.compile"""
    capture_video: bool = False
    """record a video of one episode per evaluation: RGB, flow, relevance and caption"""
    track: bool = False
    """log to Weights & Biases too"""
    fresh: bool = False
    """start from scratch; the previous run in this directory is deleted when the new run has its first checkpoint"""

    def resolve(self) -> None:
        """Fills in what was left open and refuses what cannot work.

        Raises:
            UserError: a value is out of range; the message names the flag.
        """
        positive = (
            "total_env_steps action_repeat frame_stack num_envs annotate_every updates_per_step replay_capacity "
            "eval_every eval_episodes checkpoint_every"
        ).split()
        self.require_at_least(1, *positive)
        check_annotator(self.annotator)
        check_distraction(self.distraction)
        check_grid(self.annotation_grid)
        check_background(self.background_classes)
        _ = self.eval_settings  # refuses what is misspelt
        if self.preset == "auto":
            self.preset = "lite" if self.image_size and self.image_size <= 64 else "reference"
        if self.image_size is None:
            self.image_size = 84 if self.preset == "reference" else 64
        if self.image_size < 32:
            raise UserError(f"--image-size must be at least 32 pixels, got {self.image_size}; try --image-size 64")
        if self.random_steps is None:
            self.random_steps = min(500, self.total_env_steps // self.action_repeat // 4)
        self.require_at_least(0, "seed", "random_steps")
        if self.batch_size is None:
            self.batch_size = 128 if self.preset == "reference" else 64
        self.require_at_least(2, "batch_size")
        if not self.cuda:
            self.device = "cpu"
        asked_for = self.annotator not in ("none", type(self).annotator)
        is_agent = hasattr(self, "env_config")  # these flags alone are nobody's
        if asked_for and is_agent and self.env_config().annotator == "none":
            raise UserError(f"this agent uses no annotations: leave --annotator {self.annotator} out")

    def require_at_least(self, least: int, *names: str) -> None:
        """Raises `UserError` for the first of these fields that is less."""
        for name in names:
            if getattr(self, name) < least:
                raise UserError(f"{flag(name)} must be at least {least}, got {getattr(self, name)}")

    if TYPE_CHECKING:

        def env_config(self) -> "EnvConfig":
            """How the environments are wrapped; every agent says so."""

    @property
    def settings(self) -> dict[str, Any]:
        """The flags that make a run what it is, as JSON has them: a run is continued with the same ones alone."""
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name not in _FREE}))

    @property
    def guidance(self) -> dict[str, Any]:
        """The settings of an `EnvConfig` that concern annotations."""
        names = "annotator", "annotate_every", "annotation_grid", "task_description", "clip", "annotation_cache"
        return {name: getattr(self, name) for name in (*names, "background_classes")}

    @property
    def guidance_source(self) -> str:
        """The annotator whose guidance the agent gets, and a CLIP that is not its own, as results name them."""
        from wrappers.backends.embedded import learned_from  # evaluation needs no model

        config = self.env_config()
        if config.true_things:
            return "simulator"
        annotator = source = str(config.annotator)
        if is_embedded(annotator) and annotator != EMBEDDED and (learned := learned_from(annotator)):
            source += f" (without {learned['left_out']})"
        return f"{source}, CLIP {config.clip}" if loads_models(annotator) and config.clip else source

    @property
    def eval_settings(self) -> tuple[Setting, ...]:
        """The settings in which the agent is evaluated, that of its own environments first; raises `UserError`."""
        return all_settings(self.distraction, self.evaluations)

    @property
    def conv_strides(self) -> tuple[int, ...]:
        """Strides of the four 3x3 convolutions."""
        return (2, 1, 1, 1) if self.preset == "reference" else (2, 2, 1, 1)

    @property
    def hidden_dim(self) -> int:
        """Width of the actor's and the critics' MLPs."""
        return 1024 if self.preset == "reference" else 256


def flag(name: str) -> str:
    """The command-line spelling of a field: `total_env_steps` -> `--total-env-steps`."""
    return "--" + name.replace("_", "-")
