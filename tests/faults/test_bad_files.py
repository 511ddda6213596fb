"""Damaged files in run directories and results are a note on their run, or one line; the others are as always."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semore_bench import cli, estimates
from semore_bench.reading import Count, Finite, Unreadable, read_csv, read_json, read_toml
from tests.faults.odd_files import ODD_FILES, PLACE, RUNS, spoil
from tests.synthetic_runs import WALKER, write_run

OUTPUT = {"table": [], "report": ["--output", "page.html"], "plot": ["--output", "curves.svg"]}


@pytest.mark.parametrize("name", ["config.json", "status.json", "eval.csv"])
@pytest.mark.parametrize("content", ODD_FILES)
def test_an_odd_file_is_a_note_on_its_run(runs, answer, faults, name, content):
    spoil(runs / RUNS / name, ODD_FILES[content])
    for command in OUTPUT if faults.long else ["table"]:
        said = answer(command, runs, *OUTPUT[command], status=0)
        shown = said + "".join(path.read_text() for path in map(Path, OUTPUT[command][1:]))
        assert "semore_sac" in shown, "the other run is there as always"
        if command == "table" and name != "eval.csv" and content not in ("surrogate", "NaN", "a folder"):
            assert f"{name} is damaged" in said or content == "a link to nowhere"  # which is no file


@pytest.mark.parametrize("command", ["report", "plot"])
@pytest.mark.parametrize("name", ["config.json", "status.json", "eval.csv"])
def test_many_odd_files_are_notes_on_their_runs(runs, answer, faults, command, name):
    for seed, content in enumerate(ODD_FILES.values(), 2):
        spoil(write_run(runs, WALKER, "drq_sac", seed, {2000: [10.0]}) / name, content)
    with faults.made(len(ODD_FILES) - 1):
        said = answer(command, runs, *OUTPUT[command], status=0)
    assert "semore_sac" in said + Path(OUTPUT[command][1]).read_text(), "the other run is there as always"


def change(file: Path, *keys: str, value: object) -> None:
    """Sets a value in a JSON file, or takes it out where it is `...`."""
    content = inner = json.loads(file.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    file.write_text(json.dumps(content))


ODD_CONFIGS = [
    *(("env_id", value) for value in (..., None, 1, [], {}, "", " ", "\x1b[31mx", "\ud800", "x" * 9999, "..", "a\nb")),
    *(("agent", value) for value in (..., None, 1, [], {})),
    *(("seed", value) for value in (..., None, -1, 1.5, "1", True, 1e30, 10**30, [])),
    *(("args", value) for value in (1, [], "x", {"eval_every": 0}, {"total_env_steps": 0}, {"total_env_steps": "1k"})),
    *(("args", {name: value}) for name in ("eval_every", "total_env_steps") for value in (1.5, -5, None, [], 10**40)),
    *(("args", {name: 1}) for name in ("\x1b[31m", "\ud800", "", "__proto__", "a|b")),
    *(("guidance", value) for value in (1, [], "\x1b]0;x\x07", "\ud800")),
    *((name, value) for name in ("versions", "hardware", "commit") for value in (1, [], [[]])),
]
ODD_STATES = [
    *(("state", value) for value in (..., None, 1, [], "", "\x1b[31m", "\ud800", "x" * 9999)),
    *(("error", value) for value in (1, [], {}, "a\nb\x1b[31m\n", "\ud800", "", "\n")),
    *((name, value) for name in ("env_step", "wall_seconds") for value in (-1, "1", [], True, 1e400, 10**30, "x")),
]


@pytest.mark.parametrize(("key", "value"), ODD_CONFIGS)
def test_an_odd_setting_is_a_note_on_its_run(runs, answer, faults, key, value):
    change(runs / RUNS / "config.json", key, value=value)
    assert "semore_sac" in answer("table", runs, status=0)
    if faults.long:
        answer("report", runs, status=0)
        assert "semore_sac" in Path("report.html").read_text()


def test_many_odd_settings_are_notes_on_their_runs(runs, answer, faults):
    for seed, (key, value) in enumerate(ODD_CONFIGS, 2):
        change(write_run(runs, WALKER, "drq_sac", seed, {2000: [10.0]}) / "config.json", key, value=value)
    with faults.made(len(ODD_CONFIGS) - 1):
        answer("report", runs, status=0)
    assert "semore_sac" in Path("report.html").read_text()


@pytest.mark.parametrize(("key", "value"), ODD_STATES)
def test_an_odd_state_is_a_note_on_its_run(runs, answer, key, value):
    change(runs / RUNS / "status.json", key, value=value)
    assert "drq_sac" in answer("table", runs, status=0), "its evaluations count all the same"


HEADER = "env_step,agent_step,episode,eval_episode,episode_return,episode_length,success_any,success_last\n"
ODD_ROWS = [
    *(
        f"2000,500,7,0,{value},1000,,"
        for value in ("inf", "-inf", "nan", "1e999", "x", "", "1,5", '"1', "\x1b[31m", "0x1")
    ),
    *(f"{value},500,7,0,5.0,1000,," for value in ("inf", "nan", "-1", "1.5", "x", "", "1k", "1e30", "9" * 30)),
    *(f"2000,500,7,0,5.0,1000,{value},{value}" for value in ("2", "-1", "True", "x", "nan")),
    *("2000", "2000,500,7,0,5.0,1000,,,,,", ",,,,,,,", "\0" * 20, "a" * 200_000, '"' * 3),
]


@pytest.mark.parametrize("row", ODD_ROWS)
def test_an_odd_row_is_a_note_that_says_where(runs, answer, row):
    (runs / RUNS / "eval.csv").write_text(f"{HEADER}1000,250,3,0,5.0,1000,,\n{row}\n")
    said = answer("table", runs, status=0)
    assert "eval.csv is damaged: line 3" in said
    assert "| semore_sac | " in said


@pytest.mark.parametrize(
    "header", ["", "\n", "x,y\n", "env_step\n", HEADER.replace("env_step", "env step"), HEADER * 2]
)
def test_an_odd_header_is_a_note(runs, answer, header):
    (runs / RUNS / "eval.csv").write_text(f"{header}2000,500,7,0,5.0,1000,,\n")
    assert "| semore_sac | " in answer("table", runs, status=0)


@pytest.mark.parametrize("content", ODD_FILES)
@pytest.mark.parametrize("name", ["provenance.json", "evaluations.csv"])
def test_damaged_results_are_refused(runs, answer, kept, name, content):
    spoil(kept / name, ODD_FILES[content])
    assert f"holds no complete results: {name}: " in answer("results", "rebuild", kept, status=2)


@pytest.fixture
def kept(tmp_path, built) -> Path:
    return Path(shutil.copytree(built, tmp_path / "kept"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder of results."""
    root = tmp_path_factory.mktemp("built")
    write_run(root / "runs", WALKER, "drq_sac", 1, {2000: [10.0]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "REPETITIONS", 20)
        assert not cli.run(["results", "build", str(root / "runs"), "--output", str(root / "kept")])
    return root / "kept"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        *((("tasks",), value) for value in (..., 1, {}, [1], [{}], [{"env_id": "x"}])),
        *((("tasks", 0, "bounds"), value) for value in ([1], [1, 1], ["a", "b"], 1)),
        *((("tasks", 0, "total_env_steps"), value) for value in (0, "1", None, 1.5)),
        *((("runs",), value) for value in (..., 1, {}, [1], [{}])),
        *((("runs", 0, name), ...) for name in ("agent", "task", "seed", "state", "settings", "total_env_steps")),
        *((("runs", 0, "environment"), value) for value in (7, -1, "x")),
        *((("runs", 0, "task"), value) for value in ("elsewhere", 1)),
        *(((name,), 1) for name in ("suite", "environments", "settings", "notes", "baseline", "usual")),
        (("settings", "drq_sac"), 1),
        (("notes",), [1]),
        (("baseline",), "nobody"),
    ],
)
def test_damaged_fields_of_results_are_named(runs, answer, kept, keys, value):
    change(kept / "provenance.json", *keys, value=value)
    assert str(keys[0]) in answer("results", "rebuild", kept, status=2)
    answer("table", kept, runs, status=(0, 2))


