"""What there is to see in MuJoCo scenes and how to say it: a hand-written table, and rules for every other model."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from string import Formatter

import mujoco
import numpy as np

from wrappers.backends.annotation import MAX_OBJECTS

BACKGROUND = ("floor", "sky", "wall", "background")

# MuJoCo does not draw geoms and sites of higher groups unless asked to.
_DRAWN_GROUPS = 3

ShapeKey = tuple[int, int]  # MuJoCo's object type (geom, site, tendon or skin) and number


@dataclass(frozen=True)
class Part:
    """Something worth naming: what it is called and which shapes of the model it is made of.

    Attributes:
        name: Common-sense name, also the name of its class.
        shapes: Patterns of "body/shape" (or "tendon/name", "skin/name"); the first shape found is the anchor, whose
            position stands for the part's.
        relevance: How much the part matters for the task, 0-1.
        forward: The body's axis that says where the part points; None: from the body's origin to the anchor.
    """

    name: str
    shapes: tuple[str, ...]
    relevance: float
    forward: int | None = None


@dataclass(frozen=True)
class Domain:
    """The parts of a scene and two sentences about them: what a single frame shows, and what moves how.

    The sentences are format strings over the parts' names and the attributes of `simulator.SeenPart`;
    `{ball[cup]}` says where the ball is as seen from the cup. A part that no sentence names may be missing.
    """

    parts: tuple[Part, ...]
    look: str
    motion: str

    def caption(self, parts: Mapping[str, object], motion: bool) -> str:
        """The sentences with the parts' words filled in."""
        return "; ".join(filter(None, (self.look, self.motion if motion else ""))).format_map(parts)

    def named(self) -> set[str]:
        """The names of the parts that the sentences need."""
        fields = (field for _, field, _, _ in Formatter().parse(self.look + self.motion) if field)
        return {name for field in fields for name in re.findall(r"^[^.[]+|(?<=\[)[^]]+", field)}


@dataclass(frozen=True)
class Scene:
    """A domain found in a model: its visible parts with their anchors and bodies, and the class of every shape."""

    domain: Domain
    parts: tuple[Part, ...]
    anchors: tuple[ShapeKey, ...]
    bodies: tuple[frozenset[int], ...]
    class_names: tuple[str, ...]
    shape_class: dict[ShapeKey, int]


def find_scene(model: mujoco.MjModel) -> Scene:
    """Matches the model with the first domain whose parts it draws; the last candidate is made from its body names."""
    shapes = _shapes(model)
    name = model.names.split(b"\0")[0].decode()
    domains = [*DOMAINS.get(name, ()), *_meta_world(model), _generic(model, shapes)]
    scenes = (_match(domain, shapes) for domain in domains)
    return next(scene for scene in scenes if scene.domain.named() <= {part.name for part in scene.parts})


@dataclass(frozen=True)
class _Shape:
    path: str
    body: int | None  # a tendon or a skin has none
    drawn: bool
    background: str


def _shapes(model: mujoco.MjModel) -> dict[ShapeKey, _Shape]:
    kinds = mujoco.mjtObj
    shapes = {}
    for number in range(model.ngeom):
        body, geom = int(model.geom_bodyid[number]), model.geom(number)
        drawn = geom.rgba[3] > 0 and geom.group[0] < _DRAWN_GROUPS
        path = f"{_body_name(model, body)}/{geom.name}"
        shapes[kinds.mjOBJ_GEOM, number] = _Shape(path, body, drawn, _background(model, number, path))
    for number in range(model.nsite):
        body, site = int(model.site_bodyid[number]), model.site(number)
        drawn = site.rgba[3] > 0 and site.group[0] < _DRAWN_GROUPS
        shapes[kinds.mjOBJ_SITE, number] = _Shape(f"{_body_name(model, body)}/{site.name}", body, drawn, "background")
    for number in range(model.ntendon):
        path = f"tendon/{model.tendon(number).name}"
        shapes[kinds.mjOBJ_TENDON, number] = _Shape(path, None, True, "background")
    for number in range(model.nskin):
        shapes[kinds.mjOBJ_SKIN, number] = _Shape(f"skin/{model.skin(number).name}", None, True, "background")
    return shapes


