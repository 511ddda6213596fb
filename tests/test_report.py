"""The report page: one file, whose text is never executed, and which works in a real browser."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from semore_bench import estimates
from semore_bench.looks import COLOURS
from semore_bench.report import report
from semore_bench.videos import VideoWriter
from tests import synthetic_runs
from tests.browser import CHROMIUM, Browser, browser
from tests.synthetic_runs import (
    REACHER,
    WALKER,
    write_distracted_sweep,
    write_run,
    write_suite,
    write_sweep,
    write_timed_sweep,
)
from wrappers.errors import UserError

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>{{DATA}}&lt;b&gt;"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of two agents on two tasks with three seeds, a failed one, names that want to be code, and videos."""
    root = tmp_path_factory.mktemp("report")
    runs = write_sweep(root / "runs" / "tiny")
    run = write_run(runs, WALKER, "semore_sac", 4, {0: [1.0]}, state="failed", error=f"ValueError: {HOSTILE}")
    config = json.loads((run / "config.json").read_text())
    config["guidance"] = HOSTILE
    config["args"]["caption"] = HOSTILE
    config["hardware"]["processor"] = HOSTILE
    config["commit"] = '"><svg onload=alert(3)>'
    (run / "config.json").write_text(json.dumps(config))
    evil = runs / "walker" / "a<b onclick=alert(4)>'\"&{{SCRIPT}}" / "seed-1"
    write_run(root / "spare", WALKER, "x", 1, {1000: [500.0], 2000: [999.0]}).rename(_made(evil))
    for seed, name in ((1, "env-step-2000.mp4"), (2, "env-step-2000'><script>alert(5)<script>.mp4")):
        video = runs / WALKER.replace("/", "_") / "drq_sac" / f"seed-{seed}" / "videos" / name.replace("/", "")
        with VideoWriter(_made(video), fps=15) as writer:
            for level in range(8):
                writer.add(np.full((32, 32, 3), 20 * level, np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "REPETITIONS", 100)
        suite = write_suite(root / "tiny.toml", WALKER, REACHER)
        report((root / "runs",), suite, "drq_sac", output=root / "page" / "report.html")
    return root / "page" / "report.html"


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture
def opened(chromium, page) -> Browser:
    """The page, freshly opened on a desktop."""
    chromium.console.clear()
    chromium.requests.clear()
    chromium.open(page)
    return chromium


def content(page: Path) -> dict:
    """The page's data, and what it shows of the first setting."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text()).group(1)
    found = json.loads(text)
    return found | found["settings"][0]


# ---- the file ----


def test_the_data_holds_every_run_and_the_tables_numbers(page):
    found = content(page)
    assert len(found["runs"]) == 14
    (best,) = [row for row in found["rows"] if row["task"] == REACHER and row["agent"] == "semore_sac"]
    assert (best["iqm"], best["mean"], best["scored"]) == (420, 420, 3)
    curve = found["curves"][WALKER]["drq_sac"]
    assert curve["steps"] == [0, 1000, 2000]
    assert curve["iqm"] == [11, 60, 120]
    assert [seed["values"] for seed in curve["seeds"]] == [[11, 55, 110], [11, 60, 120], [11, 65, 130]]
    failed = found["curves"][WALKER]["semore_sac"]  # seed 4 was evaluated at 0 alone
    assert failed["counts"] == [4, 3, 3]
    assert failed["iqm"] == [11, 160, 320]
    whole = found["curves"]["all tasks"]["semore_sac"]
    assert whole["iqm"][-1] == pytest.approx(next(r["iqm"] for r in found["rows"] if r["agent"] == "semore_sac"))


def test_nothing_in_the_file_but_its_own_script_is_code(page):
    tags = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

    Parser().feed(page.read_text())
    assert [attributes.get("type") for tag, attributes in tags if tag == "script"] == ["application/json", None]
    assert not {tag for tag, _ in tags} & {"img", "iframe", "link", "object", "embed", "b"}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert not [attributes for _, attributes in tags if "src" in attributes or "href" in attributes]
    (policy,) = [a["content"] for tag, a in tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert content(page)["runs"][0]["settings"] is not None


def test_videos_are_embedded_while_they_are_small_and_linked_otherwise(page, tmp_path):
    sources = [run["video"] for run in content(page)["runs"] if run["video"]]
    assert [video["source"][:22] for video in sources] == ["data:video/mp4;base64,"] * 2
    assert all("link" not in video for video in sources)
    run = write_run(tmp_path / "runs", WALKER, "drq_sac", 1, {2000: [5.0]})
    for name in ("env-step-1.mp4", "env-step-2.mp4"):
        _made(run / "videos" / name).write_bytes(b"x" * 2000)
    report((tmp_path / "runs",), output=tmp_path / "a" / "report.html", video_megabytes=0.001)
    (video,) = [run["video"] for run in content(tmp_path / "a" / "report.html")["runs"]]
    assert video["link"].startswith("../runs/")
    assert (tmp_path / "a" / video["link"]).samefile(run / "videos" / "env-step-2.mp4")


def test_the_same_runs_give_the_same_page(tmp_path):
    write_sweep(tmp_path / "runs", tasks=(WALKER,), seeds=(1,))
    for name in ("a.html", "b.html"):
        report((tmp_path / "runs",), output=tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    with pytest.raises(UserError, match=r"ends in \.html"):
        report((tmp_path / "runs",), output=tmp_path / "a.pdf")


def test_runs_that_have_only_begun_give_a_page_too(tmp_path):
    write_run(tmp_path / "runs", WALKER, "drq_sac", 1, {}, state="running", env_step=10)
    report((tmp_path / "runs",), output=tmp_path / "a.html")
    assert "no run has been evaluated" in content(tmp_path / "a.html")["notes"][0]
    assert any("seed 1 not there yet" in note for note in content(tmp_path / "a.html")["notes"])
    with pytest.raises(UserError, match="--baseline typo is not among the agents: drq_sac"):
        report((tmp_path / "runs",), baseline="typo", output=tmp_path / "b.html")


@pytest.mark.parametrize(("agents", "seeds", "evaluations"), [(20, 5, 200), (1, 2, 10_000)])
def test_twenty_thousand_evaluations_are_no_matter_of_minutes(tmp_path, monkeypatch, agents, seeds, evaluations):
    """What was quadratic took 200 s. A few seconds of processor time suffice where nothing else runs."""
    monkeypatch.setattr(synthetic_runs, "BUDGET", 10 * evaluations)
    monkeypatch.setattr(synthetic_runs, "EVERY", 10)
    random = np.random.default_rng(0)
    for agent in range(agents):
        for seed in range(seeds):
            returns = {10 * (step + 1): [float(random.uniform(0, 1000))] for step in range(evaluations)}
            write_run(tmp_path / "runs", WALKER, f"agent_{agent}", seed, returns)
    script = (
        "import resource, sys, pathlib; from semore_bench.report import report\n"
        "report((pathlib.Path(sys.argv[1]),), output=pathlib.Path(sys.argv[2]))\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        # Not ru_maxrss: a child inherits its parent's peak through fork, and the tests' own process may be large.
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(used.ru_utime + used.ru_stime, peak.split()[1])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "runs"), str(tmp_path / "a.html")]
    seconds, kilobytes = map(float, subprocess.check_output(command, text=True).splitlines()[-1].split())
    assert seconds < 60
    assert kilobytes < 1e6
    (curve, *_) = content(tmp_path / "a.html")["curves"][WALKER].values()
    assert len(curve["steps"]) == len(curve["low"]) == evaluations
    assert all(low <= point <= high for low, point, high in zip(curve["low"], curve["iqm"], curve["high"], strict=True))


def test_many_agents_differ_by_colour_and_dash(tmp_path):
    write_sweep(tmp_path / "runs", agents=[f"agent_{n}" for n in range(17)], tasks=(WALKER,), seeds=(1,))
    report((tmp_path / "runs",), output=tmp_path / "a.html")
    agents = content(tmp_path / "a.html")["agents"]
    assert {agent["colour"] for agent in agents} <= {*COLOURS, None}
    assert len({(agent["colour"], agent["dash"]) for agent in agents}) == 17


# ---- several settings ----


@pytest.fixture(scope="module")
def settings_page(tmp_path_factory) -> Path:
    """A report of runs that were evaluated in three settings."""
    root = tmp_path_factory.mktemp("settings")
    write_distracted_sweep(root / "runs")
    write_run(root / "runs", WALKER, "early", 1, {2000: [40.0]})  # from before there were others
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "REPETITIONS", 100)
        report((root / "runs",), baseline="drq_sac", output=root / "report.html")
    return root / "report.html"


def test_the_data_of_a_page_holds_every_setting(page, settings_page):
    found = content(settings_page)
    assert [setting["name"] for setting in found["settings"]] == ["clean", "hard", "mild"]
    rows = {
        setting["name"]: next(r for r in setting["rows"] if (r["task"], r["agent"]) == (WALKER, "semore_sac"))
        for setting in found["settings"]
    }
    assert {name: row["iqm"] for name, row in rows.items()} == {"clean": 320, "hard": 160, "mild": 240}
    assert rows["hard"]["p_improvement"] == 1
    assert found["settings"][1]["curves"][WALKER]["drq_sac"]["iqm"] == [12]
    shares = {row["agent"]: row["share"] for row in found["generalisation"]["rows"] if row["task"] == WALKER}
    assert shares == pytest.approx({"semore_sac": 0.625, "drq_sac": 0.3})
    assert len(content(page)["settings"]) == 1
    assert content(page)["generalisation"] is None


# ---- time and guidance ----


@pytest.fixture(scope="module")
def timed_page(tmp_path_factory) -> Path:
    """A report of runs whose times are known but for one agent's, with guidance of three kinds."""
    root = tmp_path_factory.mktemp("timed")
    write_timed_sweep(root / "runs")
    for number, guidance in enumerate(("embedded", "embedded:runs/" + 60 * "x" + " (without walker)")):
        run = write_run(root / "runs", WALKER, f"other_{number}", 1, {1000: [20.0], 2000: [40.0]})
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"guidance": guidance}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "REPETITIONS", 100)
        report((root / "runs",), baseline="drq_sac", output=root / "report.html")
    return root / "report.html"


