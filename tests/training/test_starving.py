"""The whole loop with a slow disk and a fast step: the device does not wait for batches."""

import sys
import time
from itertools import pairwise
from statistics import median

import jax
import numpy as np
import optax

from sysdpo_jax import DirectObjective, epoch_batches
from sysdpo_jax.training import ComponentOptimizer, Trainer, create_state, make_optimizer
from tests.training.systems import CHAIN, pairs

# Seconds of a step on the device; steps in the time of one reading; steps until enough is read ahead, and measured.
STEP, READING, WARM, MEASURED = 0.1, 6, 15, 30
BATCH_AT = epoch_batches(pairs(40), 8, seed=1)


class SlowDisk:
    def __len__(self):
        return sys.maxsize

    def __getitem__(self, step):
        time.sleep(READING * STEP)
        return BATCH_AT(step)


class Device:
    """An objective whose step keeps the device for a while; when it was kept, and for how long."""

    def __init__(self):
        self.kept = []

    def _keep(self, _):
        began = time.monotonic()
        time.sleep(STEP)
        self.kept.append((began, time.monotonic()))
        return np.float32(0)

    def __call__(self, system, params, reference, batch, key):
        loss, aux = DirectObjective()(system, params, reference, batch, key)
        shape = jax.ShapeDtypeStruct((), np.float32)
        return loss + jax.pure_callback(self._keep, shape, jax.lax.stop_gradient(loss)), aux

    def waited(self):
        """Share of the time in which the device was not kept longer than between most steps."""
        kept = self.kept[-MEASURED:]
        gaps = [after[0] - before[1] for before, after in pairwise(kept)]
        usual = median(gaps)
        return sum(max(0.0, gap - usual) for gap in gaps) / (kept[-1][1] - kept[0][0])


def test_a_slow_disk_keeps_no_device_waiting(tmp_path):
    shares = []
    # A busy machine adds to what is measured and never takes from it: of three times the best counts.
    while not shares or (shares[-1] >= 0.02 and len(shares) < 3):
        optimizer = make_optimizer(dict.fromkeys("abc", ComponentOptimizer(optax.sgd(1e-3))))
        state, device = create_state(CHAIN, CHAIN.init(jax.random.key(0)), optimizer), Device()
        trainer = Trainer(CHAIN, device, optimizer, tmp_path / str(len(shares)))
        trainer.fit(state, SlowDisk(), WARM + MEASURED, jax.random.key(3))
        assert len(device.kept) == WARM + MEASURED
        shares.append(device.waited())
    assert min(shares) < 0.02, shares
