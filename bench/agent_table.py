"""The README's table and figure of an agent's context: several `still sweep --agent` folders as one.

    python bench/agent_table.py results/agent results/agent-equal

Each condition at each share of relevance comes from the folder in which most of its matters were played. A sweep may
have been stopped: what it finished counts, and the column `matters` says how much that is.
Rows go to bench/rows/agent.csv, the figure to bench/figures/agent_pass_rate.png; the table is printed for a README.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shapes import ROWS

from still.harness.agent_cells import AgentStore
from still.harness.agent_figures import draw_agent
from still.harness.agent_table import agent_rows
from still.harness.figures import save
from still.harness.report import to_csv


def main() -> int:
    """Merge, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--least", type=int, default=5, help="matters of a condition that is shown (default: 5)")
    parser.add_argument("--rows", type=Path, default=ROWS / "agent.csv")
    parser.add_argument("--figure", type=Path, default=ROWS.parent / "figures" / "agent_pass_rate.png")
    args = parser.parse_args()
    best: dict[tuple[str, str, str], dict] = {}
    for folder in args.folders:
        store = AgentStore.open(folder)
        for row in agent_rows(store.results(), store.header):
            key = row["task"], row["condition"], row["budget"]
            if row["matters"] >= args.least and (key not in best or row["matters"] > best[key]["matters"]):
                best[key] = row
    tasks = list(dict.fromkeys(task for task, *_ in best))
    rows = sorted(best.values(), key=lambda row: tasks.index(row["task"]))
    args.rows.write_text(to_csv(rows), encoding="utf-8")
    save(draw_agent(rows)["pass_rate"], args.figure.with_suffix(""))[1].unlink()  # the README shows the PNG
    budgets = sorted({row["budget"] for row in rows if row["budget"]}, key=lambda budget: (len(budget), budget))
    columns = [(task, budget) for task in tasks for budget in budgets]
    print("| criterion pass, % (all-pass; matters if not all) |", " | ".join(" ".join(each) for each in columns), "|")
    most = max(row["matters"] for row in rows)
    for name in dict.fromkeys(condition for _, condition, _ in best):
        cells = []
        for task, budget in columns:
            row = best.get((task, name, budget)) or best.get((task, name, ""))
            few = "" if row is None or row["matters"] == most else f"; {row['matters']}"
            cells.append("" if row is None else f"{100 * row['pass_rate']:.1f} ({100 * row['all_pass']:.0f}{few})")
        print(f"| {name} |", " | ".join(cells), "|")
    widest = max(max(row["pass_high"] - row["pass_rate"], row["pass_rate"] - row["pass_low"]) for row in rows)
    print(f"{len(rows)} conditions, intervals up to {100 * widest:.0f} points either way; {args.rows}, {args.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
