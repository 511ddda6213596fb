"""Published numbers are read strictly, row by row, and what is left out is said."""

from types import SimpleNamespace

import pytest

from semore_bench.collect import collect
from semore_bench.names import PUBLISHED
from semore_bench.published import read_published
from semore_bench.results import results
from semore_bench.tables import table as show_table
from tests.synthetic_runs import REACH, REACHER, WALKER, write_suite, write_sweep
from wrappers.errors import UserError

HEADER = "agent,task,seed,env_step,episode_return"


def read(tmp_path, text: str, *env_ids: str):
    (tmp_path / "p.csv").write_text(text)
    tasks = [SimpleNamespace(env_id=env_id, success=env_id.startswith("Meta")) for env_id in env_ids or (WALKER, REACH)]
    return read_published(tmp_path / "p.csv", tasks)


@pytest.mark.parametrize("agent", ["null", "NA", "None", "nan", "NaN", "-", "true", "1e5", "#N/A"])
def test_agents_keep_their_names(tmp_path, agent):
    table, notes = read(tmp_path, f"{HEADER}\n{agent},walker_walk,1,2000,400\n")
    assert table.agent.tolist() == [f"{agent} (as published)"]
    assert notes == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a,walker_walk,1,2000,-", 'line 3, column episode_return: expected a finite number, got "-"'),
        ("a,walker_walk,1,2000,95%", 'episode_return: expected a finite number, got "95%"'),
        ('a,walker_walk,1,2000,"1,000.5"', 'got "1,000.5"'),
        ("a,walker_walk,1,2000,500 ± 10", 'got "500 ± 10"'),
        ("a,walker_walk,1,2000,inf", 'got "inf"'),
        ("a,walker_walk,1,2000,nan", 'got "nan"'),
        ("a,walker_walk,1,2000,1e999", 'got "1e999"'),
        ("a,walker_walk,1,2000,٣", 'got "٣"'),
        ("a,walker_walk,1,2000,1_000", 'got "1_000"'),
        ("a,walker_walk,1,1k,400", 'line 3, column env_step: expected a whole number of at least 0, got "1k"'),
        ("a,walker_walk,1,inf,400", 'column env_step: expected a whole number of at least 0, got "inf"'),
        ("a,walker_walk,1,-1,400", 'got "-1"'),
        ("a,walker_walk,1,,400", 'column env_step: expected a whole number of at least 0, got ""'),
        ("a,walker_walk,1.2,2000,400", 'column seed: expected a whole number of at least 0, got "1.2"'),
        ("a,walker_walk,99999999999999999999,2000,400", "column seed"),
        (",walker_walk,1,2000,400", "line 3, column agent: expected a text"),
        ("\x1b[31ma,walker_walk,1,2000,400", "line 3, column agent: expected a text"),
        ("a,walker_walk,1,2000,400,5", "line 3: 6 fields, but the header has 5"),
        ("a,walker_walk,1,2000", "line 3: 4 fields, but the header has 5"),
        ('a,walker_walk,1,2000,"400', "line 3: unexpected end of data"),
        ("b,walker-walk,1,2000,400", "lines 2 and 3 both have b on dm_control/walker-walk-v0, seed 1, env step 2000"),
    ],
)
def test_a_wrong_cell_is_named_by_line_and_column(tmp_path, row, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, f"{HEADER}\nb,walker_walk,1,2000,1\n{row}\n")
    assert words in str(caught.value)
    assert "p.csv" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column agent, task, seed, env_step"),
        ("agent,agent,task,seed,env_step,episode_return\n", "column agent more than once"),
        ("agent,task,seed,env_step\na,walker_walk,1,5\n", "no numbers in a column episode_return or success_any"),
        (f"{HEADER}\n", "no numbers"),
    ],
)
def test_a_file_without_the_columns_is_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, text)


def test_whole_numbers_may_be_written_as_others_write_them(tmp_path):
    table, _ = read(tmp_path, f"\ufeff{HEADER}\r\n\r\na, walker_walk ,1.0,1e5,4\r\n")
    assert table[["seed", "env_step", "episode_return"]].values.tolist() == [[1, 100_000, 4.0]]


