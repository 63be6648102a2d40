"""A checkpoint is restored on another mesh than that which saved it, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_checkpoints_are_restored_on_other_meshes():
    command = [sys.executable, "-W", "error", "-m", "tests.distributed.other_placement"]
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    same = {"same": True, "placed": True, "changed": True}
    rows = {"fsdp to one": 256, "data to fsdp": 32, "one to mixed": 64}
    assert json.loads(run.stdout) == {name: same | {"rows": number} for name, number in rows.items()}
