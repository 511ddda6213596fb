"""Names from elsewhere: folders of their own, and text that a terminal can show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semore_bench.names import did_you_mean, folder_name, printable


@pytest.mark.parametrize(
    ("env_id", "folder"),
    [
        ("dm_control/walker-walk-v0", "dm_control_walker-walk-v0"),
        ("Meta-World/reach-v3", "Meta-World_reach-v3"),
        ("CarRacing-v3", "CarRacing-v3"),
        ("ALE/Pong-v5", "ALE_Pong-v5"),
        ("my.env/A_1-v0", "my.env_A_1-v0"),
    ],
)
def test_ordinary_ids_have_the_folders_that_they_always_had(env_id, folder):
    assert folder_name(env_id) == folder


@pytest.mark.parametrize(
    "env_id", ["..", ".", "../x", "/x", "x/", "a//b", "", "-", "a:b", "a b", "x" * 300, "é" * 200, "\0"]
)
def test_other_ids_stay_inside_and_have_a_folder_of_their_own(env_id, tmp_path):
    folder = folder_name(env_id)
    assert (tmp_path / folder).resolve().parent == tmp_path.resolve()
    assert not folder.startswith((".", "-"))
    (tmp_path / folder).mkdir()  # not too long for a file system


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_ids_that_differ_in_a_special_character_share_no_folder(a, b):
    plain = {a.replace("/", "_"), b.replace("/", "_")}
    if len(plain) == 2:
        assert folder_name(a) != folder_name(b)


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_is_one_line_that_every_terminal_shows(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert printable("plain ± text") == "plain ± text"
    assert printable("\x1b[31mred") == r"\x1b[31mred"


def test_unknown_words_are_answered_in_whole_sentences():
    advice = "A file of yours ends in .toml"
    assert did_you_mean("smok", ["smoke"], advice) == "; did you mean 'smoke'? A file of yours ends in .toml"
    assert did_you_mean("x", ["a", "b"], advice) == "; expected one of a, b. A file of yours ends in .toml"
    assert did_you_mean("x", ["a", "b"]) == "; expected one of a, b"
