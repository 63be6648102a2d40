"""What became of every span of the traces, in words."""

from collections import Counter
from collections.abc import Mapping, Sequence

from sysdpo_jax.traces.spans import VALUES
from sysdpo_jax.traces.tokens import Tokens
from sysdpo_jax.traces.trees import Ledger


def report_text(ledger: Ledger, notes: Sequence[str], tokens: Mapping[str, Tokens]) -> str:
    """A line for every name, kind and fate of spans, then notes and what is known of tokens."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for key, span in ledger.spans.items():
        rows[span.kind or "(no kind)", span.name, ledger.fate(key)] += 1
    lines = [f"{kind} {name}: {count} spans, {fate}" for (kind, name, fate), count in sorted(rows.items())]
    lines += [summary(ledger), *notes, *(f"{what}: {count}" for what, count in ledger.notes.items())]
    lines += [f"tokens of {name}: {counted}" for name, counted in tokens.items()]
    return "\n".join([*lines, ""])


def summary(ledger: Ledger) -> str:
    """How many spans of models, retrievers and tools became values, and how many did not."""
    keys = [key for key, span in ledger.spans.items() if span.kind in VALUES]
    refused = sum(ledger.fate(key).startswith("refused") for key in keys)
    every = f"{len(keys)} spans of models, retrievers and tools"
    return f"{every}: {len(keys) - refused} mapped, {refused} refused by name"
