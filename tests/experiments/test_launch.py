"""The launchers, as far as a machine without a cloud goes: syntax, fields, command lines, and a run that is preempted.

`gcloud`, `srun` and `scontrol` are stand-ins on the PATH: they note how they were called; srun starts its tasks here.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
import yaml
from PIL import Image

import sysdpo_jax as sj
from sysdpo_jax.models.lora import is_lora
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.files import configure
from sysdpo_jax.runs.run import assemble, make_batches, read_preferences
from sysdpo_jax.training import read_metrics
from sysdpo_jax.training.throughput import count_units
from sysdpo_jax.trees import by_path
from tests.pretrained.checkpoints import stable_diffusion_1, unet, write_decoder

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SCALING = (ROOT / "docs" / "scaling.md").read_text()
COMMAND = "sysdpo train"

NOTE = """#!{python}
import json, sys
from pathlib import Path
with Path({log!r}).open("a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""
# Slurm's variables make JAX join the tasks of a step; one task alone needs none.
SRUN = """#!{python}
import os, subprocess, sys
from pathlib import Path
command, number = sys.argv[1:], int(os.environ["TASKS"])
while command[0].startswith("-"):
    command.pop(0)
cluster = lambda task: {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(number), "SLURM_PROCID": str(task),
                        "SLURM_LOCALID": str(task)}} if number > 1 else {{}}
tasks = [subprocess.Popen(command, env=os.environ | cluster(task)) for task in range(number)]
Path({log!r}).write_text(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""


def parsed(arguments, folder):
    """The configuration that a command's arguments after its name make, with an empty file for the pod's."""
    nothing = folder / "nothing.yaml"
    nothing.write_text("{}")
    return configure(TrainConfig, [str(nothing) if word.endswith(".yaml") else word for word in arguments])


def stand_in(folder, name, template=NOTE):
    """Put an executable on a PATH; returns the file that it writes."""
    log, script = folder / f"{name}.log", folder / name
    script.write_text(template.format(python=sys.executable, log=str(log)))
    script.chmod(0o755)
    return log


def calls(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def launch(script, *arguments, path, **environment):
    full = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"} | environment
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=full, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_the_shell_accepts_every_script(script):
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


POD = {"PROJECT": "p", "ZONE": "us-west4-a", "BUCKET": "b", "CONFIG": "/mnt/runs/my_run.yaml"}


def test_the_tpu_launch_runs_the_entry_point_on_all_workers(tmp_path):
    log = stand_in(tmp_path, "gcloud")
    for action in ("create", "run", "stop", "delete"):
        done = launch("tpu_pod.sh", action, path=tmp_path, **POD)
        assert done.returncode == 0, done.stderr
    create, run, stop, delete = calls(log)
    assert create[:4] == ["compute", "tpus", "queued-resources", "create"]
    assert {"--accelerator-type=v5litepod-16", "--spot", "--zone=us-west4-a", "--project=p"} <= set(create)
    assert run[:4] == ["compute", "tpus", "tpu-vm", "ssh"]
    assert "--worker=all" in run
    [remote] = [part.removeprefix("--command=") for part in run if part.startswith("--command=")]
    words = shlex.split(remote)
    config = parsed(words[words.index("train") + 1 :], tmp_path)
    # The bucket's mount, resumed by default, and a preempted run counts as not finished.
    assert (config.directory, config.preempted_exit_code) == ("/mnt/runs/aligned", 75)
    assert words[words.index("systemd-run") - 1] == "sudo"
    assert {"--property=Restart=on-failure", "--property=TimeoutStopSec=90"} <= set(words)
    # systemd's stop is SIGTERM to the process.
    assert stop[-1] == "--command=sudo systemctl stop sysdpo"
    assert delete[:4] == ["compute", "tpus", "queued-resources", "delete"]


def test_the_tpu_launch_says_what_it_lacks(tmp_path):
    stand_in(tmp_path, "gcloud")
    assert "the Google Cloud project" in launch("tpu_pod.sh", "create", path=tmp_path, PROJECT="").stderr
    assert launch("tpu_pod.sh", "unknown", path=tmp_path, **POD).returncode == 2


def test_the_jobset_has_what_the_kinds_require(tmp_path):
    """Fields of jobset.x-k8s.io/v1alpha2, batch/v1 Job and v1 Pod, and what a TPU slice of GKE needs."""
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    spec = manifest["spec"]
    [replicated] = spec["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]

    chips = container["resources"]["limits"]["google.com/tpu"]
    selector = pod["nodeSelector"]
    sides = [int(side) for side in selector["cloud.google.com/gke-tpu-topology"].split("x")]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert job["completions"] == job["parallelism"] == sides[0] * sides[1] // chips
    assert job["completionMode"] == "Indexed"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"]

    # Preemption: a restart of all hosts that does not count; podFailurePolicy demands restartPolicy Never.
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert pod["terminationGracePeriodSeconds"] >= 30
    disrupted, preempted = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert preempted["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    [rule] = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] > 0

    # The process itself, without a shell that would keep SIGTERM from it.
    assert container["command"][:2] == ["sysdpo", "train"]
    config = parsed(container["command"][2:], tmp_path)
    assert config.preempted_exit_code == 75
    assert Path(config.directory).is_relative_to(container["volumeMounts"][0]["mountPath"])


def test_the_image_has_what_the_command_needs():
    copied = re.findall(r"^COPY (.+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "sysdpo_jax"} <= set(names)
    assert all((ROOT / name).exists() for name in names)


def test_the_documented_commands_are_accepted(tmp_path):
    """Every command line of the entry point in docs/scaling.md, XPK's among them."""
    flat = SCALING.replace("\\\n", " ")
    commands = re.findall(rf"{COMMAND} ([^\"`\n]+)", flat)
    assert len(commands) >= 2
    for command in commands:
        assert parsed(shlex.split(command), tmp_path).directory
    [xpk] = re.findall(r"xpk workload create.*", flat)
    assert {"--restart-on-exit-codes=75", "--max-restarts=5"} <= set(shlex.split(xpk))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Tiny models and four preferences."""
    folder = tmp_path_factory.mktemp("material")
    write_decoder(folder / "writer", "llama", num_hidden_layers=1)
    one_block = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    pipeline = stable_diffusion_1()
    pipeline.register_modules(unet=unet(block_out_channels=(8,), **one_block))
    pipeline.save_pretrained(folder / "painter")
    for name, grey in (("good.png", 200), ("bad.png", 30)):
        Image.new("RGB", (20, 16), (grey, grey, 90)).save(folder / name)
    side = lambda caption, image: {"caption": caption, "image": str(folder / image)}  # noqa: E731
    records = [
        {"inputs": {"request": word}, "chosen": side("a red ball", "good.png"), "rejected": side("a cube", "bad.png")}
        for word in ("red", "green", "small", "large")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


CONFIG = """
system:
  inputs: [request]
  nodes:
    caption: {{component: writer, parents: [request]}}
    image: {{component: painter, parents: [caption]}}
  components:
    writer:
      checkpoint: {folder}/writer
      lora: {{rank: 2}}
      settings: {{max_prompt_length: 8, max_new_tokens: 8}}
    painter: {{checkpoint: {folder}/painter, lora: {{rank: 2}}, settings: {{truncation: keep_start}}}}
data: {{source: {folder}/pairs.jsonl}}
schedule: {{batch_size: 2, warmup: 1}}
log_every: 1
"""
STEPS, SAVED_EVERY = 60, 10
# Seconds, on a busy machine; an idle one needs a tenth.
PATIENCE = 600


@pytest.mark.slow
def test_the_entry_point_loads_its_models_and_prepares_its_batches(tmp_path, material):
    """All of `main` before the first step, whose compilation is what the slow test below waits for."""
    run = assemble(configure(TrainConfig, [str(material / "run.yaml"), "--directory", str(tmp_path)]))
    state = sj.create_state(run.system, run.params, run.optimizer, run.mesh)
    trained = by_path(state.trained)
    assert {path.partition("/")[0] for path in trained} == {"writer", "painter"}
    assert all(is_lora(path) for path in trained)
    # Frozen parts lie over the mesh as all others do.
    frozen = run.system.frozen_params(run.params)["painter"]
    assert set(frozen) == {"codec", "text"}
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(frozen)} == {run.mesh}
    batch = make_batches(run, read_preferences(run))[0]
    units = count_units(run.system, batch)
    assert (units["pairs_per_second"], units["images_per_second/image"]) == (2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_slurm_job_is_preempted_requeued_and_goes_on(tmp_path, material, tasks):
    """SIGTERM after the first checkpoint saves, the job is queued again, and the same command does the other steps."""
    pids, requeued = stand_in(tmp_path, "srun", SRUN), stand_in(tmp_path, "scontrol")
    run = tmp_path / "run"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TASKS": str(tasks),
        "SLURM_JOB_ID": str(os.getpid()),
        "JAX_PLATFORMS": "cpu",
        # Compilation is most of the time.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHON": sys.executable,
        "CONFIG": str(material / "run.yaml"),
        "DIRECTORY": str(run),
        "FLAGS": f"--mesh.data {tasks} --schedule.steps {STEPS} --checkpoint-every {SAVED_EVERY}",
    }

    @contextmanager
    def start():
        job = subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sh")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield job
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.communicate()

    with start() as job:
        deadline = time.monotonic() + PATIENCE
        while not (run / "checkpoints" / str(SAVED_EVERY)).exists():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # What Slurm does 90 seconds before the time limit.
        for pid in pids.read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        output = job.communicate(timeout=PATIENCE)[0]
    assert job.returncode == 0, output
    assert calls(requeued) == [["requeue", str(os.getpid())]], output
    reached = max(row["step"] for row in read_metrics(run / "metrics.jsonl"))
    assert SAVED_EVERY - 1 <= reached < STEPS - 1

    with start() as job:
        output = job.communicate(timeout=PATIENCE)[0]
    assert job.returncode == 0, output
    assert str(run / "report.html") in output
    assert len(calls(requeued)) == 1
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(STEPS))
