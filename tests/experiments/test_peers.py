"""The benchmark beside other programs: the work and its counts, our side at toy sizes, processes, and the whole run.

Sides in the tests of processes are scripts that answer at once; the real peers run in the slow test.
"""

import ast
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

import sysdpo_jax as sj
from experiments.benchmarks.peers import __main__ as run
from experiments.benchmarks.peers import ours, transformers_side
from experiments.benchmarks.peers.cases import CASES, SIDES, Case, stated
from experiments.benchmarks.peers.processes import ask, reason_of
from experiments.benchmarks.peers.side import ANSWER
from experiments.benchmarks.peers.work import Decode, ImageDPO, as_json, from_json
from experiments.scaling.systems import DECODERS, UNETS
from sysdpo_jax.flags import from_mapping
from sysdpo_jax.models import DecoderConfig, UNetConfig
from sysdpo_jax.training import step_flops

ROOT = Path(__file__).parents[2]
TINY = CASES["tiny"]
EQUAL, UNEQUAL, DECODE = TINY["dpo"].work, TINY["dpo-lognormal"].work, TINY["decode"].work


@pytest.mark.parametrize("rank", [0, 2])
def test_the_flops_of_a_step_are_those_that_the_library_counts(rank):
    work = replace(EQUAL, lora_rank=rank)
    model = ours.language_model(work, work.room)
    system = sj.CompoundSystem(("prompt",), (sj.Node("answer", model, ("prompt",)),))
    params = system.init(jax.random.key(0))
    if rank:
        params = {"answer": sj.add_lora(params["answer"], sj.LoRA(rank, 4.0), jax.random.key(0))}
    trained = {"trainable": sj.LORA_PARAMS} if rank else {}
    optimizer = sj.make_optimizer({"answer": sj.ComponentOptimizer(ours.optax.sgd(1.0), **trained)})
    records = [
        sj.PreferenceRecord({"prompt": row["prompt"]}, {"answer": row["chosen"]}, {"answer": row["rejected"]})
        for row in work.rows()[: work.pairs]
    ]
    batch = sj.prepare_pairs(system, records)
    # A pair has no padding here.
    assert float(model.padding(batch.chosen["answer"])) == 0
    counted = step_flops(system, sj.create_state(system, params, optimizer), batch)["answer"]
    assert work.flops_per_step == counted


def test_rows_of_unequal_lengths_count_by_themselves():
    """As steps of one row each, of which half is the prompt's with that answer."""
    lengths = UNEQUAL.lengths()
    alone = replace(UNEQUAL, sigma=0.0, pairs=1, steps=1)
    each = [
        replace(alone, prompt=int(prompt), completion=int(answer) + 1)
        for prompt, *answers in lengths
        for answer in answers
    ]
    assert UNEQUAL.steps * UNEQUAL.flops_per_step == pytest.approx(sum(row.flops_per_step / 2 for row in each))
    assert UNEQUAL.steps * UNEQUAL.units_per_step == sum(row.units_per_step / 2 for row in each)


def test_lengths_are_skewed_and_fit_their_bounds():
    work = replace(CASES["cpu"]["dpo-lognormal"].work, steps=250)
    lengths = work.lengths()
    assert (lengths.min(), lengths.max()) == (4, 128)
    assert np.median(lengths, axis=0) == pytest.approx([40, 30, 30], rel=0.1)
    texts = [[len(row[name].split()) for name in ("prompt", "chosen", "rejected")] for row in work.rows()]
    assert texts == lengths.tolist()


