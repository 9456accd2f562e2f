"""One process is the plain case; of several each takes its own GPU. Several real ones: test_interruptions.py."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch

from saferope_training import processes


def test_one_process_is_alone():
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    x = torch.ones(3)
    assert processes.total(x) is x and processes.gathered("mine") == ["mine"]
    assert processes.own_device("cuda") == "cuda"


def test_work_that_is_shared_out_is_done_whole_and_alone(monkeypatch):
    """The third of four does the third job and the seventh; in them it counts as the only one."""
    state, waited, done = SimpleNamespace(num_processes=4, process_index=2), [], []
    state.wait_for_everyone = lambda: waited.append(len(done))
    monkeypatch.setattr(processes, "_state", lambda: state)

    def job(number):
        done.append((number, processes.count(), processes.index(), processes.is_main()))
        processes.wait()
        assert processes.gathered(number) == [number]

    processes.share_out([partial(job, number) for number in range(8)])
    assert done == [(2, 1, 0, True), (6, 1, 0, True)] and waited == [2]
    assert (processes.count(), processes.index(), processes.is_main()) == (4, 2, False), "and not any more"


def test_shares_are_fair(monkeypatch):
    """Chunks of 12 and 8 by turns, as a search has them: by turns,
    one of two processes would paint half as much again."""
    costs, shares = [8, 12] * 4, []
    for own in range(2):
        monkeypatch.setattr(processes, "_state", lambda own=own: SimpleNamespace(num_processes=2, process_index=own))
        shares.append(processes.fair_share(costs))
    assert sorted(shares[0] + shares[1]) == list(range(8)) and all(share == sorted(share) for share in shares)
    assert [sum(costs[job] for job in share) for share in shares] == [40, 40]
    assert sum(costs[1::2]) == 48, "negative control"


def test_each_of_several_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(processes, "_state", lambda: SimpleNamespace(num_processes=4, local_process_index=2))
    assert processes.own_device("cuda") == "cuda:2"
    assert processes.own_device("cpu") == "cpu" and processes.own_device("cuda:1") == "cuda:1", "as told"
