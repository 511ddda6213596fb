"""The `semore-bench` command: exit codes, messages, and that help is cheap."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from semore_bench import __version__, cli
from wrappers.errors import UserError


def exit_code(*arguments: str) -> int | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return caught.value.code


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_every_command(arguments, capsys):
    assert exit_code(*arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_help_and_a_mistyped_command_import_nothing_heavy():
    script = textwrap.dedent("""
        import sys
        from semore_bench.cli import main
        for arguments in (["--help"], ["lst"]):
            try:
                main(arguments)
            except SystemExit:
                pass
        heavy = {"torch", "gymnasium", "mujoco", "matplotlib", "pandas", "tyro", "numpy"} & set(sys.modules)
        assert not heavy, heavy
    """)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.strip() == f"semore-bench {__version__}"


@pytest.mark.parametrize("module", ["semore_bench", "semore_bench.cli"])
def test_the_command_is_a_module_too(module):
    shown = subprocess.run([sys.executable, "-m", module, "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == f"semore-bench {__version__}"


def test_mistyped_command_is_answered_with_the_nearest(capsys):
    assert exit_code("docter") == 2
    captured = capsys.readouterr()
    assert "'docter'" in captured.err
    assert "did you mean 'doctor'?" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_a_command_like_no_other_is_answered_with_all_of_them(capsys):
    assert exit_code("xyzzy") == 2
    assert ", ".join(cli.COMMANDS) in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    assert exit_code(name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"semore-bench {name}" in shown
    assert "--help" in shown


@pytest.fixture
def command(monkeypatch):
    """Registers a function as the command `try`."""

    def register(function):
        monkeypatch.setattr(sys.modules[__name__], "registered", function, raising=False)
        monkeypatch.setitem(cli.COMMANDS, "try", (f"{__name__}:registered", ""))

    return register


def test_exit_code_is_what_the_command_returns(command):
    def fails(number: int) -> int:
        """Returns its argument."""
        return number

    command(fails)
    assert exit_code("try", "--number", "1") == 1
    assert exit_code("try", "--number", "0") == 0
    assert exit_code("try", "--number", "one") == 2  # tyro's answer to a wrong type


def test_user_error_is_one_line_and_exit_code_2(command, capsys):
    def fails() -> None:
        """Complains."""
        raise UserError("no such thing; try another")

    command(fails)
    assert exit_code("try") == 2
    assert capsys.readouterr().err == "semore-bench: no such thing; try another\n"


def test_a_bug_keeps_its_traceback(command):
    def fails() -> None:
        """Has a bug."""
        raise ZeroDivisionError

    command(fails)
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_ctrl_c_exits_with_130_and_without_traceback():
    script = textwrap.dedent("""
        import sys, time, types
        from semore_bench import cli
        def wait() -> None:
            "Waits."
            print("waiting", flush=True)
            time.sleep(60)
        sys.modules["waiting"] = types.SimpleNamespace(wait=wait)
        cli.COMMANDS["wait"] = ("waiting:wait", "")
        cli.main(["wait"])
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waiting\n"
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in errors
