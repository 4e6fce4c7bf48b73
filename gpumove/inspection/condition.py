"""The condition of one log for people: whose it is where a run moves between stores, and what to do. Pure."""

from __future__ import annotations

from gpumove.store.view import View


def explain(view: View, url: str) -> str:
    """The condition of one log for people, and what to do about it; "" if there is nothing to say."""
    move = view.move
    if view.sealed:
        if move is not None and move.is_over:
            return f"moved to {view.sealed}, where it trains: no job may write here"
        finish = f"`gpumove move {url} --to {view.sealed} --resume`"
        return f"moved to {view.sealed}, where nobody is known to train yet: start the job there; see {finish}"
    if view.follows:
        return f"replica of {view.follows}: no job may write here before gpumove move has handed the run over"
    if move is None:
        return ""
    end = f"unless it is running: `gpumove move {url} --to {move.other} --resume` or --rollback"
    match move.state:
        case "begin":
            return f"a move to {move.other} is under way, and copies; {end}"
        case "request" if view.epoch == move.epoch:
            return f"a move to {move.other} has asked the job to leave; {end}"
        case "left" if view.epoch == move.epoch:
            return f"the job has left for {move.other}, which is to be handed the run; {end}"
        case "handover" if view.epoch == move.epoch:
            return f"the run was handed over from {move.other}: start the job here with `gpumove run {url}`"
        case "done" | "watched":
            return f"the run was moved here from {move.other}"
    return ""
