"""A rank that fails, is killed or falls silent ends the ranks of all nodes, and what it was is said once, first."""

import re
import time
from pathlib import Path

import pytest
from nodes import Ended, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
CASE = str(Path(__file__).with_name("failing_case.py"))


def said(node: Ended) -> list[str]:
    """The lines that the ranks of a node wrote before torchrun reported; its own log lines are left out."""
    lines = node.stderr.partition("] failed (exitcode")[0].splitlines()
    return [line for line in lines if not re.match(r"\[?[EW]\d{4} ", line)]


@pytest.mark.parametrize("where", ["collective", "elsewhere"])
def test_a_traceback_comes_first_and_ends_all_nodes(where):
    """Elsewhere: the other ranks wait for something else than a collective, and would wait for ever."""
    first, last = torchrun(CASE, "raise", where, n_nodes=2, n_ranks=1)
    assert first.returncode and last.returncode
    lines = said(last)
    assert lines[0].startswith("rank 1 of 2 on ") and lines[1].startswith("Traceback")
    assert lines[-1] == "ValueError: rank 1 cannot go on" and lines.count(lines[-1]) == 1
    assert not said(first), first.stderr
    assert last.stderr.count("ValueError: rank 1 cannot go on") == 2  # torchrun's report has it once more


def test_a_killed_rank_ends_all_nodes():
    first, last = torchrun(CASE, "kill", n_nodes=2, n_ranks=1)
    assert first.returncode and last.returncode
    assert "Signal 9 (SIGKILL)" in last.stderr
    (line,) = said(first)
    assert line.startswith("rank 0 lost another rank, which has said nothing: ")


def test_the_end_of_the_first_agent_ends_all_ranks():
    """Also its own, which it leaves behind, and which are busy with something that needs no other rank."""
    first, last = torchrun(CASE, "orphan", n_nodes=2, n_ranks=1)
    assert first.returncode == -9 and last.returncode
    stat, deadline = Path(f"/proc/{first.stdout.strip()}/stat"), time.monotonic() + 120
    while stat.exists() and ") Z " not in stat.read_text():
        assert time.monotonic() < deadline, "a rank was left behind"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("refuse", "error: rank 1 finds its file damaged; copy it again"),
        ("unreadable", "error: unknown key 'sft.lrr'"),
        ("freeze", "error: nothing was heard of rank 1 for 5 s"),
    ],
)
def test_bad_input_is_one_line_for_all_ranks(way, says):
    (node,) = torchrun(CASE, way, "elsewhere")
    assert node.returncode
    assert said(node) == [says], node.stderr
    assert "exitcode  : 2" in node.stderr or way == "freeze"