def test_what_decoding_reads_is_the_weights_and_the_cache():
    decoder = {
        **{"vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
    }
    work = Decode("cpu", decoder, "bfloat16", rows=5, prompt=7, new=2, greedy=True, repeats=1)
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6
    # The first new token sees 7 slots, the second one 8; keys and values of one head of width 2.
    cache = 3 * 5 * 2 * 2 * (7 + 8)
    assert work.bytes_read == 2 * (2 * (3 * layer + 4 * 10) + cache)


@pytest.mark.parametrize("preset", CASES)
def test_work_goes_through_json_and_its_peers_are_known(preset):
    for case in CASES[preset].values():
        sent = json.dumps(as_json(case.work))
        assert json.dumps(as_json(from_json(json.loads(sent)))) == sent
        assert set(case.peers) <= set(SIDES)
    assert {case.work.device for case in CASES[preset].values()} == {"gpu" if preset == "gpu" else "cpu"}


def test_shapes_are_those_of_the_models():
    for name in ("llama-3.2-1b", "llama-3-8b"):
        assert from_mapping(DecoderConfig, stated(DECODERS[name])) == DECODERS[name]
    assert CASES["gpu"]["8b-lora"].work.decoder == stated(DECODERS["llama-3-8b"])
    unet = CASES["gpu"]["sdxl"].work.unet
    assert from_mapping(UNetConfig, json.loads(json.dumps(unet))) == UNETS["sdxl"]


def test_an_epoch_of_our_steps(tmp_path):
    """By hand: the tokens, each answer with an end; the places of two batches of the shapes that were used."""
    made = ours.measure(UNEQUAL, tmp_path, {})
    assert len(made.seconds) == UNEQUAL.steps
    assert min(made.seconds) > 0
    assert made.checks["loss"] == pytest.approx(math.log(2), abs=1e-5)
    rows = UNEQUAL.rows()
    words = sum(2 * len(row["prompt"].split()) + len((row["chosen"] + " " + row["rejected"]).split()) for row in rows)
    assert made.checks["tokens"] == words + 2 * len(rows)
    # All of a prompt is shared by both sides.
    assert {own for _, own, _ in made.about["shapes"]} == {0}
    places = [2 * len(rows) * (min(shared, 16) + min(new, 17)) for new, _, shared in made.about["shapes"]]
    assert 1 - made.checks["tokens"] / min(places) <= made.about["padding"] + 1e-9
    assert made.about["padding"] <= 1 - made.checks["tokens"] / max(places) + 1e-9
    assert len(made.about["rows"]) == UNEQUAL.pairs
    # What the peers load is the model before it was trained.
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "weights")
    assert sum(weights.numel() for weights in peer.parameters()) == made.parameters


def test_transformers_decodes_what_we_do_from_our_weights(tmp_path):
    made = ours.measure(DECODE, tmp_path, {})
    theirs = transformers_side.measure(DECODE, tmp_path, {})
    assert (len(made.seconds), len(theirs.seconds)) == (DECODE.repeats, DECODE.repeats)
    assert made.checks["shape"] == [DECODE.rows, DECODE.new]
    assert run.failures({"cases": {"decode": summary(DECODE, made, theirs)}}) == []


def summary(work, mine, theirs):
    outcomes = {
        name: [run.Outcome("measured", answer=json.loads(json.dumps(vars(made))))]
        for name, made in (("ours", mine), ("transformers", theirs))
    }
    return run.summarise(work, outcomes, ROOFLINE, None)


ROOFLINE = {"device": "toy", "matmul_flops_per_second": 1e9, "copy_bytes_per_second": 1e9}


def test_a_device_that_is_not_there_is_said(tmp_path):
    with pytest.raises(SystemExit, match="JAX has no gpu, but cpu"):
        ours.measure(replace(EQUAL, device="gpu"), tmp_path, {})
    with pytest.raises(SystemExit, match="JAX has no gpu, but cpu: choose another --preset"):
        ours.roofline("gpu", run.ROOFLINES["gpu"])


def test_what_a_peers_process_loads_knows_nothing_of_jax():
    """Its modules, and all of this repository that they import."""
    waiting = [f"experiments.benchmarks.peers.{side.module}" for name, side in SIDES.items() if name != "ours"]
    seen = set()
    while waiting:
        name = waiting.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            found = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {each.split(".")[0] for each in found} & {"jax", "flax", "optax", "sysdpo_jax"}, (name, found)
            waiting += found
    assert "experiments.benchmarks.peers.work" in seen


