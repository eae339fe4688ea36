"""What a user may expect of a pruned model, said plainly before and after the run."""

from __future__ import annotations

from secateur.core.method import BITS, CORE, EXPERTS
from secateur.core.pattern import Pattern
from secateur.report.numbers import percent, size

__all__ = ["ADVICE", "effect"]

ADVICE = "Measure with `secateur bench`; the reasons are in docs/troubleshooting.md#why-is-it-not-faster."

UNPACKED = (
    "transformers unpacks them while it loads, or keeps them packed and unpacks them in every step, which "
    "takes less memory and more time; neither is faster than the dense model."
)


def effect(
    pattern: str | Pattern,
    sparsity: float,
    *,
    removes: str = "single weights",
    storage: str = "dense",
    bytes_before: int | None = None,
    bytes_after: int | None = None,
    loaded: str | None = None,
) -> str:
    """A few sentences on size and speed.

    Args:
        pattern: `unstructured`, `row`, `matrix`, `global` or `N:M`; not looked at for structured removal.
        sparsity: fraction removed of the prunable parameters.
        removes: the unit that goes, as the method declares it; all but `single weights` shrink matrices.
        storage: `dense` when zeros are stored like other numbers, else the name of the format.
        bytes_before, bytes_after: size of the weight files, measured or planned.
        loaded: of a result that was timed: `dense` or `packed`, and with what or why.

    Raises `RecipeError` for a pattern that does not exist.
    """
    if removes == BITS:
        return f"Weights are stored in fewer bits{_sizes(bytes_before, bytes_after)}. {UNPACKED} {ADVICE}"
    if sparsity == 0:
        return "Nothing was removed: size and speed are those of the dense model."
    if removes == CORE and (storage != "dense" or (bytes_after or 0) < (bytes_before or 0)):
        return (
            f"{percent(sparsity)} of a sparse core are gone; it and two block-diagonal matrices are stored "
            f"in place of their product{_sizes(bytes_before, bytes_after)}. {UNPACKED} {ADVICE}"
        )
    if removes == CORE:
        return (
            f"{percent(sparsity)} of a sparse core are gone, but what is stored is its product with two "
            f"block-diagonal matrices, which has no zeros: not smaller and not faster. {ADVICE}"
        )
    sizes = _sizes(bytes_before, bytes_after)  # of a chain: an earlier stage may have made the file smaller
    if removes == EXPERTS:
        sentences = [
            f"{percent(sparsity)} of the routed experts are gone, and so are their bytes on disk and in "
            f"memory{sizes}.",
            "A token visits as many as before, so it takes about as long.",
        ]
    elif removes != "single weights":
        sentences = _structured(removes, sparsity, sizes)
    elif storage != "dense":
        sentences = _packed(storage, bytes_before, bytes_after, sizes, loaded)
    else:
        sentences = _zeros(Pattern.parse(str(pattern)), sizes if "and after" in sizes else "")
    return " ".join([*sentences, ADVICE])


def _sizes(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    if size(before) == size(after):
        return f" ({size(before)} before and after)"
    return f" ({size(before)} before, {size(after)} after)"


def _structured(removes: str, sparsity: float, sizes: str) -> list[str]:
    return [
        f"Whole units ({removes}) are gone, {percent(sparsity)} of the parameters in blocks: "
        f"the matrices themselves are smaller, and so is the file{sizes}.",
        "Any runtime that loads the model does less arithmetic; how much faster depends on the machine.",
    ]


def _packed(storage: str, before: int | None, after: int | None, sizes: str, loaded: str | None) -> list[str]:
    less = ""
    if before and after is not None and after < before:
        less = f": {percent(1 - after / before)} less on disk"
    sentences = [
        f"Zeros are left out of the files, stored as {storage}{less}{sizes}.",
        "Unpacked while it loads, as is the default, it takes the memory and the time of the dense model.",
        'Kept packed (`SecateurQuantizationConfig(mode="packed")`) it takes less memory, and is faster only '
        "where a kernel computes from packed weights.",
    ]
    if loaded is not None:
        sentences.append(f"It was timed {loaded.replace('packed', 'kept packed', 1)}.")
    return sentences


def _zeros(pattern: Pattern, sizes: str) -> list[str]:
    if pattern.kind != "n:m":
        return [
            f"Unstructured zeros in a dense file: not smaller{sizes} and not faster.",
            "Ordinary runtimes store and multiply a zero like any other number.",
        ]
    first = f"{pattern} zeros in a dense file: not smaller{sizes} and not faster as it is loaded by default."
    if _fits_two_of_four(pattern):
        return [
            first,
            "A GPU with sparse tensor cores (NVIDIA Ampere or later) can be faster once the weights are "
            "converted to its 2:4 layout; other hardware gains nothing.",
        ]
    return [first, f"Sparse tensor cores read 2:4; no common hardware computes on {pattern}."]


def _fits_two_of_four(pattern: Pattern) -> bool:
    """Whether every four aligned inputs hold at most two that are kept."""
    return (pattern.of % 4 == 0 and pattern.keep <= 2) or (pattern.keep, pattern.of) == (1, 2)
