"""Running a system: whole runs, and the values of tools that records lack, row by row and turn by turn."""

from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.control import Switch, Turns
from sysdpo_jax.components.remote import RemoteModel
from sysdpo_jax.components.tool import NotCalledError, ToolError, raise_first
from sysdpo_jax.control_flow import Flow, ends, fault_of_end, fault_of_turns
from sysdpo_jax.keys import named_key, row_keys
from sysdpo_jax.nodes import Node, naming, users_part
from sysdpo_jax.structure import Graph, as_plate, by_rank, grouped, instead_of_plate
from sysdpo_jax.typing import Keys, Params, Parents, Record
from sysdpo_jax.values import Unequal, content_or_unequal

# What tools gave, by node and parents' values.
Known: TypeAlias = MutableMapping[tuple[str, Hashable], Any]
# A row of a call: its values, why it has none, or nothing where none are wanted.
Run: TypeAlias = dict[str, Any] | ToolError | None


class Running(Graph):
    """What a `CompoundSystem` does with values, as against features."""

    def complete(self, records: Sequence[Record], nodes: Sequence[str], known: Known | None = None) -> list[Any]:
        """Fill in the values that records lack of tools and switches which these nodes depend on, directly or not.

        A tool is called once for equal parents, so that tools whose values are not recorded must be deterministic. Of
        nodes that do not run in a record it may hold None, which is left out.

        Args:
            records: `{name: value}` each.
            nodes: Names of nodes.
            known: What tools gave in earlier calls, which is not asked for again; what they give in this one is added.

        Returns:
            A record for each or, where a tool failed, the `ToolError`.

        Raises:
            RecordError: Naming the row and the node, for another value that is missing, a plate of the wrong length,
                turns that their loop cannot make, or the value of a node that does not run in that record.
        """
        made: list[Run] = [dict(record) for record in records]
        for row, record in enumerate(records):
            _require(record, self.inputs, f"record {row}", "input")
        self._complete(self.flow, self.with_ancestors(nodes), made, {} if known is None else known, "")
        return made

    def sample(self, params: Params, inputs: Sequence[Record], key: PRNGKeyArray) -> list[dict[str, Any]]:
        """Run the whole system once for each row of inputs.

        Args:
            params: `{params_key: tree}`.
            inputs: `{name: value}` each, of the system's inputs at least.
            key: Of which every node gets a part by its name.

        Returns:
            Records with the inputs and the value of every node.

        Raises:
            ToolError: Naming row and node where a tool fails, whatever its on_error.
        """
        runs = self.attempt(params, inputs, key)
        raise_first(runs, "row")
        return runs

    def attempt(self, params: Params, inputs: Sequence[Record | None], key: PRNGKeyArray) -> list[Any]:
        """`sample` that keeps what it can.

        Args:
            params: `{params_key: tree}`.
            inputs: As for `sample`. A row that is None keeps the size of a batch, and with it the draws of the others,
                as they would be with a row there. No tool is called for it.
            key: As for `sample`.

        Returns:
            For each row the run or, where a tool failed, the `ToolError`; None for None.
        """
        self.check_params(params)
        runs: list[Run] = [record if record is None else dict(record) for record in inputs]
        for row, run in _alive(runs).items():
            _require(run, self.inputs, f"record {row}", "input")
            runs[row] = {name: run[name] for name in self.inputs}
        self._run(self.flow, self.recorded, params, runs, key)
        return runs

    def sample_node(self, node: Node, params: Params, columns: Mapping[str, Sequence[Any]], key: Keys) -> list[Any]:
        """Sample one generative node.

        Args:
            node: One of the system.
            params: `{params_key: tree}`.
            columns: `{name: values}`, which hold at least the node's parents.
            key: The node's own: one for all rows or, where it does not run in every row, one a row.

        Returns:
            A value for every row or, where a remote model failed, the `ToolError`, which names the node.

        Raises:
            RecordError: Naming the node.
        """
        rows = self._rows(node, columns)
        if node.plate is not None and key.ndim:
            key = jax.vmap(row_keys, in_axes=(0, None))(key, node.plate).reshape(-1)
        with naming(node), users_part(node, "sample", RecordError):
            if isinstance(node.component, RemoteModel):
                made = node.component.outcomes(rows, key)
            else:
                made = node.component.sample(node.tree(params), rows, key)
            wanted = len(next(iter(rows.values())))
            if len(made) != wanted:
                raise RecordError(f"sample returned {len(made)} values for {wanted} rows: return one for each")
        return _by_record(node, made)

    def tool_values(self, node: Node, columns: Mapping[str, Sequence[Any]], known: Known | None = None) -> list[Any]:
        """Call a node's tool.

        Args:
            node: One of the system.
            columns: `{name: values}`, which hold at least the node's parents.
            known: Where it is given, the tool is called once for equal parents, and not at all for those in it.

        Returns:
            A value for every row or, where the tool failed, the `ToolError`, which names the node.
        """
        parents = {name: columns[name] for name in node.parents}
        if known is None:
            return self._call(node, parents)
        keys = [(node.name, content_or_unequal(values)) for values in zip(*parents.values(), strict=True)]
        first = {key: row for row, key in reversed([*enumerate(keys)])}
        # In the order of the rows, the first of which to fail may stop the others.
        new = {key: first[key] for key in keys if key not in known}
        asked = {name: [column[row] for row in new.values()] for name, column in parents.items()}
        answers = dict(zip(new, self._call(node, asked), strict=True)) if new else {}
        for key, value in answers.items():
            if not isinstance(value, NotCalledError) and not isinstance(key[1], Unequal):
                known[key] = value
        return [known[key] if key in known else answers[key] for key in keys]

    def given_values(self, node: Node, rows: Sequence[Record], known: Known | None = None) -> list[Any]:
        """What a tool or a switch gives.

        Args:
            node: One of the system.
            rows: In which it runs, with the values that it reads.
            known: As for `tool_values`.

        Returns:
            A value for every row or, where the tool failed, the `ToolError`, which names the node.
        """
        if not isinstance(node.component, Switch):
            return self.tool_values(node, columns_of(rows, node.parents), known)
        flow = self.flow if node.loop is None else self.bodies[node.loop]
        return [row[flow.chosen(node.name, row)] for row in rows]

    def node_candidates(
        self, node: Node, params: Params, columns: Mapping[str, Sequence[Any]], number: int, key: PRNGKeyArray
    ) -> list[list[Any]]:
        """Find distinct likely values of one generative node, see `Component.candidates`.

        Args:
            node: One of the system.
            params: `{params_key: tree}`.
            columns: `{name: values}`, which hold at least the node's parents.
            number: How many are wanted.
            key: Of the whole run.

        Returns:
            From 1 to `number` values for every row. Of a plate those combinations of the copies' candidates whose ranks
            have the smallest sums.

        Raises:
            RecordError: Naming the node.
        """
        rows = self._rows(node, columns)
        with naming(node), users_part(node, "candidates", RecordError):
            flat = node.component.candidates(node.tree(params), rows, number, named_key(key, node.name))
        if node.plate is None:
            return flat
        plates = grouped(flat, node.plate)
        return [
            [[c[i] for c, i in zip(copies, ranks, strict=True)] for ranks in by_rank([*map(len, copies)], number)]
            for copies in plates
        ]

    def _complete(self, flow: Flow, nodes: Sequence[Node], made: list[Run], known: Known, where: str) -> None:
        """Complete `made` with the values of these nodes of a scope. where: behind a record's number in errors."""
        for node in nodes:
            _end_without_case(flow, node, made)
            for row, run in _alive(made).items() if node.name in flow.conditional else ():
                if not flow.runs(node.name, run) and run.pop(node.name, None) is not None:
                    raise RecordError(
                        f"record {row}{where}: node {node.name!r} has a value, but what chooses among the branches "
                        "leaves it out: leave the value out too"
                    )
            running = _running(flow, node, made)
            if node.name in self.bodies:
                self._complete_turns(node, made, running, known)
                continue
            lacking = [row for row, run in running.items() if node.deterministic and node.name not in run]
            if lacking:
                values = self.given_values(node, [running[row] for row in lacking], known)
                _take(node, made, dict(zip(lacking, values, strict=True)))
            for row, run in _running(flow, node, made).items():
                _require(run, (node.name,), f"record {row}{where}", "node")
                instead = None if node.plate is None else instead_of_plate(run[node.name], node.plate)
                if instead is not None:
                    raise RecordError(
                        f"record {row}{where}: node {node.name!r} is a plate of {node.plate}, got {instead}"
                    )

    def _complete_turns(self, loop: Node, made: list[Run], running: Mapping[int, dict[str, Any]], known: Known) -> None:
        names, component = [node.name for node in self.bodies[loop.name].nodes], loop.component
        assert isinstance(component, Turns)
        for row, run in running.items():
            _require(run, (loop.name,), f"record {row}", "node")
            fault = fault_of_turns(run[loop.name], names, component.turns)
            if fault is not None:
                raise RecordError(f"record {row}: node {loop.name!r} {fault}")
        done: dict[int, list[dict[str, Any]]] = {row: [] for row in running}
        for turn in range(component.turns):
            views: list[Run] = [None] * len(made)
            for row, run in running.items():
                if turn < len(run[loop.name]) and isinstance(made[row], dict):
                    views[row] = {**run, **run[loop.name][turn], loop.name: list(done[row])}
            where = f", turn {turn + 1} of {loop.name!r}"
            self._complete(self.bodies[loop.name], self.bodies[loop.name].nodes, views, known, where)
            for row, view in enumerate(views):
                ended: Any = view
                if isinstance(view, dict):
                    done[row].append({name: view[name] for name in names if name in view})
                    ended = ends(component, done[row][-1])
                if isinstance(ended, ToolError):
                    made[row] = ended.at(f"turn {turn + 1} of {loop.name!r}")
                elif view is not None:
                    fault = fault_of_end(component, turn + 1, len(running[row][loop.name]), ended)
                    if fault is not None:
                        raise RecordError(f"record {row}: node {loop.name!r} {fault}")
        _take(loop, made, {row: done[row] for row in running if isinstance(made[row], dict)})

    def _run(self, flow: Flow, nodes: Sequence[Node], params: Params, runs: list[Run], key: PRNGKeyArray) -> None:
        """Add the values of these nodes of a scope to `runs`, whose rows have what they depend on.

        What a row draws where a node does not run in every row depends on the key and the row's number alone.
        """
        for node in nodes:
            _end_without_case(flow, node, runs)
            running, own = _running(flow, node, runs), named_key(key, node.name)
            if not running:
                continue
            rows = list(running)
            if node.name in self.bodies:
                _take(node, runs, self._run_turns(node, params, runs, running, own))
                continue
            if node.deterministic:
                values = self.given_values(node, list(running.values()))
            elif self.is_routed(node) or node.component.row_by_row:
                keys = row_keys(own, len(runs))[np.array(rows)]
                values = self.sample_node(node, params, columns_of(list(running.values()), node.parents), keys)
            else:
                # The last run stands in for those without one, whose draws are thrown away.
                every = [running.get(row, running[rows[-1]]) for row in range(len(runs))]
                drawn = self.sample_node(node, params, columns_of(every, node.parents), own)
                values = [drawn[row] for row in rows]
            _take(node, runs, dict(zip(rows, values, strict=True)))

    def _run_turns(
        self, loop: Node, params: Params, runs: Sequence[Run], running: Mapping[int, dict[str, Any]], key: PRNGKeyArray
    ) -> dict[int, Any]:
        """The turns of every row in which the loop runs, or the `ToolError` that ends the row."""
        body, component = self.bodies[loop.name], loop.component
        assert isinstance(component, Turns)
        turns: dict[int, Any] = {row: [] for row in running}
        going = list(running)
        for number in range(component.turns):
            views: list[Run] = [None] * len(runs)
            for row in going:
                views[row] = {**running[row], loop.name: list(turns[row])}
            self._run(body, body.nodes, params, views, jax.random.fold_in(key, number))
            still = []
            for row in going:
                view = views[row]
                ended: Any = view
                if isinstance(view, dict):
                    turn = {node.name: view[node.name] for node in body.nodes if node.name in view}
                    turns[row].append(turn)
                    ended = ends(component, turn)
                if isinstance(ended, ToolError):
                    turns[row] = ended.at(f"turn {number + 1} of {loop.name!r}")
                elif not ended:
                    still.append(row)
            going = still
        return turns

    def _call(self, node: Node, parents: Parents) -> list[Any]:
        """What the tool of a node gives for every row, or the `ToolError`; of a plate all the copies' values."""
        tool: Any = node.component
        if node.plate is None or any(self._is_plate(name) for name in node.parents):
            return _by_record(node, tool.outcomes(self._rows(node, parents)))
        made = [as_plate(value, tool, node.plate) for value in tool.outcomes(parents)]
        return [x.at(f"node {node.name!r}") if isinstance(x, ToolError) else x for x in made]

    def _rows(self, node: Node, columns: Parents) -> dict[str, Sequence[Any]]:
        """The parents' values, one row a copy: plates give each copy its element, others the same value to all."""
        copies = node.plate
        if copies is None:
            return {name: columns[name] for name in node.parents}
        spread = lambda name, v: v if self._is_plate(name) else [v] * copies  # noqa: E731
        return {name: [x for value in columns[name] for x in spread(name, value)] for name in node.parents}

    def _is_plate(self, name: str) -> bool:
        return name not in self.inputs and self.node(name).plate is not None


