"""Bad suites, agents, numbers, names, paths and flags: one line and status 2, or a note; never a traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from semore_bench import cli, listing
from tests.faults.odd_files import ODD_FILES, PLACE, RUNS, spoil
from tests.synthetic_runs import REACH, WALKER, write_run, write_suite

SUITE = """name = "mine"
[settings]
eval_every = 1000
[[tasks]]
env_id = "dm_control/walker-walk-v0"
total_env_steps = 2000
"""


ODD_PUBLISHED = [
    *(content for name, content in ODD_FILES.items()),
    "agent,task,seed,env_step,episode_return\n",
    *(
        f"agent,task,seed,env_step,episode_return\n{row}\n"
        for row in ("a,b", "a,walker_walk,1,2000", "a" * 300 + ",walker_walk,1,1,1")
    ),
    *(
        f"agent,task,seed,env_step,episode_return\na,walker_walk,{row}\n"
        for row in (
            "1.2,2000,5",
            "x,2000,5",
            "1,1k,5",
            "1,inf,5",
            "1,2000,95%",
            "1,2000,500 ± 10",
            '1,2000,"1,000.5"',
            "1,2000,-",
        )
    ),
]


@pytest.mark.parametrize("content", ODD_PUBLISHED, ids=range(len(ODD_PUBLISHED)))
def test_odd_published_numbers_are_refused(runs, answer, content):
    Path("p.csv").touch()
    spoil(Path("p.csv"), content)
    assert "--published p.csv" in answer("table", runs, "--published", "p.csv", status=2)


ODD_SUITES = [
    *(content for name, content in ODD_FILES.items()),
    *(
        SUITE.replace('"mine"', name)
        for name in ('""', "1", '"../x"', '"."', '"a b"', f'"{"x" * 300}"', "[]", "'\\u0000'")
    ),
    *(
        SUITE.replace('"dm_control/walker-walk-v0"', env_id)
        for env_id in ('""', "1", "[]", '"\\u001b[31m"', f'"{"x" * 999}"')
    ),
    *(SUITE.replace("2000", steps) for steps in ("0", "-1", "1.5", '"1k"', "inf", "nan", "9" * 40, "[]", "true")),
    *(
        SUITE + f"bounds = {bounds}\n"
        for bounds in ("[]", "[1]", "[1, 1]", "[2, 1]", "[0, inf]", "[nan, 1]", "1", '["a", "b"]', "[0, 1e300]")
    ),
    *(
        f"{SUITE}{line}\n"
        for line in ("agents = 1", "agents = {drq_sac = 1}", "[[tasks]]", "[agents]\ndrq_sac = 1", "name = 2")
    ),
    SUITE.replace("[settings]", "[agents.x]\nagent = 1\n[settings]"),
    SUITE.replace("[settings]", "settings = 1\n[other]"),
    SUITE.replace("[[tasks]]", "[tasks]"),
    SUITE.split("[[tasks]]")[0],
    SUITE.split("[[tasks]]")[0] + "tasks = []",
    SUITE * 2,
]


@pytest.mark.parametrize("content", ODD_SUITES, ids=range(len(ODD_SUITES)))
def test_odd_suites_are_refused(runs, answer, content):
    Path("mine.toml").touch()
    spoil(Path("mine.toml"), content)
    assert "mine.toml" in answer("sweep", "mine.toml", "--agents", "drq_sac", "--dry-run", status=2)


@pytest.mark.parametrize(
    "line",
    [
        *(
            'batch_size = "8"',
            "batch_size = 1.5",
            "batch_size = 0",
            "batch_size = -1",
            "batch_size = []",
            "nothing = 1",
        ),
        *(
            "image_size = 0",
            "action_repeat = 0",
            "num_envs = 0",
            'preset = "x"',
            "seed = 1",
            'run_dir = "x"',
            "fresh = true",
        ),
        *('annotator = "nobody"', "replay_capacity = 0", "env_id = 1", "eval_every = 0", f"batch_size = {'9' * 30}"),
    ],
)
def test_odd_flags_in_a_suite_are_refused(runs, answer, line):
    Path("mine.toml").write_text(SUITE.replace("[settings]", f"[settings]\n{line}"))
    assert "mine.toml" in answer("sweep", "mine.toml", "--agents", "drq_sac", "--dry-run", status=2)


def test_a_byte_order_mark_is_no_part_of_a_file(runs, answer):
    Path("mine.toml").write_text("\ufeff" + SUITE, "utf-8")
    assert "2 new" in answer("sweep", "mine.toml", "--agents", "drq_sac", "--seeds", 2, "--dry-run", status=0)
    for name in ("config.json", "status.json", "eval.csv"):
        file = runs / RUNS / name
        file.write_text("\ufeff" + file.read_text(), "utf-8")
    assert "| drq_sac | " in answer("table", runs, status=0)


AGENT = "from dataclasses import dataclass\nfrom semore_bench.args import CommonArgs\n"
ODD_AGENTS = [
    *("", "x = ", "\0", "import nothing_of_that_name", "1 / 0", "Args = 1", "raise SystemExit", "def f(): f()\nf()"),
    *("import sys\nsys.exit()", "import sys\nsys.exit('no')", "exit(0)", "assert False", "class Args: pass"),
    AGENT + "@dataclass\nclass Args(CommonArgs):\n    x: Nothing = 1\n",
    AGENT + "@dataclass\nclass Args(CommonArgs):\n    def __post_init__(self): raise RuntimeError('no')\n",
    b"\xff\xfe",
]


@pytest.mark.parametrize("content", ODD_AGENTS, ids=range(len(ODD_AGENTS)))
def test_odd_agents_are_refused(runs, answer, content):
    Path("own.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "own.py" in answer("sweep", "smoke", "--agents", "own.py", "--dry-run", status=2)


ODD_NAMES = ["a$x_$b", "_mine", "[ours]", "*ours", "NA", "null", "__proto__", "a\x1b[31m", "a\nb", "<b>", "a" * 200]
ODD_NAMES += ["x (as published)", "-h", "a b", "{{DATA}}", "%s\\", "#&~^", "ü±", "a\u202eb", os.fsdecode(b"a\xff")]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_agents_are_shown_everywhere(runs, answer, name):
    (runs / RUNS).parent.rename(runs / PLACE / name)
    said = answer("table", runs, "--output", "out", status=0)
    said += answer("report", runs, "--output", "page.html", status=0)
    assert "| semore_sac | " in said
    for line in (Path("out") / "table.tex").read_text().splitlines():
        assert not line.startswith(("[", "*")), "LaTeX takes it for the argument of the row before"


def test_odd_names_of_agents_are_drawn(runs, answer):
    for seed, name in enumerate(ODD_NAMES):  # some of which look the same
        write_run(runs, WALKER, "own", seed, {2000: [1.0]})
        (runs / PLACE / "own").rename(runs / PLACE / name)
    said = answer("results", "build", runs, "--output", "kept", status=0)
    kept = json.loads((Path("kept") / "provenance.json").read_text())["runs"]
    assert len(kept) == 1 + len(ODD_NAMES), said  # all but the one that would be taken for others' numbers
    answer("results", "rebuild", "kept", status=0)


LONG, READ_ONLY, A_FILE = "x" * 300, "/sys/nothing", "file/nothing"


@pytest.mark.parametrize("folder", [LONG, READ_ONLY, A_FILE, os.fsdecode(b"\xff"), "/proc/nothing", "/dev/null"])
@pytest.mark.parametrize(
    "words",
    [
        ("table", "{}"),
        ("table", "runs", "--output", "{}"),
        ("table", "runs", "--suite", "{}"),
        ("table", "runs", "--suite", "{}.toml"),
        ("table", "runs", "--published", "{}"),
        ("plot", "{}"),
        ("plot", "runs", "--output", "{}"),
        ("plot", "runs", "--output", "{}/x.svg"),
        ("plot", "runs", "--kind", "profiles", "--output", "{}/x.svg"),
        ("report", "{}"),
        ("report", "runs", "--output", "{}"),
        ("report", "runs", "--output", "{}/x.html"),
        ("results", "build", "{}"),
        ("results", "build", "runs", "--output", "{}"),
        ("results", "rebuild", "{}"),
        ("sweep", "{}", "--agents", "drq_sac"),
        ("sweep", "{}.toml", "--agents", "drq_sac"),
        ("sweep", "smoke", "--agents", "{}"),
        ("sweep", "smoke", "--agents", "{}.py"),
        ("sweep", "mine.toml", "--agents", "drq_sac", "--runs-dir", "{}/x"),
        ("view", "--env-id", "{}"),
        ("view", "--env-id", "CartPole-v1", "--steps", "2", "--flow", "none", "--output", "{}"),
        ("view", "--env-id", "CartPole-v1", "--steps", "2", "--flow", "none", "--output", "{}/x.mp4"),
        ("view", "--env-id", "CartPole-v1", "--steps", "2", "--flow", "none", "--output", "{}/x.png"),
        ("evaluate", "{}"),
        ("evaluate", "runs", "--agent", "{}"),
        ("list", "agents", "--filter", "{}"),
    ],
)
def test_odd_paths_and_words(runs, answer, words, folder):
    Path("file").touch()
    Path("mine.toml").write_text(SUITE)
    if folder == os.fsdecode(b"\xff") and words[-1] == "{}" and words[-2:-1] == ("--output",):
        pytest.skip("that is a name like any other")
    if folder.startswith(os.fsdecode(b"\xff")) and "{}/" in words[-1]:
        answer(*(word.format(folder) for word in words), status=(0, 2) if words[0] != "sweep" else (0, 1, 2))
    else:
        answer(*(word.format(folder) for word in words), status=2)


@pytest.mark.parametrize(
    "words",
    [
        *(("view", "--env-id", "CartPole-v1", flag, value) for flag, values in {
            "--steps": ("0", "-1", "x"),
            "--fps": ("0", "-1", "nan", "inf", "x"),
            "--seed": ("-1", "x", "1.5"),
            "--image-size": ("0", "-1", "x"),
            "--action-repeat": ("0", "-1"),
            "--annotate-every": ("0", "-1"),
            "--flow": ("x", ""),
            "--annotator": ("x", "", "openai:"),
            "--output": ("x", "x.gif", "", "."),
        }.items() for value in values),
        *(("sweep", "smoke", "--agents", "drq_sac", flag, value) for flag, values in {
            "--seeds": ("0", "-1", "x", "1.5"),
            "--workers": ("0", "-1"),
            "--tasks": ("nothing",),
            "--executor": ("x",),
        }.items() for value in values),
        *(("table", "runs", flag, value) for flag, values in {
            "--at": ("-1", "x", "1.5", "999999"),
            "--setting": ("hard", "", "\x1b[31m"),
            "--baseline": ("nobody", "", "\x1b[31m"),
        }.items() for value in values),
        *(("plot", "runs", flag, value) for flag, values in {
            "--metric": ("x", "success_any"),
            "--kind": ("x",),
            "--setting": ("hard", ""),
            "--aggregate": ("x",),
            "--output": ("x", "x.gif", "."),
            "--x": ("x", "time"),
        }.items() for value in values),
        *(("evaluate", "runs", flag, value) for flag, values in {
            "--distraction": ("x", "background-", "background-2", "\x1b[31m"),
            "--episodes": ("0", "-1", "x"),
            "--seed": ("-1", "x", "99999999999"),
            "--agent": ("x.py", "file"),
        }.items() for value in values),
        ("evaluate",),
        ("evaluate", "runs"),
        *(("report", "runs", flag, value) for flag, values in {
            "--output": ("x", "x.pdf", "."),
            "--baseline": ("nobody",),
            "--video-megabytes": ("x", "nan", "-1", "inf"),
            "--all-videos-megabytes": ("nan", "-1"),
        }.items() for value in values),
        *(("train-guidance", flag, value) for flag, values in {
            "--domains": ("x",),
            "--frames": ("0", "-1"),
            "--updates": ("0",),
            "--workers": ("0",),
            "--batch-size": ("0",),
            "--seed": ("-1",),
            "--leave-out": ("x",),
            "--output": (A_FILE, READ_ONLY),
            "--cache": (A_FILE, READ_ONLY),
        }.items() for value in values),
        *(("results", *words) for words in (("build",), ("rebuild",), ("rebuild", "runs"), ("x", "runs"))),
        ("results", "rebuild", "a", "b"),
        *((command, "--nothing") for command in cli.COMMANDS),
        *(("list", word) for word in ("x", "")),
        *((word,) for word in ("", "x", "\x1b[31m", "tabel", os.fsdecode(b"\xff"))),
    ],
    ids=lambda words: " ".join(words).encode("unicode_escape").decode(),
)  # fmt: skip
def test_odd_flags(runs, answer, words):
    Path("file").touch()
    answer(*words, status=2)


def test_a_damaged_run_does_not_stop_a_sweep(tmp_path, answer, monkeypatch):
    """Its state is unknown, so the agent itself is asked; the plan of the others is as always."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(SUITE)
    for name, content in ODD_FILES.items():
        if name == "surrogate":
            continue  # that is a run of another agent, which is refused
        for file in ("config.json", "status.json"):
            run = write_run(Path("runs/mine"), WALKER, "drq_sac", 1, {2000: [1.0]})
            if file == "status.json":
                (run / "config.json").unlink()  # that of the tests has other settings
            spoil(run / file, content)
            said = answer("sweep", "mine.toml", "--agents", "drq_sac", "--seeds", 2, "--dry-run", status=0)
            assert " new" in said, (name, file)
            shutil.rmtree("runs")