@pytest.mark.parametrize(
    "row", ["drq_sac,x,1,2000,1,10.0,,", "a,dm_control/walker-walk-v0,1,2000,1,10.0,,", "NA,,,,,,,"]
)
def test_odd_rows_of_results(runs, answer, kept, row):
    file = kept / "evaluations.csv"
    file.write_text(file.read_text() + row + "\n" + row + "\n")
    assert "evaluations.csv: line" in answer("results", "rebuild", kept, status=2)


def test_links_are_followed_and_what_counts_once_is_said(runs, answer):
    elsewhere = Path("elsewhere").absolute()
    write_run(elsewhere, WALKER, "linked", 1, {2000: [30.0]})
    (runs / PLACE / "linked").symlink_to(elsewhere / PLACE / "linked")
    (runs / PLACE / "semore_sac" / "seed-2").symlink_to(elsewhere / PLACE / "linked" / "seed-1")
    (runs / "loop").symlink_to(runs.absolute())
    said = answer("table", runs, status=0)
    assert "| linked | " in said
    assert "seed-2 is the same folder as" in said
    assert "loop is the same folder as" in said
    said = answer("plot", runs, "--output", "a.svg", status=0)
    assert "drew 3 of 3 runs" in said
    assert "counts once" in said


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_video_that_is_a_link_is_not_embedded(runs, answer, linked):
    secret = Path("secret").absolute()
    secret.mkdir()
    (secret / "x.mp4").write_text("something private")
    if linked == "file":
        (runs / RUNS / "videos").mkdir()
        (runs / RUNS / "videos" / "x.mp4").symlink_to(secret / "x.mp4")
    else:
        (runs / RUNS / "videos").symlink_to(secret)
    assert "0 videos embedded" in answer("report", runs, status=0)
    assert "videos/x.mp4 is a link and was left out" in Path("report.html").read_text()


# ---- any text at all ----

SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
bits_of_files = st.lists(
    st.sampled_from(
        ["{", "}", "[", "]", '"', ",", ":", "=", "\n", "\0", "\ufeff", "1", "1e999", "NaN", "env_step", "x", "±"]
    )
    | st.text(max_size=3)
).map("".join)


@SETTINGS
@given(content=st.binary() | bits_of_files.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_content_is_read_or_refused_in_one_line(content, tmp_path, faults):
    file = tmp_path / "file"
    file.write_bytes(content)
    for read in (
        lambda: read_json(file, {"env_step": Count}),
        lambda: read_toml(file),
        lambda: read_csv(file, {"env_step": Count, "x": Finite | None, "agent": str | None}),
        lambda: read_csv(file, {"env_step": Count}, growing=True),
    ):
        with faults.made():
            said = "read"
            try:
                read()
            except Unreadable as error:
                said = str(error)
            assert len(said.splitlines()) == 1
            said.encode()
