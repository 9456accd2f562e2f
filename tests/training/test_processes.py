"""One process is the plain case; of several each takes its own GPU. Several real ones: test_interruptions.py."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from training import processes


def test_one_process_is_alone():
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    x = torch.ones(3)
    assert processes.total(x) is x and processes.gathered("mine") == ["mine"]
    assert processes.own_device("cuda") == "cuda"


def test_each_of_several_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(processes, "_state", lambda: SimpleNamespace(num_processes=4, local_process_index=2))
    assert processes.own_device("cuda") == "cuda:2"
    assert processes.own_device("cpu") == "cpu" and processes.own_device("cuda:1") == "cuda:1", "as told"
