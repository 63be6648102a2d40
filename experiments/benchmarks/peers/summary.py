"""Whether two sides did the same work, what their times say, and the table of it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.benchmarks.peers.cases import OURS
from experiments.benchmarks.peers.processes import Outcome
from experiments.benchmarks.peers.work import Decode, ImageDPO, Precision, TextDPO, Work, as_json

LN_2 = math.log(2.0)
# Of the first loss, where policy and reference are one model: a compiler may round them differently, in bfloat16 by
# some 0.1 nats over a row of hundreds of tokens, in float32 by 1e-4 of what a U-Net's weighted errors sum up to.
LOSS_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.03}
# Of norms in float32, relative: sums of millions of rounded terms, in another order.
NORM_TOLERANCE = 1e-3
HEADER = ("case", "side", "seconds", "per second", "peer / ours", "MFU", "of the limit", "peak GiB", "first step, s")
ABSENT = "-"


def other_work(work: Work, ours: Mapping[str, Any], side: Mapping[str, Any]) -> str:
    """What the side did otherwise than ours, "" where nothing. Both are answers; ours may be compared with itself."""
    checks, wanted = side["checks"], ours["checks"]
    if side["parameters"] is not None and side["parameters"] != ours["parameters"]:
        return f"{side['parameters']} parameters, ours has {ours['parameters']}"
    if "loss" in checks and not abs(checks["loss"] - LN_2) <= LOSS_TOLERANCE[work.precision]:
        return f"the first loss is {checks['loss']:.5f}, not ln 2"
    if "tokens" in checks and checks["tokens"] != wanted["tokens"]:
        shown = f"{checks['tokens']} tokens, ours {wanted['tokens']}"
        return "other tokens from the same weights" if isinstance(work, Decode) else shown
    if "shape" in checks and checks["shape"] != wanted["shape"]:
        return f"continuations of the shape {checks['shape']}, ours {wanted['shape']}"
    comparable = ("probe", "gradient") if getattr(work, "same_weights", True) else ("probe",)
    for name in comparable:
        if name in checks and not math.isclose(checks[name], wanted[name], rel_tol=NORM_TOLERANCE):
            return f"its {name} has a norm of {checks[name]:.6g}, ours of {wanted[name]:.6g}"
    return ""


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of a side's rounds: the first that was not measured, else all their times together."""
    for outcome in outcomes:
        if outcome.answer is None:
            return outcome
    answers = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    peaks = [answer["peak_bytes"] for answer in answers if answer["peak_bytes"] is not None]
    # The first round's first step compiles; later rounds find what was kept.
    whole = {
        "seconds": [each for answer in answers for each in answer["seconds"]],
        "peak_bytes": max(peaks, default=None),
    }
    return replace(outcomes[0], answer={**answers[0], **whole})


def seconds_per_step(work: Work, seconds: Sequence[float]) -> float:
    """The median; the mean where steps differ in size and an epoch is the measure."""
    return statistics.fmean(seconds) if isinstance(work, TextDPO) and work.sigma else statistics.median(seconds)


def summarise(
    work: Work, outcomes: Mapping[str, Sequence[Outcome]], roofline: Mapping[str, Any], peak: float | None
) -> dict[str, Any]:
    """What results.json has of a case: the work, and each side's figures or the reason why there are none.

    peak: FLOP/s of the device's data sheet, None where nobody knows it.
    """
    found = {name: joined(rounds) for name, rounds in outcomes.items()}
    ours = found[OURS].answer
    for name, outcome in found.items():
        said = other_work(work, ours, outcome.answer) if ours is not None and outcome.answer is not None else ""
        if said:
            found[name] = replace(outcome, status="other work", reason=said)
    sides: dict[str, dict[str, Any]] = {
        name: {"status": each.status, "reason": each.reason} for name, each in found.items()
    }
    for name, outcome in found.items():
        if outcome.answer is not None:
            sides[name] |= {**outcome.answer, **_figures(work, outcome.answer, ours or {}, roofline, peak)}
    for name in (name for name in sides if name != OURS):
        both = [found[OURS].status, found[name].status] == ["measured"] * 2
        sides[name]["ratio"] = sides[name]["seconds_per_step"] / sides[OURS]["seconds_per_step"] if both else None
    return {"work": as_json(work), "roofline": dict(roofline), "sides": sides}


def _figures(
    work: Work, answer: Mapping[str, Any], ours: Mapping[str, Any], roofline: Mapping[str, Any], peak: float | None
) -> dict[str, Any]:
    """Speed, and its share of what the device could do at most."""
    step = seconds_per_step(work, answer["seconds"])
    figures = {"seconds_per_step": step, "per_second": work.units_per_step / step, "unit": work.unit, "mfu": None}
    match work:
        case Decode():
            # On a CPU a large copy takes as long as the operating system needs to find its pages: it is no limit.
            read = work.bytes_read / step / roofline["copy_bytes_per_second"]
            return figures | {"of_limit": read if work.device == "gpu" else None}
        case TextDPO():
            flops = work.flops_per_step
        case ImageDPO():
            flops = ours["about"]["model_flops_per_step"]
    rate = flops / step
    return figures | {
        "model_flops_per_step": flops,
        "mfu": None if peak is None else rate / peak,
        "of_limit": rate / roofline["matmul_flops_per_second"],
    }


def table(results: Mapping[str, Any]) -> str:
    """GitHub's Markdown of `{"cases": {name: what summarise made}}`, a line a side."""
    lines = [_line(HEADER), _line(["---", "---"] + ["---:"] * (len(HEADER) - 2))]
    for name, case in results["cases"].items():
        for side, figures in case["sides"].items():
            lines.append(_line([name, side, *_cells(side, figures)]))
    return "\n".join(lines)


def _cells(side: str, figures: Mapping[str, Any]) -> list[str]:
    if figures["status"] != "measured":
        return [f"{figures['status']}: {figures['reason']}".replace("|", "\\|"), *[""] * (len(HEADER) - 3)]
    rate, peak = figures["per_second"], figures["peak_bytes"]
    return [
        f"{figures['seconds_per_step']:.3g}",
        f"{rate:.3g} {figures['unit']}" if rate < 1000 else f"{rate:,.0f} {figures['unit']}",
        "" if side == OURS else f"{figures['ratio']:.2f}" if figures["ratio"] else ABSENT,
        ABSENT if figures["mfu"] is None else f"{figures['mfu']:.1%}",
        ABSENT if figures["of_limit"] is None else f"{figures['of_limit']:.1%}",
        ABSENT if peak is None else f"{peak / 2**30:.2f}",
        f"{figures['first_seconds']:.1f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def failures(results: Mapping[str, Any]) -> list[str]:
    """What may not be: our side without figures, and a side that did other work."""
    return [
        f"{name}, {side}: {figures['status']}: {figures['reason']}"
        for name, case in results["cases"].items()
        for side, figures in case["sides"].items()
        if figures["status"] == "other work" or (side == OURS and figures["status"] != "measured")
    ]
