"""What is drawn how often: names, patterns and tags -> which samples share one weight."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, field_validator

from configs.loader import StrictConfig, UserError
from configs.problems import suggest

from .datasets import Datasets
from .sample_order import Weight, weight_at


def _is_counted(share: float) -> float:
    if 0 < share < 1e-9:
        raise ValueError("should be 0 or at least 1e-9")
    return share


Share = Annotated[float, Field(ge=0, le=1e9), AfterValidator(_is_counted)]  # bounded: shares of sums are numbers
Step = Annotated[int, Field(ge=0, le=10**12)]
WeightSetting = Share | Annotated[dict[Step, Share], Field(min_length=1)]


class MixtureConfig(StrictConfig):
    """What is drawn how often. What no name stands for is left out."""

    by: Literal["dataset", "source", "embodiment"] = Field(
        "source",
        description="What the names name; the embodiment of clips without actions is `none`. A source or embodiment of "
        "one of several datasets is DATASET/NAME; without a slash a name means those of all datasets.",
    )
    weights: dict[str, WeightSetting] = Field(
        min_length=1,
        description="Name -> share of the samples, as a number or as {step: number, …} with straight lines between. "
        "A name with wildcards, such as bridge_* or bridge/*, is one group, and so is a tag; of several that fit the "
        "first one counts.",
    )
    tags: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(
        {}, description="Tag -> names, wildcards allowed, that share its weight."
    )

    @field_validator("weights")
    @classmethod
    def _something_is_drawn(cls, weights: dict[str, WeightSetting]) -> dict[str, WeightSetting]:
        step = step_without_samples(weights)
        if step is not None:
            raise ValueError(f"are all zero at step {step}; give at least one a positive weight")
        return weights

    def patterns(self, name: str) -> tuple[str, ...]:
        return self.tags.get(name, (name,))


def step_without_samples(weights: Mapping[str, Weight]) -> int | None:
    """The first step at which all weights are zero. Between two steps weights are mixed, so it is one that is named."""
    steps = {step for weight in weights.values() if isinstance(weight, Mapping) for step in weight}
    return next((s for s in sorted(steps) or [0] if not any(weight_at(weight, s) for weight in weights.values())), None)


def fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)


def share_out(mixture: MixtureConfig, names: Collection[str]) -> dict[str, list[str]]:
    """The names that each of the mixture's stands for; of several that fit the first one takes it."""
    left = list(names)
    groups: dict[str, list[str]] = {}
    for group in mixture.weights:
        groups[group] = [name for name in left if any(fits(pattern, name) for pattern in mixture.patterns(group))]
        left = [name for name in left if name not in groups[group]]
    return groups


def check_names(mixture: MixtureConfig, names: Collection[str], datasets: Datasets, split: str) -> None:
    """Refuse a mixture of which a name stands for none of these."""
    groups = share_out(mixture, names)
    for group, taken in groups.items():
        for pattern in mixture.patterns(group):
            fitting = [name for name in names if fits(pattern, name)]
            if not fitting:
                raise _unknown(mixture, group, pattern, names, datasets, split)
        if not taken:
            first = next(earlier for earlier in groups if fitting[0] in groups[earlier])
            raise UserError(
                f"loader.mixture.weights: {group!r} comes too late, for {first!r} before it has taken "
                f"{fitting[0]} already, and of several names that fit the first one counts; put {group!r} before it."
            )


def _unknown(
    mixture: MixtureConfig, group: str, pattern: str, names: Collection[str], datasets: Datasets, split: str
) -> UserError:
    setting = f"tags.{group}" if group in mixture.tags else "weights"
    hint = suggest(pattern, [*names, *(tag for tag in mixture.tags if tag != pattern)])
    if pattern and pattern in datasets.by_name and mixture.by != "dataset":
        hint = f"; for all of that dataset write {pattern}/*"
    return UserError(
        f"loader.mixture.{setting}: no {mixture.by} of split {split} in {datasets} is called {pattern!r}{hint}; there "
        f"are: {', '.join(names)}."
    )


def named_samples(
    datasets: Datasets, mixture: MixtureConfig, samples: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, np.ndarray]]:
    """Of these samples (dataset -> positions in it), what the mixture may name: name -> (dataset, positions)."""
    named: dict[str, tuple[str, np.ndarray]] = {}
    for dataset, members in samples.items():
        names, name_of = _names(datasets, dataset, mixture)
        named |= {names[i]: (dataset, members[name_of[members] == i]) for i in np.unique(name_of[members])}
    return named


def group_samples(
    mixture: MixtureConfig, named: Mapping[str, tuple[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """What the mixture weighs: group -> dataset -> positions in it, sorted; none where nothing has its names."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for group, names in share_out(mixture, named).items():
        parts: dict[str, list[np.ndarray]] = {}
        for dataset, members in (named[name] for name in names):
            parts.setdefault(dataset, []).append(members)
        groups[group] = {dataset: np.sort(np.concatenate(members)) for dataset, members in parts.items()}
    return groups


def _names(datasets: Datasets, dataset: str, mixture: MixtureConfig) -> tuple[list[str], np.ndarray]:
    """Names, and each of the dataset's samples' number of them."""
    index = datasets.by_name[dataset]
    if mixture.by == "dataset":
        if not dataset:
            raise UserError(
                f"loader.mixture.by=dataset: {index} has no name; write loader.dataset as {{NAME: FOLDER, …}}."
            )
        return [dataset], np.zeros(len(index), np.int64)
    names, name_of = index.column(mixture.by)
    return [f"{dataset}/{name or 'none'}".removeprefix("/") for name in names], name_of
