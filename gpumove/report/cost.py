"""What the page says of money: the same bill as a line and as a table."""

from __future__ import annotations

from gpumove.estimates.interval import Range
from gpumove.report.bill import Bill
from gpumove.report.markup import Markup, tag
from gpumove.report.tables import UNKNOWN, table
from gpumove.words import lasting


def costs(bill: Bill) -> list[Markup]:
    """Machine hours and what the move sent, and their price where one is known."""
    rows = [
        (item.label, UNKNOWN if item.trained_s is None else lasting(item.trained_s), _usd(item.hourly, bill.unit),
         _usd(item.cost, bill.unit), item.why)
        for item in bill.items
    ]  # fmt: skip
    if bill.sent is not None:
        rows.append((bill.sent.label, "", "", _usd(bill.sent.cost, bill.unit), bill.sent.why))
    heads = ("What", "Time between commits", "Per hour", "Cost", "Price from")
    words = (
        "Time counts from the first to the last commit of each life of the job that is still in the store: what ran "
        "before the first, or after the last, is not known. Storage and requests are not in it."
    )
    return [table("Cost so far", heads, rows, right="lrrrl"), tag("p", words)]


def _usd(found: Range | None, unit: str) -> str:
    if found is None:
        return UNKNOWN
    ends = "" if found.is_exact else f" ({found.low:,.2f} to {found.high:,.2f})"
    return f"{unit}{' ' if unit else ''}{found.value:,.2f}{ends}"


def cost_so_far(bill: Bill) -> tuple[str, str, str]:
    """In one line: name, value, and what is in it."""
    if bill.machines is None:
        return "Cost so far", UNKNOWN, "no prices were given" if not any(i.cost for i in bill.items) else "of one side"
    if bill.sent is None:
        return "Cost so far", _usd(bill.machines, bill.unit), "machines"
    if bill.sent.cost is None:
        return "Cost so far", _usd(bill.machines, bill.unit), "machines; what the move sent is not in it"
    return "Cost so far", _usd(bill.machines + bill.sent.cost, bill.unit), "machines, and what the move sent"
