"""Which pieces of an order of removal make up a budget of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.structure.base import Piece

__all__ = ["chosen", "reached"]


def chosen(order: Sequence[Piece], pieces: Sequence[Piece], budget: float) -> list[Piece]:
    """The first pieces of the order that fit; what no longer fits is passed over for what comes later.

    A piece fits if it exceeds what is left of the budget by no more than half of the smallest that stays.
    The result depends on the order only as far as it is walked, so a longer one gives the same.

    Args:
        order: pieces in the order of their removal.
        pieces: all of the model.
        budget: parameters to remove.
    """
    return _walk(order, pieces, budget)[0]


def reached(order: Sequence[Piece], pieces: Sequence[Piece], budget: float) -> bool:
    """Whether no piece that would come later in the order could still be chosen."""
    found, left = _walk(order, pieces, budget)
    return _next([piece for piece in pieces if piece not in found], left, pieces, found) is None


def _walk(order: Sequence[Piece], pieces: Sequence[Piece], budget: float) -> tuple[list[Piece], float]:
    found: list[Piece] = []
    left = budget
    while (piece := _next(order, left, pieces, found)) is not None:
        found.append(piece)
        left -= piece.parameters
    return found, left


def _next(
    candidates: Sequence[Piece], left: float, pieces: Sequence[Piece], found: list[Piece]
) -> Piece | None:
    """The first of the candidates that fits into what is left."""
    stay = [piece for piece in pieces if piece not in found]
    if len(stay) < 2:  # something must stay
        return None
    room = left + min(piece.parameters for piece in stay) / 2
    return next((piece for piece in candidates if piece not in found and piece.parameters <= room), None)