SAYS = f"""
import json, sys
told = json.loads(sys.argv[1])
print("a trainer's summary")
print({ANSWER!r} + json.dumps(told))
"""
FAKES = {
    "answers": SAYS,
    "absent": "import a_peer_that_is_nowhere\n",
    "fails": "import sys\nprint('loading', file=sys.stderr)\nraise ValueError('no kernel | here')\n",
    "dies": "import os, sys\nprint('Killed by the kernel', file=sys.stderr)\nsys.stderr.flush()\nos._exit(9)\n",
    "silent": "print('nothing')\n",
    "late": "import subprocess, sys, time\nchild = subprocess.Popen(['sleep', '60'])\n"
    "open(sys.argv[1].strip('\"'), 'w').write(str(child.pid))\ntime.sleep(60)\n",
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    (tmp_path / "fake_sides").mkdir()
    for name, code in FAKES.items():
        (tmp_path / "fake_sides" / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("answers", "measured", ""),
        ("absent", "not installed", "ModuleNotFoundError: No module named 'a_peer_that_is_nowhere'"),
        ("fails", "failed", "ValueError: no kernel | here"),
        ("dies", "failed", "exit code 9: Killed by the kernel"),
        ("silent", "failed", "exit code 0: it said nothing"),
    ],
)
def test_a_side_answers_or_gives_its_reason(fakes, name, status, reason):
    found = ask(Path(sys.executable), f"fake_sides.{name}", {"work": 1}, 30, fakes / "log.txt")
    assert (found.status, found.reason) == (status, reason)
    assert found.answer == ({"work": 1} if status == "measured" else None)


def test_a_side_that_takes_too_long_ends_with_all_that_it_started(fakes):
    began = time.monotonic()
    found = ask(Path(sys.executable), "fake_sides.late", str(fakes / "pid"), 2, fakes / "log.txt")
    assert (found.status, found.reason, found.answer) == ("cut off", "not done after 2 s", None)
    assert time.monotonic() - began < 20
    child = Path("/proc") / (fakes / "pid").read_text()
    for _ in range(50):
        if not child.exists() or "Z" in (child / "stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the process that the side started goes on")


def test_the_reason_is_the_error_not_what_was_said_after_it():
    assert reason_of("x\ntorch.OutOfMemoryError: 2 GiB\nsee the manual\n", 1) == "torch.OutOfMemoryError: 2 GiB"
    assert reason_of("a\nb\n", 1) == "b"


def answer(seconds=1.0, **changes):
    checks = {"loss": math.log(2), "gradient": 2.0, "tokens": 7} | changes.pop("checks", {})
    about = {"model_flops_per_step": 5e8}
    made = {"seconds": [seconds] * 3, "first_seconds": 4.0, "parameters": 5, "checks": checks, "peak_bytes": 2.0**30}
    return made | {"device": "toy", "versions": {}, "about": about} | changes


def summarised(work, mine, theirs, peak=None):
    outcomes = {"ours": [run.Outcome("measured", answer=mine)], "TRL": [run.Outcome("measured", answer=theirs)]}
    return run.summarise(work, outcomes, ROOFLINE, peak)


@pytest.mark.parametrize(
    ("work", "theirs", "said"),
    [
        (EQUAL, answer(), ""),
        (EQUAL, answer(parameters=None), ""),
        (EQUAL, answer(parameters=6), "6 parameters, ours has 5"),
        (EQUAL, answer(checks={"loss": 0.70}), "the first loss is 0.70000, not ln 2"),
        (EQUAL, answer(checks={"loss": math.nan}), "the first loss is nan, not ln 2"),
        (replace(EQUAL, precision="bfloat16", same_weights=False), answer(checks={"loss": 0.70}), ""),
        (EQUAL, answer(checks={"tokens": 8}), "8 tokens, ours 7"),
        (EQUAL, answer(checks={"gradient": 2.01}), "its gradient has a norm of 2.01, ours of 2"),
        (EQUAL, answer(checks={"gradient": math.nan}), "its gradient has a norm of nan, ours of 2"),
        (replace(EQUAL, same_weights=False), answer(checks={"gradient": 2.01}), ""),
        (DECODE, answer(checks={"tokens": [[1]]}), "other tokens from the same weights"),
    ],
)
def test_a_side_that_did_other_work_has_no_ratio(work, theirs, said):
    side = summarised(work, answer(), theirs)["sides"]["TRL"]
    assert (side["status"], side["reason"]) == (("other work", said) if said else ("measured", ""))
    assert side["ratio"] == (None if said else 1.0)


def test_our_own_first_loss_is_checked_too():
    found = summarised(EQUAL, answer(checks={"loss": 0.5}), answer())
    assert found["sides"]["ours"]["status"] == "other work"
    assert found["sides"]["TRL"]["ratio"] is None
    assert run.failures({"cases": {"dpo": found}}) == ["dpo, ours: other work: the first loss is 0.50000, not ln 2"]