def _end_without_case(flow: Flow, node: Node, runs: list[Run]) -> None:
    """Put the `ToolError` in the place of rows in which nobody can tell whether a node runs, or which branch it is."""
    if not (node.name in flow.conditional or isinstance(node.component, Switch)):
        return
    for row, run in _alive(runs).items():
        try:
            if flow.runs(node.name, run) and isinstance(node.component, Switch):
                flow.chosen(node.name, run)
        except ToolError as error:
            runs[row] = error


def _running(flow: Flow, node: Node, runs: Sequence[Run]) -> dict[int, dict[str, Any]]:
    """The rows in which a node runs, by their numbers."""
    return {row: run for row, run in _alive(runs).items() if flow.runs(node.name, run)}


def _alive(runs: Sequence[Run]) -> dict[int, dict[str, Any]]:
    """The rows that have values, and neither nothing nor a `ToolError`."""
    return {row: run for row, run in enumerate(runs) if isinstance(run, dict)}


def _by_record(node: Node, made: Sequence[Any]) -> list[Any]:
    """The values of a node's rows, of a plate a list for each record; or the `ToolError`, which names the node."""
    copies = [[value] for value in made] if node.plate is None else grouped(made, node.plate)
    # One copy without a value leaves the run without one.
    failed = [next((x.at(f"node {node.name!r}") for x in row if isinstance(x, ToolError)), None) for row in copies]
    whole = made if node.plate is None else copies
    return [value if error is None else error for value, error in zip(whole, failed, strict=True)]


def _take(node: Node, runs: list[Run], values: Mapping[int, Any]) -> None:
    """Add a node's values to their rows; a `ToolError` takes the row's place."""
    for row, value in values.items():
        own = runs[row]
        assert isinstance(own, dict)
        runs[row] = value if isinstance(value, ToolError) else own | {node.name: value}


def _require(record: Record, names: Sequence[str], place: str, kind: str) -> None:
    for name in names:
        if name not in record:
            raise RecordError(
                f"{place} lacks a value for the {kind} {name!r} (it has {', '.join(record) or 'nothing'}): "
                "add the field or take the name out of the system"
            )


def columns_of(rows: Sequence[Record], names: Sequence[str]) -> dict[str, list[Any]]:
    """The values of these names in all rows."""
    return {name: [row[name] for row in rows] for name in names}
