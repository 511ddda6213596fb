"""What `semore-bench list` finds, and which ids it takes a mistyped one for."""

import gymnasium as gym
import pytest

from semore_bench import listing
from wrappers.errors import UserError


def every_id() -> list[str]:
    return [env_id for ids in listing.env_ids().values() for env_id in ids]


def test_families():
    families = listing.env_ids()
    assert "dm_control/walker-walk-v0" in families["dm_control"]
    assert len(families["Meta-World"]) == 50
    assert "Meta-World/drawer-open-v3" in families["Meta-World"]
    assert "CarRacing-v3" in families["Gymnasium Box2D"]
    assert all(ids == tuple(sorted(ids, key=str.lower)) for ids in families.values())


def test_ids_are_listed_once_in_their_newest_version_and_are_known_to_gymnasium():
    ids = every_id()
    assert len(ids) == len(set(ids))
    assert all(env_id in gym.registry for env_id in ids if not env_id.startswith("Meta-World/"))
    assert [env_id for env_id in ids if env_id.startswith("HalfCheetah-v")] == ["HalfCheetah-v5"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("walker_walk", "dm_control/walker-walk-v0"),
        ("dm_control/walker-walk", "dm_control/walker-walk-v0"),
        ("dmc/cheetah_run", "dm_control/cheetah-run-v0"),
        ("cartpole swingup", "dm_control/cartpole-swingup-v0"),
        ("metaworld/drawer-open-v2", "Meta-World/drawer-open-v3"),
        ("meta-world/drawr-open-v3", "Meta-World/drawer-open-v3"),
        ("CarRacing-v2", "CarRacing-v3"),
        ("halfcheetah", "HalfCheetah-v5"),
    ],
)
def test_nearest_id(typed, meant):
    assert listing.nearest_ids(typed)[0] == meant


@pytest.mark.parametrize("typed", ["", "/", "-v", "-v3", "ω", "x" * 500])
def test_even_nonsense_has_three_nearest_ids(typed):
    nearest = listing.nearest_ids(typed)
    assert len(set(nearest)) == 3
    assert set(nearest) <= set(every_id())


def test_every_id_is_nearest_to_itself():
    assert all(listing.nearest_ids(env_id, n=1) == [env_id] for env_id in every_id()[::10])


def test_agents_are_described_without_being_run(tmp_path):
    (tmp_path / "zeta.py").write_text('"""Soft actor-critic.\n\nMore."""\nraise SystemExit("was run")\n')
    (tmp_path / "alpha.py").write_text("x = 1\n")
    (tmp_path / "__init__.py").write_text("")
    assert listing.agents(tmp_path) == {"alpha": "", "zeta": "Soft actor-critic."}


def test_agents_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="make setup"):
        listing.agents(tmp_path / "agents")


def test_suites(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'description = "Two tasks."\n[[tasks]]\nenv_id = "a"\n[[tasks]]\nenv_id = "b"\n'
    )
    assert listing.suites(tmp_path) == {"mine": "Two tasks. (2 tasks)"}


def test_list_filters_in_any_case(capsys):
    listing.list_("envs", filter="WALKER-")
    assert capsys.readouterr().out.split() == [
        *("Environments:", "dm_control"),
        *(f"dm_control/walker-{task}-v0" for task in ("run", "stand", "walk")),
        *("Environments:", "Gymnasium", "Box2D"),
        "BipedalWalker-v3",
    ]


def test_list_of_nothing_names_the_nearest():
    with pytest.raises(UserError, match="dm_control/walker-walk-v0"):
        listing.list_("envs", filter="walkr-wlk")


def test_markup_in_descriptions_is_shown_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(listing, "agents", lambda: {"odd[red]": "uses [bold] words"})
    listing.list_("agents")
    assert "odd[red]  uses [bold] words" in capsys.readouterr().out
