"""What readers set right in many episodes, each kind of repair told once."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from configs.loader import StrictConfig

_NUMBERS = re.compile(r"\d+(\.\d+)?(, \d+(\.\d+)?)*( …)?")
"""One number or a list of them: `Shot cuts at 1.20, 3.45 s` is of a kind with one cut."""


def kind_of(sentence: str) -> str:
    """What sentences share that differ only in their numbers."""
    return _NUMBERS.sub("#", sentence)


class Repair(StrictConfig):
    """Told once for all episodes whose sentence differs only in its numbers."""

    sentence: str
    num_episodes: int


def group_repairs(episodes: Iterable[Sequence[str]]) -> list[Repair]:
    """The sentences of all episodes by kind, each as the first episode with it says it, in the order of appearance."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for sentences in episodes:
        kinds = {kind_of(sentence): sentence for sentence in sentences}
        counts.update(kinds.keys())
        for kind, sentence in kinds.items():
            examples.setdefault(kind, sentence)
    return [Repair(sentence=sentence, num_episodes=counts[kind]) for kind, sentence in examples.items()]