def _body_name(model: mujoco.MjModel, body: int) -> str:
    return model.body(body).name or f"#{body}"


def _background(model: mujoco.MjModel, geom: int, path: str) -> str:
    """The background class of a geom, for the case that no part claims it."""
    if "wall" in path.lower():
        return "wall"
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_HFIELD:
        return "floor"
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE:
        normal = np.empty(9)
        mujoco.mju_quat2Mat(normal, model.geom_quat[geom])
        return "floor" if abs(normal[8]) > 0.7 else "wall"
    return "background"


def _match(domain: Domain, shapes: dict[ShapeKey, _Shape]) -> Scene:
    free = dict(shapes)
    parts, anchors, bodies, members = [], [], [], []
    for part in domain.parts:
        mine = [key for pattern in part.shapes for key in free if fnmatchcase(free[key].path, pattern)]
        if any(shapes[key].drawn for key in mine):
            parts.append(part)
            anchors.append(mine[0])
            bodies.append(frozenset(shapes[key].body for key in mine) - {None})
            members.append(mine)
            free = {key: shape for key, shape in free.items() if key not in mine}
    class_names = (*(part.name for part in parts), *BACKGROUND)
    shape_class = {key: class_names.index(shape.background, len(parts)) for key, shape in shapes.items()}
    shape_class |= {key: index for index, mine in enumerate(members) for key in mine}
    return Scene(domain, tuple(parts), tuple(anchors), tuple(bodies), class_names, shape_class)


# ---- the hand-written domains, by the name of the model ----

_TARGET = Part("target", ("world/target", "target*/*"), 1.0)
_FISH = Part("fish", ("torso/torso", "torso/*"), 1.0, forward=1)
_HEAD = Part("head", ("head/nose", "head/*"), 1.0)
_SPINNER = Part("spinner", ("spinner/spinner_decoration", "spinner/*"), 1.0, forward=2)
_FINGERTIP = Part("fingertip", ("distal/fingertip",), 0.8)
_FINGER = Part("finger", ("distal/*", "proximal/*"), 0.5)
_QUADRUPED = (
    Part("torso", ("torso/torso", "torso/*"), 0.8, forward=0),
    Part("front legs", ("*_front_*/*",), 0.6),
    Part("back legs", ("*_back_*/*",), 0.6),
)
_HAND = Part("hand", ("hand/*", "thumb*/*", "finger*/*"), 0.8)
_ARM = Part("arm", ("*_arm/*", "world/arm_root"), 0.3)
_DOG = (
    Part("dog", ("torso/*", "skin/*", "*_[LR]/*"), 0.8),
    Part("head", ("skull/*", "jaw/*"), 0.8),
)


def _manipulator(thing: str, shapes: tuple[str, ...]) -> Domain:
    target = Part("target", (f"target_{thing}/*",), 1.0)
    receptacle = Part("receptacle", ("cup/*", "slot/*"), 0.8)
    return Domain(
        (Part(thing, shapes, 1.0), target, _HAND, receptacle, _ARM),
        f"the hand is {{hand.where}}, {{hand[{thing}]}} the {thing}; the target is {{target[{thing}]}} the {thing}",
        f"the hand is {{hand.moves}}; the {thing} is {{{thing}.moves}}",
    )