def test_two_tasks_never_share_a_folder(runs, answer):
    tasks = '[[tasks]]\nenv_id = "a/b-v0"\ntotal_env_steps = 9\n[[tasks]]\nenv_id = "a_b-v0"\ntotal_env_steps = 9\n'
    Path("mine.toml").write_text('name = "mine"\n' + tasks)
    said = answer("sweep", "mine.toml", "--agents", "drq_sac", "--dry-run", status=2)
    assert "a/b-v0 and a_b-v0 share the folder a_b-v0" in said


def test_lists_of_agents_and_suites_survive_a_broken_one(tmp_path, answer, monkeypatch):
    for folder in ("agents", "suites"):
        (tmp_path / folder).mkdir()
    (tmp_path / "agents" / "broken.py").write_text("x = ")
    (tmp_path / "agents" / "dangling.py").symlink_to("nowhere")
    (tmp_path / "agents" / "good.py").write_text('"""Good one."""')
    (tmp_path / "suites" / "broken.toml").write_text("x = ")
    (tmp_path / "suites" / "odd.toml").write_text("tasks = 1")
    agents, suites = listing.agents, listing.suites
    monkeypatch.setattr(listing, "agents", lambda: agents(tmp_path / "agents"))
    monkeypatch.setattr(listing, "suites", lambda: suites(tmp_path / "suites"))
    said = answer("list", "agents", status=0) + answer("list", "suites", status=0)
    assert said.count("(cannot be used: ") == 4
    assert "Good one." in said