def test_versions_and_namespaces_are_not_mixed_up(tmp_path):
    cheetahs = "HalfCheetah-v4", "HalfCheetah-v5"
    table, notes = read(tmp_path, f"{HEADER}\na,HalfCheetah-v4,1,9,4\na,HalfCheetah-v5,1,9,5\n", *cheetahs)
    assert dict(zip(table.task, table.episode_return, strict=True)) == {"HalfCheetah-v4": 4, "HalfCheetah-v5": 5}
    table, notes = read(tmp_path, f"{HEADER}\na,HalfCheetah-v4,1,9,4\na,half_cheetah-v5,1,9,5\n", "HalfCheetah-v5")
    assert len(table) == 0
    assert "left out tasks that are not compared here: HalfCheetah-v4, half_cheetah-v5" in notes[0]
    with pytest.raises(UserError, match="task halfcheetah may be HalfCheetah-v4 or HalfCheetah-v5; write which it is"):
        read(tmp_path, f"{HEADER}\na,halfcheetah,1,9,4\n", *cheetahs)
    table, _ = read(tmp_path, f"{HEADER}\na,b/Thing-v0,1,9,4\n", "a/Thing-v0", "b/Thing-v0")
    assert table.task.tolist() == ["b/Thing-v0"]


def test_rows_without_their_tasks_score_are_left_out_and_said(tmp_path):
    """Meta-World's score is the success rate, dm_control's the return."""
    text = "agent,task,seed,env_step,episode_return,success_any\n"
    text += "a,reach,1,9,400,\na,reach,2,9,,0.5\na,walker_walk,1,9,,1\na,walker_walk,2,9,7,\n"
    table, notes = read(tmp_path, text)
    assert table.seed.tolist() == [2, 2]
    assert "left out 1 row without success_any, which is the score there, the first in line 2" in notes[0]
    assert "left out 1 row without episode_return, which is the score there, the first in line 4" in notes[1]
    table, notes = read(tmp_path, "agent,task,seed,env_step,success_any\na,reach,1,9,0.5\n")
    assert table.success_any.tolist() == [0.5]
    assert notes == []
    with pytest.raises(UserError, match="success_any: expected a number from 0 to 1, got"):
        read(tmp_path, "agent,task,seed,env_step,success_any\na,reach,1,9,95\n")


def test_the_size_of_frames_stands_in_the_name(tmp_path):
    text = f"{HEADER},image_size\ncurl,walker_walk,1,9,4,84\ncurl,walker_walk,1,9,5,64\ncurl,walker_walk,1,9,6,\n"
    table, _ = read(tmp_path, text)
    ends = {"curl, 84 px (as published)": 4, "curl, 64 px (as published)": 5, "curl (as published)": 6}
    assert dict(zip(table.agent, table.episode_return, strict=True)) == ends
    with pytest.raises(UserError, match="column image_size: expected a whole number of at least 1"):
        read(tmp_path, f"{HEADER},image_size\ncurl,walker_walk,1,9,4,84x84\n")


def test_published_numbers_are_kept_until_the_end_of_the_budget(tmp_path):
    """A folder of results has them, whoever adds to it; what is newer replaces it."""
    suite = write_suite(tmp_path / "tiny.toml", WALKER, REACHER)
    write_sweep(tmp_path / "tiny", seeds=(1,))
    file = tmp_path / "p.csv"
    file.write_text(f"{HEADER}\nsac,walker_walk,1,1900,300\nsac,walker_walk,1,2900,390\nsac,walker_walk,1,3900,400\n")
    kept = tmp_path / "kept"
    results("build", (tmp_path / "tiny",), suite, published=file, output=kept)
    assert "| sac (as published) | 300.0" in (kept / "table.md").read_text()
    steps = [line.split(",")[3] for line in (kept / "evaluations.csv").read_text().splitlines() if "published" in line]
    assert steps == ["1900", "2900"], "the first beyond the budget says that the run got so far"
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    results("rebuild", (kept,))
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    write_sweep(tmp_path / "more", seeds=(2,))
    file.write_text(f"{HEADER}\nsac,walker_walk,1,1900,310\n")
    for published, scores in ((None, [300.0, 390.0]), (file, [310.0, 390.0])):
        found = collect([tmp_path / "more", kept], suite, published)
        assert found.evaluations[found.evaluations.agent == "sac" + PUBLISHED].episode_return.tolist() == scores
    with pytest.raises(UserError, match="rebuild takes one folder"):
        results("rebuild", (kept,), published=file)


def test_published_numbers_are_shown_without_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text(f"{HEADER}\nsac,walker-stand,1,20000,300\n")
    show_table(suite="dmc-lite", published=tmp_path / "p.csv")
    assert "| sac (as published) | 300.0" in capsys.readouterr().out
    with pytest.raises(UserError, match="runs does not exist"):
        show_table(published=tmp_path / "p.csv")