def test_figures_are_those_of_the_work():
    work = replace(EQUAL, sigma=0.5, longest=8)
    found = summarised(work, answer() | {"seconds": [1.0, 1.0, 4.0]}, answer() | {"seconds": [3.0, 5.0]}, peak=1e10)
    mine, theirs = found["sides"].values()
    # The mean of unequal steps.
    assert (mine["seconds_per_step"], theirs["seconds_per_step"], theirs["ratio"]) == (2.0, 4.0, 2.0)
    assert mine["per_second"] == work.units_per_step / 2
    assert mine["mfu"] == work.flops_per_step / 2 / 1e10
    assert theirs["of_limit"] == work.flops_per_step / 4 / 1e9
    assert summarised(EQUAL, answer() | {"seconds": [1.0, 1.0, 4.0]}, answer())["sides"]["TRL"]["ratio"] == 1.0
    images = ImageDPO("cpu", {}, "float32", 3, latent=8, text=4, optimizer="adamw", repeats=1, steps=1)
    assert summarised(images, answer(), answer())["sides"]["TRL"]["of_limit"] == 0.5
    read = summarised(replace(DECODE, device="gpu"), answer(2.0), answer())["sides"]["ours"]
    assert read["of_limit"] == DECODE.bytes_read / 2 / 1e9
    assert summarised(DECODE, answer(), answer())["sides"]["ours"]["of_limit"] is None
    assert read["per_second"] == DECODE.rows * DECODE.new / 2


def test_rounds_are_joined():
    first, second = (run.Outcome("measured", answer=answer(s, peak_bytes=p, first_seconds=f)) for s, p, f in JOINED)
    made = run.summarise(EQUAL, {"ours": [first, second]}, ROOFLINE, None)["sides"]["ours"]
    assert made["seconds"] == [1.0] * 3 + [2.0] * 3
    assert (made["peak_bytes"], made["first_seconds"]) == (3.0, 9.0)
    lost = run.Outcome("cut off", "not done after 1 s")
    made = run.summarise(EQUAL, {"ours": [first], "TRL": [first, lost]}, ROOFLINE, None)["sides"]["TRL"]
    assert (made["status"], made["reason"], made["ratio"]) == ("cut off", "not done after 1 s", None)


JOINED = ((1.0, 2.0, 9.0), (2.0, 3.0, 1.0))


FAKE_SIDE = """
import json, os, sys
from pathlib import Path
told = json.loads(sys.argv[1])
name = Path(__file__).stem
with open(os.environ["ASKED"], "a") as file:
    print(name, sorted(set(told) - {"work", "folder"}), file=file)
made = json.loads(os.environ["ANSWER"])
made["seconds"] = [made["seconds"][0] * (3 if name == "trl_side" else 1)]
print("measured: " + json.dumps(made))
"""


def test_a_run_writes_its_table_and_results(tmp_path, monkeypatch, capsys):
    """Ours and a peer in turn, a peer that is absent, and a second run that adds a case to the first one's."""
    package = tmp_path / "fake_peers"
    package.mkdir()
    for name, code in (("ours", FAKE_SIDE), ("trl_side", FAKE_SIDE), ("vllm_side", FAKES["absent"])):
        (package / f"{name}.py").write_text(code)
    asked, folder = tmp_path / "asked.txt", tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ASKED", str(asked))
    monkeypatch.setenv("ANSWER", json.dumps(answer()))
    for name in run.ENVIRONMENT["cpu"]:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(run, "MODULE", "fake_peers")
    monkeypatch.setattr(run.gpu, "apart", lambda function, *arguments: ROOFLINE)
    monkeypatch.setitem(CASES, "tiny", {"a": Case(EQUAL, ("TRL", "vLLM")), "b": Case(EQUAL, ("TRL",)), **TINY})
    run.main(["--preset", "tiny", "--cases", "b", "--folder", str(folder)])
    run.main(["--preset", "tiny", "--cases", "a", "--rounds", "2", "--folder", str(folder)])
    lines = asked.read_text().splitlines()
    assert lines == ["ours []", "trl_side ['liger', 'ours']"] * 3
    results = json.loads((folder / "results.json").read_text())
    assert list(results["cases"]) == ["a", "b"]
    sides = results["cases"]["a"]["sides"]
    assert {name: side["status"] for name, side in sides.items()} == {
        "ours": "measured",
        "TRL": "measured",
        "vLLM": "not installed",
    }
    assert sides["TRL"]["ratio"] == 3.0
    assert results["cases"]["a"]["made_by"]["command"].startswith("python -m fake_peers --preset tiny --cases a")
    printed = capsys.readouterr().out
    assert "| a | TRL | 3 | 21.3 tokens | 3.00 | - |" in printed
    assert "| a | vLLM | not installed: ModuleNotFoundError: No module named 'a_peer_that_is_nowhere' |" in printed
    monkeypatch.setenv("ANSWER", json.dumps(answer(checks={"loss": 0.1})))
    with pytest.raises(SystemExit, match=r"a, ours: other work: the first loss is 0\.10000, not ln 2"):
        run.main(["--preset", "tiny", "--cases", "a", "--folder", str(folder)])
    (package / "ours.py").write_text(FAKES["fails"])
    with pytest.raises(SystemExit, match=r"a, ours: failed: ValueError: no kernel \| here"):
        run.main(["--preset", "tiny", "--cases", "a", "--folder", str(folder)])
    assert "| a | TRL | failed: not asked: our side gave nothing to compare with |" in capsys.readouterr().out


