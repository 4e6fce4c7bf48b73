"""How often the comparison after a move is wrong: losses of many kinds, simulated; the tables of docs/watching.md.

python -m benchmarks.false_alarms --runs 300 --seed 7
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from statistics import median

from gpumove.parity.usual import Rise, usual
from gpumove.parity.watch import LOSS_ABOVE

Model = Callable[[random.Random, int], list[float]]
SOURCES, SHIFTS, WATCH = (64, 128, 512, 768), (0.02, 0.05, 0.1, 0.3, 2.0), 200


def around(curve: Callable[[int], float], spread: float) -> Model:
    """White noise around a curve."""
    return lambda chance, rows: [curve(row) + spread * chance.gauss(0, 1) for row in range(rows)]


def heavy(spread: float, degrees: float) -> Model:
    """Student's t: of two degrees of freedom and fewer its variance is infinite."""

    def rows_of(chance: random.Random, rows: int) -> list[float]:
        scales = [math.sqrt(chance.gammavariate(degrees / 2, 2) / degrees) for _ in range(rows)]
        return [1 + spread * chance.gauss(0, 1) / scale for scale in scales]

    return rows_of


def correlated(spread: float, memory: float, *, apart: float = 0.0) -> Model:
    """A state that remembers (1: a random walk), and white noise on top of it."""

    def rows_of(chance: random.Random, rows: int) -> list[float]:
        steady = math.sqrt(1 - memory**2) if memory < 1 else 1.0
        state, found = chance.gauss(0, 1) * spread if memory < 1 else 0.0, []
        for _ in range(rows):
            state = memory * state + spread * steady * chance.gauss(0, 1)
            found.append(1 + state + apart * chance.gauss(0, 1))
        return found

    return rows_of


def swinging(height: float, period: int, spread: float) -> Model:
    """A wave that begins anywhere."""

    def rows_of(chance: random.Random, rows: int) -> list[float]:
        first = chance.random() * period
        wave = [1 + height * math.sin(2 * math.pi * (row + first) / period) for row in range(rows)]
        return [value + spread * chance.gauss(0, 1) for value in wave]

    return rows_of


def spiky(every: float, length: float, spread: float) -> Model:
    """The loss doubles now and then, and comes down again."""

    def rows_of(chance: random.Random, rows: int) -> list[float]:
        found = [1 + spread * chance.gauss(0, 1) for _ in range(rows)]
        for row in range(rows):
            if chance.random() < 1 / every:
                for after in range(min(int(3 * length), rows - row)):
                    found[row + after] += math.exp(-after / length)
        return found

    return rows_of


MODELS: dict[str, Model] = {
    "white, 0.5 % of the loss": around(lambda row: 1.0, 0.005),
    "white, 3 %": around(lambda row: 1.0, 0.03),
    "white, 15 %": around(lambda row: 1.0, 0.15),
    "heavy tails (Student's t, 2 degrees of freedom), 3 %": heavy(0.03, 2),
    "skewed (lognormal, 0.3)": lambda chance, rows: [math.exp(0.3 * chance.gauss(0, 1)) for _ in range(rows)],
    "correlated over 10 steps, 3 %": correlated(0.03, 0.9),
    "correlated over 50 steps, 3 %": correlated(0.03, 0.98),
    "falling to a third within some hundred steps, white, 3 %": around(lambda row: 1 + 2 * math.exp(-row / 300), 0.03),
    "falling slowly, white, 3 %": around(lambda row: 1 + 2 * math.exp(-row / 2000), 0.03),
    "rising by 0.02 % a step, white, 3 %": around(lambda row: 1 + 2e-4 * row, 0.03),
    "swinging by 3 % over 50 steps": swinging(0.03, 50, 0.01),
    "swinging by 3 % over 400 steps": swinging(0.03, 400, 0.01),
    "a step down every 150 steps": around(lambda row: 1 - 0.05 * (row // 150), 0.03),
    "a random walk of 0.1 % a step, white, 2 %": correlated(0.001, 1.0, apart=0.02),
    "a random walk of 0.4 % a step, white, 2 %": correlated(0.004, 1.0, apart=0.02),
    "a spike to the double every 100 steps, 3 steps long (decay)": spiky(100, 3, 0.02),
    "the same, 10 steps long": spiky(100, 10, 0.02),
    "every 500 steps, 15 steps long": spiky(500, 15, 0.02),
}


def told_after(model: Model, chance: random.Random, rows: int, shift: float = 0.0) -> int | None:
    """After how many steps a rise is told, if it is."""
    drawn = model(chance, rows + WATCH)
    before = usual(drawn[:rows])
    assert before is not None
    rise = Rise(before, floor=LOSS_ABOVE)
    return next((n for n, value in enumerate(drawn[rows:], 1) if rise.add(value * (1 + shift)) is not None), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="of each kind and length; a fifth of that for real rises")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    print("| source of | " + " | ".join(f"{rows} steps" for rows in SOURCES) + " |\n" + "|---" * 5 + "|")
    for name, model in MODELS.items():
        told = [sum(told_after(model, chance, n) is not None for _ in range(args.runs)) for n in SOURCES]
        print(f"| {name} | " + " | ".join(f"{100 * found / args.runs:.1f}" for found in told) + " |", flush=True)
    print("\n| higher by | " + " | ".join(f"{shift:.0%}" for shift in SHIFTS) + " |\n" + "|---" * 6 + "|")
    for name, model in MODELS.items():
        cells, runs = [], max(10, args.runs // 5)
        for shift in SHIFTS:
            found = [n for _ in range(runs) if (n := told_after(model, chance, 512, shift)) is not None]
            cells.append(f"{100 * len(found) / runs:.0f} of 100, {median(found):.0f}" if found else "never")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
