"""Progress bars: one look, and one rule for when there is one."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

#: A bar shows up after this many seconds of work.
DELAY_S = 1.0


def bar(
    what: str, unit: str, show: bool | None, total: int | None = None, over: Iterable | None = None
) -> tqdm:
    """A bar that counts to ``total``, or over the elements of an iterable.

    Args:
        unit: what is counted; "B" and " weights" come in thousands and millions.
        show: None: if there is a terminal to show it on.
    """
    show = sys.stderr.isatty() if show is None else show
    scale = unit in ("B", " weights")
    return tqdm(over, what, total, unit=unit, unit_scale=scale, delay=DELAY_S, disable=not show)