DOMAINS: dict[str, tuple[Domain, ...]] = {
    "acrobot": (
        Domain(
            (Part("upper arm", ("upper_arm/upper_arm", "upper_arm/*"), 0.9), Part("lower arm", ("lower_arm/*",), 1.0)),
            "the upper arm points {upper arm.points}, the lower arm {lower arm.points}",
            "the upper arm is {upper arm.turns}, the lower arm is {lower arm.turns}",
        ),
    ),
    "ball in cup": (
        Domain(
            (
                Part("ball", ("ball/ball", "ball/*"), 1.0),
                Part("cup", ("cup/target", "cup/*"), 0.9),
                Part("string", ("tendon/*",), 0.3),
            ),
            "the cup is {cup.where}; the ball is {ball[cup]} the cup",
            "the ball is {ball.moves}; the cup is {cup.moves}",
        ),
    ),
    "cart-pole": (
        Domain(
            (Part("pole", ("pole_1/*", "pole_*/*"), 1.0), Part("cart", ("cart/*",), 0.8)),
            "the cart is {cart.column}; the pole points {pole.points}",
            "the cart is {cart.moves}; the pole is {pole.turns}",
        ),
    ),
    "cheetah": (
        Domain(
            (
                Part("torso", ("torso/torso", "torso/*"), 1.0, forward=0),
                Part("front leg", ("fshin/*", "ffoot/*", "fthigh/*"), 0.8),
                Part("back leg", ("bshin/*", "bfoot/*", "bthigh/*"), 0.8),
            ),
            "the cheetah points {torso.points}; its front shin points {front leg.points}, "
            "its back shin {back leg.points}",
            "it is {torso.moves} and {torso.turns}",
        ),
    ),
    "dog": (
        Domain(
            (Part("ball", ("ball/*",), 1.0), _TARGET, *_DOG),
            "the dog is {dog.where}; the ball is {ball.where}; the target is {target.where}",
            "the dog is {dog.moves}; the ball is {ball.moves}",
        ),
        Domain(
            _DOG,
            "the dog is {dog.leans}; its head is {head[dog]} its body",
            "it is {dog.moves} and {dog.turns}",
        ),
    ),
    "finger": (
        Domain(
            (_TARGET, _SPINNER, _FINGERTIP, _FINGER),
            "the spinner points {spinner.points}; the target is {target[spinner]} the spinner; "
            "the fingertip is {fingertip[spinner]} it",
            "the spinner is {spinner.turns}; the fingertip is {fingertip.moves}",
        ),
        Domain(
            (_SPINNER, _FINGERTIP, _FINGER),
            "the spinner is {spinner.slants}; the fingertip is {fingertip[spinner]} it",
            "the spinner is {spinner.turns}; the fingertip is {fingertip.moves}",
        ),
    ),
    "fish": (
        Domain(
            (_TARGET, _FISH, Part("tail", ("tail*/*",), 0.6), Part("fins", ("fin*/*",), 0.4)),
            "the fish is {fish.where}, {fish[target]} the target, and points {fish.points}",
            "the fish is {fish.moves} and {fish.turns}",
        ),
        Domain(
            (_FISH, Part("tail", ("tail*/*",), 0.6), Part("fins", ("fin*/*",), 0.6)),
            "the fish is {fish.where} and {fish.leans}; it points {fish.points}",
            "it is {fish.moves} and {fish.turns}",
        ),
    ),
    "planar hopper": (
        Domain(
            (
                Part("torso", ("torso/torso", "torso/*", "pelvis/*"), 1.0),
                Part("foot", ("foot/*",), 0.9),
                Part("leg", ("calf/*", "thigh/*"), 0.8),
            ),
            "the hopper's torso is {torso.leans}; its knee is {leg[torso]} the torso, its foot is {foot[torso]} it",
            "it is {torso.moves} and {torso.turns}",
        ),
    ),
    "planar manipulator": (
        _manipulator("ball", ("ball/*",)),
        _manipulator("peg", ("peg/*", "pommel/*")),
    ),
    "planar point mass": (
        Domain(
            (Part("ball", ("pointmass/*",), 1.0), _TARGET),
            "the ball is {ball.where}, {ball[target]} the target",
            "the ball is {ball.moves}",
        ),
    ),
    "planar stacker": (
        Domain(
            (Part("boxes", ("box*/*",), 1.0), _TARGET, _HAND, _ARM),
            "the hand is {hand.where}; the boxes are {boxes.where}; the target is {target.where}",
            "the hand is {hand.moves}; the boxes are {boxes.moves}",
        ),
    ),
    "planar walker": (
        Domain(
            (
                Part("torso", ("torso/*",), 1.0),
                Part("near leg", ("right_foot/*", "right_*/*"), 0.8),
                Part("far leg", ("left_foot/*", "left_*/*"), 0.8),
            ),
            "the walker is {torso.leans}; its near foot is {near leg[torso]} its torso, "
            "its far foot is {far leg[torso]} it",
            "it is {torso.moves} and {torso.turns}",
        ),
    ),
    "pendulum": (
        Domain(
            (Part("pole", ("pole/mass", "pole/pole", "pole/*"), 1.0),),
            "the pole points {pole.points}",
            "it is {pole.turns}",
        ),
    ),
    "quadruped": (
        Domain(
            (Part("ball", ("ball/*",), 1.0), _TARGET, *_QUADRUPED),
            "the robot is {torso.where} and points {torso.points}; the ball is {ball.where}; "
            "the target is {target.where}",
            "the robot is {torso.moves}; the ball is {ball.moves}",
        ),
        Domain(
            _QUADRUPED,
            "the robot is {torso.where} and {torso.leans}; it points {torso.points}",
            "it is {torso.moves} and {torso.turns}",
        ),
    ),
    "swimmer": (
        Domain(
            (_TARGET, _HEAD, Part("body", ("segment_*/*",), 0.6)),
            "the swimmer is {body.where} and points {head.points}; the target is {target.where}",
            "the swimmer is {head.moves} and {head.turns}",
        ),
    ),
    "two-link planar reacher": (
        Domain(
            (_TARGET, Part("fingertip", ("finger/*",), 1.0), Part("arm", ("arm/*", "hand/*", "world/root"), 0.5)),
            "the target is {target.where}; the fingertip is {fingertip[target]} the target",
            "the fingertip is {fingertip.moves}",
        ),
    ),
}
DOMAINS["humanoid"] = DOMAINS["humanoid_CMU"] = (
    Domain(
        (
            Part("head", ("head/*", "*neck/*"), 0.9),
            Part("right leg", ("right_foot/*", "right_shin/*", "right_thigh/*", "r[ft]*/*", "rhip*/*"), 0.8),
            Part("left leg", ("left_foot/*", "left_shin/*", "left_thigh/*", "l[ft]*/*", "lhip*/*"), 0.8),
            Part("arms", ("*_arm/*", "*hand/*", "*humerus/*", "*radius/*", "*wrist/*", "*fingers/*", "*thumb/*"), 0.4),
            Part("torso", ("pelvis/*", "root/*", "*waist/*", "*back/*", "thorax/*", "torso/*", "*clavicle/*"), 1.0),
        ),
        "the humanoid's head is {head[torso]} its hips; its right foot is {right leg[torso]} them, "
        "its left foot is {left leg[torso]} them",
        "it is {torso.moves}",
    ),
)


