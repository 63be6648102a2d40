"""Trainers of equal parts share their step, which is traced once for all tests of this folder."""

from typing import Any

import pytest

from sysdpo_jax.training import trainer

STEPS: dict[Any, Any] = {}
make_train_step = trainer.make_train_step


@pytest.fixture(autouse=True)
def shared_steps(monkeypatch):
    """An optimizer is known by the object that it is: the dictionary keeps it."""

    def shared(system, objective, optimizer, mesh, accumulate):
        key = system, objective, id(optimizer), mesh, accumulate
        if key not in STEPS:
            STEPS[key] = make_train_step(system, objective, optimizer, mesh, accumulate)
        return STEPS[key]

    monkeypatch.setattr(trainer, "make_train_step", shared)
