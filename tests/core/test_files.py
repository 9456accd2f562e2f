"""Writing where a stranger may have laid links: a link is replaced, an error leaves the old file,
nothing is left over."""

from __future__ import annotations

import json
import os

import pytest

from saferope_core import save_concepts
from saferope_core.concept.files import append_text, placed, require_no_link, sweep, write_bytes, write_text


@pytest.fixture
def linked(tmp_path):
    """A name in a folder that leads to a file elsewhere, and that file."""
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / ".bashrc"
    target.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    link = folder / "star.md"
    link.symlink_to(target)
    return link, target


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "text", "concepts"])
def test_a_link_is_replaced_and_never_followed(linked, make_concept, kind, dangling):
    link, target = linked
    if dangling:
        target.unlink()
    writers = {
        "bytes": lambda: write_bytes(link, b"new"),
        "text": lambda: write_text(link, "new"),
        "concepts": lambda: save_concepts(link, [make_concept()]),
    }
    writers[kind]()
    assert not link.is_symlink() and link.stat().st_size > 0
    assert not target.exists() if dangling else target.read_text() == "mine"
    assert list(link.parent.iterdir()) == [link]


def test_open_follows_the_link(linked):
    """The control of the test above."""
    link, target = linked
    link.write_text("new")
    assert target.read_text() == "new" and link.is_symlink()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system cannot refuse to follow a link")
def test_appending_refuses_a_link(linked):
    link, target = linked
    with pytest.raises(OSError, match="symbolic link"):
        append_text(link, "new")
    assert target.read_text() == "mine"
    link.unlink()
    append_text(link, "a")
    append_text(link, "b")
    assert link.read_text() == "ab", "control: a file is added to"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), placed(path) as new:
        new.write_text("half")
        assert new.name == path.name and path.read_text() == "old"
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writes_of_one_name_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with placed(path) as one, placed(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_what_is_written_has_the_rights_of_any_other_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_name_as_long_as_names_may_be(tmp_path):
    write_text(tmp_path / ("a" * 255), "x")
    assert (tmp_path / ("a" * 255)).read_text() == "x"


def test_line_ends_stay(tmp_path):
    write_text(tmp_path / "a", "a\r\nb\n")
    assert (tmp_path / "a").read_bytes() == b"a\r\nb\n"


def test_half_a_pair_is_written_as_json_has_it(tmp_path):
    """A prompt from a command line of other bytes than UTF-8 holds such."""
    text = json.dumps("a\udcff", ensure_ascii=False)
    with pytest.raises(UnicodeEncodeError):  # control
        text.encode()
    write_text(tmp_path / "a", text)
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == "a\udcff"


def test_sweeping_takes_what_killed_writes_left_and_nothing_behind_a_link(linked):
    link, target = linked
    left, other = link.parent / ".saferope-abcd1234.partial", link.parent / ".partial"
    left.mkdir()
    other.mkdir()
    (left / "star.md").write_text("half")
    trap = link.parent / ".saferope-trap.partial"
    trap.symlink_to(target.parent)
    sweep(link.parent)
    assert not left.exists() and target.read_text() == "mine"
    assert other.exists(), "control: other folders stay"
    sweep(link.parent / "none")


def test_a_folder_that_is_a_link_is_refused(linked):
    link, target = linked
    folder = link.parent / "below"
    folder.symlink_to(target.parent)
    for below in (folder, folder / "a" / "b"):
        with pytest.raises(ValueError, match="below: got a link, expected a folder of its own"):
            require_no_link(link.parent, below)
    require_no_link(link.parent, link.parent / "another" / "b")
    require_no_link(folder, folder / "a")  # the user's own folder may be one