# ---- in a browser ----


def texts(opened: Browser, selector: str) -> list[str]:
    return opened.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


@needs_chromium
def test_it_opens_without_network_errors_or_foreign_code(opened, page):
    assert [address for address in opened.requests if not address.startswith("data:")] == [page.resolve().as_uri()]
    assert texts(opened, "h1") == ["tiny"]
    assert len(texts(opened, "#curves svg")) == 3  # all tasks, and two
    assert len(texts(opened, "#runs tbody tr")) == 14
    assert texts(opened, "#runs tbody tr .state")[0] == "failed"
    opened.run("document.querySelectorAll('#runs button.small').forEach(button => button.click())")
    assert len(opened.run("document.querySelector('.error').textContent")) > len(HOSTILE)
    assert HOSTILE in texts(opened, "dd")
    assert opened.run("document.querySelectorAll('img, script[src], [onclick], [onerror], svg[onload]').length") == 0
    assert opened.run("document.scripts.length") == 2
    assert opened.console == []


@needs_chromium
def test_the_policy_stops_what_would_have_slipped_through(opened):
    opened.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.caught = 1\">')")
    opened.run("new Promise(done => setTimeout(done, 200))")
    assert opened.run("window.caught") is None
    assert "Content Security Policy" in " ".join(opened.console)


