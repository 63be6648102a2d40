"""One process of two whose devices have unequal room: prints as JSON what its step took and what it lost.

`remat_processes.py DIRECTORY PROCESSES PORT ID`, run by test_remat_processes.py.
"""

import json
import sys

import jax

from sysdpo_jax import DirectObjective, initialize, make_mesh, make_train_step
from sysdpo_jax.training import compiling


def main(process, number):
    # It asks for a device, which must wait until the processes have found each other.
    from tests.training.remat_cases import KEY, decoder, pairs, start, system

    component, mesh = decoder(layers=3), make_mesh(data=number, fsdp=jax.device_count() // number)
    optimizer, state = start(component, mesh=mesh)
    # The first has room for everything, the second for nothing.
    compiling._free_bytes = lambda device: 2**30 if process == 0 else 0
    step = make_train_step(system(component), DirectObjective(), optimizer, mesh)
    share = mesh.size // number
    own = jax.tree.map(lambda x: x[process * share : (process + 1) * share], pairs(component, mesh.size))
    _, metrics = step(state, own, KEY)
    print(json.dumps([[*step._decided.values()], float(metrics["loss"])]))


if __name__ == "__main__":
    _, number, port, process = sys.argv[1:]
    initialize(f"127.0.0.1:{port}", int(number), int(process), heartbeat_timeout_seconds=10)
    main(int(process), int(number))