# ---- Meta-World, one robot with many things ----

_FURNITURE = ("tablelink", "RetainingWall", "base", "mocap")
_THINGS = {
    "boxbody": "box",
    "boxbodytop": "lid",
    "bsktball": "basketball",
    "cmbutton": "coffee machine",
    "goal whole": "soccer goal",
    "hammerbody": "hammer",
    "puck channel": "puck",
    "windowb": "window",
}


def _meta_world(model: mujoco.MjModel) -> Iterable[Domain]:
    """The domains of a Meta-World model, if it is one: with a goal and without. Things are what the table bears."""
    names = [_body_name(model, body) for body in range(model.nbody)]
    if not {"rightclaw", "leftclaw", "tablelink", "mocap"} <= set(names):
        return
    groups = []
    for root in range(1, model.nbody):
        if model.body_parentid[root] == 0 and names[root] not in _FURNITURE:
            bodies = [body for body in range(root, model.nbody) if model.body_rootid[body] == root]
            groups.append(sorted(bodies, key=lambda body: not model.body_dofnum[body]))  # what moves comes first
    groups.sort(key=lambda bodies: not model.body_dofnum[bodies[0]])
    things: dict[str, Part] = {}
    for bodies in groups:
        name = _plain_name(names[bodies[0]]) or _plain_name(names[min(bodies)]) or "object"
        name = _THINGS.get(name, name)
        if name not in BACKGROUND:
            patterns = tuple(f"{glob.escape(names[body])}/*" for body in bodies)
            things.setdefault(name, Part(name, patterns, 0.5 if things else 1.0))
    goal = Part("goal", ("*/goal", "*/*_goal"), 1.0)
    gripper = Part("gripper", ("hand/endEffector", "hand/*", "*claw/*", "*pad/*"), 0.8)
    arm = Part("arm", ("right_*/*", "head/*", "screen/*", "torso/*", "pedestal*/*", "controller_box/*"), 0.2)
    parts = (goal, *list(things.values())[:2], gripper, arm)
    first = next(iter(things))
    look = f"the gripper is {{gripper.where}}, {{gripper[{first}]}} the {first}"
    motion = f"the gripper is {{gripper.moves}}; the {first} is {{{first}.moves}}"
    yield Domain(parts, look + " and {gripper[goal]} the goal; the goal is {goal.where}", motion)
    yield Domain(parts, look + f"; the {first} is {{{first}.where}}", motion)