@needs_chromium
def test_filters_by_agent_and_by_task(opened):
    assert texts(opened, "#leaderboard td.agent")[:2] == ["semore_sac", "drq_sac"]
    thin = "document.querySelectorAll('#curves figure:nth-child(2) .thin').length"
    assert opened.run(thin) == 8
    opened.click("#agents button:nth-child(1)")  # drq_sac: as many tasks as the other, more than the hostile one
    assert opened.run(thin) == 5
    assert "drq_sac" not in texts(opened, "#leaderboard td.agent") + texts(opened, "#runs td.agent")
    opened.click("#agents button:nth-child(1)")
    assert opened.run(thin) == 8
    choose = f"s => {{ s.value = {json.dumps(REACHER)}; s.dispatchEvent(new Event('change')) }}"
    opened.run(f"({choose})(document.querySelector('#task'))")
    assert texts(opened, "#curves h3") == ["reacher-easy"]
    assert texts(opened, "#leaderboard td.number strong")[:2] == ["420", "220"]
    assert set(texts(opened, "#runs td.task")) == {"reacher-easy"}
    assert len(texts(opened, "#runs tbody tr")) == 6
    assert opened.console == []


@needs_chromium
def test_a_setting_is_chosen(chromium, opened, page, settings_page):
    """Where there is but one, there is nothing to choose."""
    choice = "document.querySelector('#setting').parentElement.hidden"
    assert opened.run(choice)
    assert opened.run("document.querySelector('#generalisation').hidden")
    chromium.console.clear()
    chromium.open(settings_page)
    assert not chromium.run(choice)
    assert texts(chromium, "#setting option") == ["clean", "hard", "mild"]
    assert texts(chromium, "#generalisation td.agent") == ["semore_sac", "drq_sac"]
    choose = "(s => { s.selectedIndex = 1; s.dispatchEvent(new Event('change')) })"
    chromium.run(f"{choose}(document.querySelector('#setting'))")
    assert "evaluated in hard" in texts(chromium, "#leaderboard .hint")[0]
    assert "early" not in texts(chromium, "#leaderboard td.agent")[:2]
    chromium.run(f"{choose}(document.querySelector('#task'))")  # the first task behind all of them
    assert (
        texts(chromium, "#leaderboard td.number strong")[0]
        == {REACHER: "210", WALKER: "160"}[chromium.run("document.querySelector('#task').value")]
    )
    assert chromium.console == []
    for width in (1280, 390):
        chromium.open(settings_page, width, 844)
        assert chromium.run("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_curves_are_drawn_over_time(chromium, opened, timed_page):
    """Where no time is known, there is nothing to choose."""
    hidden = "document.querySelector('#axis').parentElement.hidden"
    assert opened.run(hidden)
    chromium.console.clear()
    chromium.open(timed_page)
    assert not chromium.run(hidden)
    (cell, *others) = texts(chromium, "#leaderboard td[data-label='Time per run']")
    assert cell.startswith("42 sto drq_sac's IQM: 0.210.")
    assert others == ["102 s", "–", "–"]
    assert len(texts(chromium, "#curves figure:nth-child(3) .bold")) == 4
    chromium.run("(s => { s.value = 'time'; s.dispatchEvent(new Event('change')) })(document.querySelector('#axis'))")
    assert len(texts(chromium, "#curves figure")) == 3
    assert len(texts(chromium, "#curves figure:nth-child(3) .bold")) == 2, "those without times are left out"
    assert "50 s" in texts(chromium, "#curves figure:nth-child(3) text")
    chromium.point("#curves figure:nth-child(3) svg", across=0.97)
    text = chromium.run("document.querySelector('#tooltip').textContent")
    assert text.startswith("102 s on one worker")
    assert "drq_sac120" in text
    assert "semore_sac320" in text, "where it was then"
    assert chromium.console == []


@needs_chromium
def test_guidance_is_labelled_with_who_trained_it(chromium, timed_page):
    chromium.console.clear()
    chromium.open(timed_page)
    found = "[...document.querySelectorAll('#leaderboard .guided')].map(node => [node.textContent, node.title])"
    said = dict(chromium.run(found))
    assert said.keys() == {"semore_sac", "other_0", "other_1"}
    assert said["semore_sac"].startswith("simulator: the simulator itself")
    assert said["other_0"].endswith("never of acrobot")
    below = "getComputedStyle(document.querySelector('#leaderboard .guided'), '::after').content"
    assert chromium.run(below) == '"guided by simulator"'
    (card,) = [text for text in texts(chromium, "#details .card") if text.startswith("Who trained")]
    assert all(text in card for text in said.values())
    for width in (1280, 1181, 900, 390):
        chromium.open(timed_page, width, 844)
        assert chromium.run("document.documentElement.scrollWidth") <= width
        rights = "[...document.querySelectorAll('main td *')].map(node => node.getBoundingClientRect().right)"
        assert max(chromium.run(rights)) <= width
    assert chromium.console == []


@needs_chromium
def test_hovering_and_arrow_keys_read_the_curves(opened):
    assert opened.run("document.querySelector('#tooltip').hidden")
    opened.point("#curves figure:nth-child(3) svg", across=0.97)
    text = opened.run("document.querySelector('#tooltip').textContent")
    assert text.startswith("2,000 env steps")
    assert "semore_sac420" in text
    assert "drq_sac220" in text
    opened.run("document.querySelector('#curves figure:nth-child(3) svg').focus()")
    opened.run(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', cancelable: true}))"
    )
    assert opened.run("document.querySelector('#tooltip b').textContent") == "1,000 env steps"
    opened.point("h1")
    assert opened.run("document.querySelector('#tooltip').hidden")
    opened.point("#seeds figure:nth-child(2) circle")
    assert opened.run("document.querySelector('#tooltip').textContent").startswith("seed ")
    assert opened.console == []


@needs_chromium
def test_a_video_plays_from_the_file_itself(opened):
    opened.run("[...document.querySelectorAll('#runs button')].find(b => b.textContent.includes('Video')).click()")
    ready = "new Promise(done => { const v = document.querySelector('video'); v.readyState > 1 ? done(v.videoWidth) : "
    assert (
        opened.run(ready + "(v.onloadeddata = () => done(v.videoWidth), v.onerror = () => done(v.error.message)) })")
        == 32
    )
    assert opened.run("document.querySelector('dialog').open")
    assert opened.console == []


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 1181, 900, 390])
def test_nothing_is_cut_off_at_any_width(chromium, page, width, dark):
    chromium.console.clear()
    chromium.open(page, width, 844, dark)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('main *')].filter(node => node.getBoundingClientRect().right > innerWidth + 1 "
        "&& !node.closest('svg')).map(node => node.outerHTML.slice(0, 80))"
    )
    assert chromium.run(outside) == []
    background = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
    chromium.click("#theme")
    assert chromium.run("getComputedStyle(document.body).backgroundColor") != background
    assert chromium.console == []
