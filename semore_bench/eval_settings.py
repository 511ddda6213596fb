"""Evaluation settings: under which distractions an agent is evaluated, in how many episodes, and when."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from semore_bench.reading import Positive, Unreadable, check_fields, spelt
from wrappers.distractions import check_distraction
from wrappers.errors import UserError

CLEAN = "clean"
"""the setting without distractions, and the one of files that name none"""
TABLE = {"name": str, "distraction": str, "episodes": Positive | None, "when": Literal["end", "always"] | None}
"""what an [[evaluations]] table of a suite may hold"""

_NAME = r"\w[\w.-]{0,59}"
_WORD = re.compile(
    r"(?:(?P<name>[^=]*)=)?(?P<distraction>.*?)(?::(?P<episodes>[1-9]\d{0,5}))?(?::(?P<when>end|always))?",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True)
class Setting:
    """A setting with the name that files and tables give it.

    `distraction`: see `wrappers.distractions`. `episodes`: None for as many as --eval-episodes says. `when`: at the end
    of a run alone, or always: whenever it is evaluated.
    """

    name: str
    distraction: str = "none"
    episodes: int | None = None
    when: Literal["end", "always"] = "end"

    @property
    def word(self) -> str:
        """As it is typed behind --evaluations."""
        episodes = "" if self.episodes is None else f":{self.episodes}"
        return f"{self.name}={self.distraction}{episodes}{':always' if self.when == 'always' else ''}"


def usual_setting(distraction: str | None) -> str:
    """The name of the setting that an environment with this distraction is in, unless it is given another."""
    return CLEAN if distraction in (None, "none") else distraction


def read_word(word: str) -> Setting:
    """The setting that `[<name>=]<distraction>[:<episodes>][:always]` stands for; raises `UserError`."""
    name, distraction, episodes, when = _WORD.fullmatch(word).groups()
    check_distraction(distraction)
    name = usual_setting(distraction) if name is None else name
    if not re.fullmatch(_NAME, name, re.ASCII):
        raise UserError(f"a setting's name has up to 60 letters, digits, -, _ and ., got {spelt(name)}")
    return Setting(name, distraction, int(episodes) if episodes else None, "always" if when == "always" else "end")


def read_table(table: Any, where: str) -> Setting:
    """The setting of an [[evaluations]] table; raises `Unreadable`."""
    checked = check_fields(table, TABLE, where)
    if unknown := checked.keys() - TABLE.keys():
        raise Unreadable(f"{where}: unknown key {min(unknown)!r}; expected {', '.join(TABLE)}")
    setting = Setting(checked["name"], checked["distraction"], checked["episodes"], checked["when"] or "end")
    try:
        check_distraction(setting.distraction)
    except UserError as error:
        raise Unreadable(f"{where}: {error}") from None
    if not re.fullmatch(_NAME, setting.name, re.ASCII):
        raise Unreadable(f"{where}: name must be up to 60 letters, digits, -, _ and ., got {spelt(setting.name)}")
    return setting


def all_settings(distraction: str, words: Sequence[str]) -> tuple[Setting, ...]:
    """The settings of a run: the one that it is trained in, evaluated always, then those of --evaluations.

    That one may be named there, too, as long as nothing else is said of it.

    Raises:
        UserError: a setting is misspelt, or there twice.
    """
    usual = Setting(usual_setting(distraction), distraction, when="always")
    settings = {usual.name: usual}
    for word in words:
        setting = read_word(word)
        if setting == Setting(usual.name, distraction):
            continue
        if setting.name == usual.name:
            raise UserError(
                f"--evaluations {word}: {usual.name} is what every run is evaluated in, as --eval-every and "
                "--eval-episodes say; choose another name, or leave it out"
            )
        if setting.name in settings:
            raise UserError(f"--evaluations names {setting.name} twice; give each setting a name of its own")
        settings[setting.name] = setting
    return tuple(settings.values())


def setting_of(args: Mapping[str, Any]) -> str:
    """The name of the setting in which a run with these arguments is trained and evaluated as usual."""
    return usual_setting(args.get("distraction"))