def test_every_line_of_the_table_has_its_columns():
    found = summarised(EQUAL, answer(), answer())
    failed = run.summarise(EQUAL, {"ours": [run.Outcome("failed", "a | b")]}, ROOFLINE, None)
    lines = run.table({"cases": {"right": found, "wrong": failed}}).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "failed: a \\| b" in lines[-1]


def test_unknown_cases_and_a_python_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown case 'gpt': choose among dpo-equal"):
        run.Config(cases=("gpt",))
    with pytest.raises(SystemExit, match="--peer-python nowhere is not there: `make benchmark-peers` makes"):
        run.Config(peer_python=Path("nowhere"))
    with pytest.raises(SystemExit, match="--vllm-python nowhere is not there"):
        run.main(["--vllm-python", "nowhere"])


def test_each_side_has_its_python():
    config = run.Config(peer_python=Path(sys.executable), vllm_python=Path("/bin/sh"))
    pythons = {name: str(run.python_of(name, config)) for name in ("ours", "TRL", "vLLM")}
    assert pythons == {"ours": sys.executable, "TRL": sys.executable, "vLLM": "/bin/sh"}
    assert run.python_of("vLLM", replace(config, vllm_python=None)) == config.peer_python


@pytest.mark.slow
def test_the_peers_that_are_here_do_the_same_work(tmp_path):
    """PyTorch's own sides at toy sizes; TRL and vLLM are not among what the tests install."""
    command = [sys.executable, "-m", "experiments.benchmarks.peers", "--preset", "tiny", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert {case: cases[case]["sides"]["ours"]["status"] for case in TINY} == dict.fromkeys(TINY, "measured")
    assert cases["unet"]["sides"]["diffusers"]["status"] == "measured"
    about = cases["unet"]["sides"]["ours"]["about"]
    assert about["devices"] == ours.devices(TINY["unet"].work)
    assert cases["decode"]["sides"]["transformers"]["status"] == "measured"
    for case in ("dpo", "dpo-lora", "dpo-lognormal"):
        assert cases[case]["sides"]["TRL"]["status"] in ("measured", "not installed")


@pytest.mark.docs
def test_the_pages_quote_the_committed_run():
    """The table of docs/performance.md; the README's line, in which each ratio is followed by its case."""
    results = json.loads((ROOT / "docs/benchmarks/peers_cpu.json").read_text())
    cases = results["cases"]
    assert list(cases) == [name for name in CASES["cpu"] if name in cases]
    assert run.failures(results) == []
    assert run.table(results) in (ROOT / "docs/performance.md").read_text()
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if "peers_cpu.json" in line]
    quoted = re.findall(r"(\d+\.\d\d) \(([\w-]+)\)", line)
    ratios = {
        name: [f"{side['ratio']:.2f}" for side in case["sides"].values() if side.get("ratio")]
        for name, case in cases.items()
    }
    assert {"dpo-equal", "unet", "decode"} <= {name for _, name in quoted}
    for ratio, name in quoted:
        assert ratio in ratios[name], name
    assert {case["made_by"]["date"] for case in cases.values()} <= set(re.findall(r"\d{4}-\d\d-\d\d", line))
