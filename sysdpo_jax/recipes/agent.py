"""The program of sysdpo_jax/recipes/agent.yaml: an agent that looks chemical elements up in a database by SQL.

    question -> conversation -> [ action (language model) -> seen (what the database answers) ], up to three turns

Nothing here knows of the alignment: how the agent is asked, its tool, when it is done, and whether it is right.
docs/programs/agent.md leads through it.
"""

import csv
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Number, symbol, name and standard atomic weight, or the mass number of what has none, of hydrogen to uranium.
ELEMENTS = Path(__file__).with_name("elements.csv")
EXAMPLES = (
    ("user", "Which element has the number 3?"),
    ("assistant", "SELECT name FROM elements WHERE number = 3"),
    ("user", "Result: lithium"),
    ("assistant", "It is lithium."),
    ("user", "What is the mass of gold?"),
    ("assistant", "SELECT mass FROM elements WHERE name = 'gold'"),
    ("user", "Result: 196.97"),
    ("assistant", "It is 196.97."),
)
# A query may do no more than read.
READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
# Steps of SQLite's machine after which a query is given up, a fraction of a second; rows and letters of an answer.
STEPS, ROWS, LETTERS = 100_000, 3, 40
ASKED = (
    (re.compile(r"What is the (number|mass|symbol) of (\w+)\?"), "SELECT {} FROM elements WHERE name = ?"),
    (re.compile(r"Which element has the (number|symbol) (\w+)\?"), "SELECT name FROM elements WHERE {} = ?"),
)


def conversation(question: str) -> list[dict[str, str]]:
    """What the agent is told: the table, two examples and the question."""
    said = (("system", "Table: elements(number, symbol, name, mass)"), *EXAMPLES, ("user", question))
    return [{"role": role, "content": content} for role, content in said]


def look_up(text: str) -> str:
    """What the database answers to the query in the agent's text; "" where there is none."""
    query = re.search("SELECT.*", text)
    return f"Result: {rows_of(query[0])}" if query else ""


def finished(turn: Mapping[str, Any]) -> bool:
    """Whether the agent asked for nothing."""
    return turn["seen"] == ""


def right(run: Mapping[str, Any]) -> float:
    """1 for an agent whose last text holds the answer and asks for nothing, else 0. run: of the whole system."""
    last = run["agent"][-1]
    words = re.findall(r"[\w.]*\w", last["action"].lower())
    return float(finished(last) and answer(run["question"]).lower() in words)


def looked_up(run: Mapping[str, Any]) -> float:
    """1 for an agent that asked the database at all, else 0."""
    return float(not finished(run["agent"][0]))


def rows_of(query: str) -> str:
    """The first rows, or what is wrong with the query."""
    connection = database()
    rest = iter(range(STEPS // 1000))
    connection.set_progress_handler(lambda: next(rest, None) is None, 1000)
    try:
        rows = connection.execute(query).fetchmany(ROWS)
    except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
        return f"error: {error}"[:LETTERS]
    finally:
        connection.close()
    return "; ".join(", ".join(map(str, row)) for row in rows)[:LETTERS] or "nothing found"


def database() -> sqlite3.Connection:
    """The elements in a table that can only be read, anew for each query, so that threads share nothing."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE elements (number INTEGER, symbol TEXT, name TEXT, mass REAL)")
    with ELEMENTS.open(encoding="utf-8", newline="") as file:
        connection.executemany("INSERT INTO elements VALUES (:number, :symbol, :name, :mass)", csv.DictReader(file))
    connection.commit()
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READS else sqlite3.SQLITE_DENY)
    return connection


def answer(question: str) -> str:
    """What is right. Raises `ValueError` for a question of another form, or of what is not in the table."""
    for asked, query in ASKED:
        found = asked.fullmatch(question)
        rows = database().execute(query.format(found[1]), (found[2],)).fetchall() if found else []
        if rows:
            return str(rows[0][0])
    raise ValueError(f"there is no answer to {question!r}")