def test_success_rates_alone_are_enough_for_meta_world(runs, answer):
    write_run(Path("mw"), REACH, "drq_sac", 1, {2000: [5.0]}, success={2000: [1]})
    suite = write_suite(Path("mw.toml"), REACH)
    Path("p.csv").write_text("agent,task,seed,env_step,success_any\nNA,reach,1,2000,0.25\n")
    assert "| NA (as published) | 0.250 |" in answer("table", "mw", "--suite", suite, "--published", "p.csv", status=0)


# ---- from outside ----


def outside(*words: str, **environment: str) -> subprocess.CompletedProcess:
    script = "from semore_bench.cli import main; main()"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    return subprocess.run([sys.executable, "-c", script, *words], env=variables | environment, capture_output=True)


def test_a_table_is_written_and_shown_on_a_terminal_that_knows_ascii_alone(runs, faults):
    (runs / RUNS).parent.rename(runs / PLACE / os.fsdecode(b"\xff\xc3\xbc"))
    with faults.made():
        ended = outside("table", str(runs), "--output", "out", PYTHONIOENCODING="ascii", LC_ALL="C")
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert b"mean +- std" in ended.stdout
        assert "mean ± std" in (Path("out") / "table.md").read_text("utf-8")


def test_files_are_written_before_anything_is_shown(runs, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        cli.run(["table", str(runs), "--output", "out"])
    assert sorted(path.name for path in Path("out").iterdir()) == ["table.csv", "table.md", "table.tex"]


@pytest.mark.parametrize("words", [("table", "nowhere"), ("sweep", "smok", "--agents", "x"), ("table", "\udcff")])
def test_mistakes_are_one_line_from_outside_too(runs, faults, words):
    with faults.made():
        ended = outside(*words)
        assert ended.returncode == 2
        assert len(ended.stderr.splitlines()) == 1
        assert ended.stderr.startswith(b"semore-bench: ")
        assert b"?;" not in ended.stderr