# ---- every other model ----

_MEANINGLESS = re.compile(r"\b(left|right|[a-z]|geom|link|body|joint|aux)\b")
_GOAL = re.compile(r"target|goal|object|ball|puck|box|block|cube")


def _plain_name(name: str) -> str:
    """Words without camel case, underscores, digits, sides and modelling terms: "RoundNut_2" is a "round nut"."""
    words = re.sub(r"[^a-z]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return " ".join(_MEANINGLESS.sub(" ", re.sub(r"\bobj\b", "object", words)).split())


def _generic(model: mujoco.MjModel, shapes: dict[ShapeKey, _Shape]) -> Domain:
    """At most five groups of moving bodies of one name: what a task may be about, then roots, then the largest."""
    group: dict[int, str] = {}
    for body in range(1, model.nbody):
        if model.body_weldid[body] != 0:  # not fixed to the world
            name = _plain_name(model.body(body).name)
            group[body] = name or group.get(int(model.body_parentid[body]), "body")
    size = dict.fromkeys(group.values(), 0.0)
    for (kind, number), shape in shapes.items():
        if kind == mujoco.mjtObj.mjOBJ_GEOM and shape.drawn and shape.body in group:
            size[group[shape.body]] += model.geom_rbound[number]
    roots = {name for body, name in group.items() if model.body_parentid[body] == 0}
    names = sorted(filter(size.get, size), key=lambda name: (not _GOAL.search(name), name not in roots, -size[name]))[
        :MAX_OBJECTS
    ]
    bodies: dict[str, list[int]] = {name: [] for name in names}
    for body in group:
        # A group that is left out belongs to what it hangs on.
        owner = body
        while owner in group and group[owner] not in bodies:
            owner = int(model.body_parentid[owner])
        if owner in group:
            bodies[group[owner]].append(body)
    parts = tuple(
        Part(
            name,
            tuple(f"{glob.escape(_body_name(model, body))}/*" for body in members),
            1.0 if _GOAL.search(name) else 0.8 if name in roots else 0.5,
        )
        for name, members in bodies.items()
    )
    look = [f"the {name} is {{{name}.where}}" for name in names[:3]]
    if len(names) > 1 and _GOAL.search(goal := names[0]):
        look[1:] = [f"the {name} is {{{name}[{goal}]}} the {goal}" for name in names[1:3]]
    return Domain(
        parts,
        "; ".join(look) or "nothing moves here",
        "; ".join(f"the {name} is {{{name}.moves}}" for name in names[:2]),
    )
