"""What no reader can set right and a person should know before a build: numbers that never change, copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .sources import Episode

MIN_ROWS = 10  # of all episodes together, before it is said that something never changes


def still_values(episodes: Sequence[Episode]) -> list[str]:
    """A sentence about the actions, and one about the proprio, that are the same in all rows of all episodes."""
    notes = []
    for what, tables in (
        ("actions", [episode.actions for episode in episodes if episode.actions is not None]),
        ("proprio", [episode.proprio for episode in episodes if episode.proprio is not None]),
    ):
        rows = [table for table in tables if len(table) and table.shape[1] == tables[0].shape[1]]
        if sum(map(len, rows)) < MIN_ROWS:
            continue
        low = np.fmin.reduce([np.fmin.reduce(table) for table in rows])  # NaN where no number was recorded at all
        high = np.fmax.reduce([np.fmax.reduce(table) for table in rows])
        still = np.flatnonzero(low == high).tolist()
        if still:
            which = f"{spans(still)} of {len(low)}" if len(still) < len(low) else "all"
            notes.append(f"The {what} hold numbers that never change ({which}): nothing can be learned from them.")
    return notes


def copies(episodes: Sequence[Episode]) -> list[str]:
    """A sentence about episodes whose bytes are those of another."""
    first: dict[str, str] = {}
    same = [
        (episode.episode_id, of)
        for episode in episodes
        if (of := first.setdefault(episode.content_sha256, episode.episode_id)) != episode.episode_id
    ]
    if not same:
        return []
    copy, original = same[0]
    return [
        f"{len(same)} of {len(episodes)} episodes are copies of another one (first: {copy} of {original}): "
        "a build keeps one of each, unless duplicates.exact is false."
    ]


def spans(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
