"""Figures and warnings that tell an alignment that goes wrong from one that goes well."""

from collections.abc import Iterator, Mapping

NODE_MARGIN, NODE_SHARE = "rewards/margins/", "margin_share/"
# A node with more of the margin learns alone.
DOMINANT = 0.95
# Rows in a row for which something must hold before it is said.
ROWS = 10


def margin_shares(row: Mapping[str, float]) -> dict[str, float]:
    """margin_share/<node> = |m_k| / sum_j |m_j| of the mean margins rewards/margins/<node>; {} where all are 0."""
    margins = {name.removeprefix(NODE_MARGIN): abs(x) for name, x in row.items() if name.startswith(NODE_MARGIN)}
    total = sum(margins.values())
    return {f"{NODE_SHARE}{name}": margin / total for name, margin in margins.items()} if total > 0 else {}


class Watch:
    """Looks at the rows of a run, one after the other, and warns once of each thing."""

    def __init__(self) -> None:
        self._lasted: dict[str, int] = {}

    def see(self, step: int, row: Mapping[str, float]) -> Iterator[str]:
        """The warnings that the row of a step gives rise to."""
        shares = {name.removeprefix(NODE_SHARE): x for name, x in row.items() if name.startswith(NODE_SHARE)}
        for node, share in shares.items():
            if self._lasts(f"share {node}", len(shares) > 1 and share > DOMINANT):
                yield (
                    f"step {step}: for {ROWS} rows node {node!r} has carried more than {DOMINANT:.0%} of the margin,"
                    " so that the others hardly learn: lower its weight, or raise theirs"
                )
        if self._lasts("falling", row.get("rewards/chosen", 0.0) < 0):
            yield (
                f"step {step}: for {ROWS} rows the chosen runs have been less likely than under the reference, as the "
                "rejected ones are: raise beta, lower the learning rate, or add an sft term"
            )

    def _lasts(self, what: str, now: bool) -> bool:
        """Whether it has held for exactly `ROWS` rows, for the first time."""
        before = self._lasted.get(what, 0)
        if before >= ROWS:
            return False
        self._lasted[what] = before + 1 if now else 0
        return self._lasted[what] == ROWS
