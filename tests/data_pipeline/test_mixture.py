"""Names, patterns and tags: every name is one group's, and what stands for nothing is said in a sentence of its own."""

import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.loader import UserError, load_config
from data_pipeline.datasets import Datasets
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.mixture import MixtureConfig, check_names, fits, share_out
from data_pipeline.sample_plan import plan_samples
from tests.data_pipeline.tiny_dataset import tiny_dataset

NAMES = ["web/bridge", "web/bridge_v2", "web/droid_100", "lab/bridge", "lab/pots"]


def mixture(*weights, **settings):
    return MixtureConfig(weights=dict.fromkeys(weights, 1.0), **settings)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("bridge", ["web/bridge", "lab/bridge"]),
        ("bridge*", ["web/bridge", "web/bridge_v2", "lab/bridge"]),
        ("web/bridge", ["web/bridge"]),
        ("lab/*", ["lab/bridge", "lab/pots"]),
        ("*/bridge", ["web/bridge", "lab/bridge"]),
        ("*", NAMES),
        ("web", []),
        ("web/bridge_v?", ["web/bridge_v2"]),
    ],
)
def test_what_a_pattern_stands_for(pattern, names):
    assert [name for name in NAMES if fits(pattern, name)] == names


@given(
    st.lists(st.sampled_from(["bridge*", "bridge", "lab/*", "web/*", "*", "real", "droid_*"]), min_size=1, unique=True)
)
def test_every_name_is_at_most_one_groups_and_the_first_that_fits(weights):
    config = mixture(*weights, tags={"real": ("pots", "web/droid_*")})
    groups = share_out(config, NAMES)
    assert list(groups) == weights
    for name in NAMES:
        fitting = [group for group in weights if any(fits(pattern, name) for pattern in config.patterns(group))]
        assert [group for group in weights if name in groups[group]] == fitting[:1]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Of each source an episode or more; validation holds robots (and their actions) of some."""
    folder = tmp_path_factory.mktemp("mixture")
    web = tiny_dataset(
        folder / "web", (3, 4, 2, 5), sources=("bridge", "bridge", "bridge_v2", "street"), action_free=(3,)
    )
    lab = tiny_dataset(folder / "lab", (3, 3), sources=("bridge", "pots"), first_episode=20)
    return Datasets.open({"web": web, "lab": lab})


def loader_config(datasets, mixture=None, **changes):
    folders = {name: index.path for name, index in datasets.by_name.items()}
    return LoaderConfig(dataset=folders.get("", folders), **{"global_batch_size": 4, "mixture": mixture, **changes})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weights": {"bridges": 1}},
            r"weights: no source of split train in .*web and .*lab is called 'bridges'.*did you",
        ),
        (
            {"weights": {"web": 1, "lab": 1}},
            r"no source .* called 'web'; for all of that dataset write web/\*; there are: ",
        ),
        ({"weights": {"web/pots": 1}}, r"no source of split train .*there are: web/bridge, "),
        (
            {"weights": {"bridge*": 1, "bridge_v2": 1}},
            r"'bridge_v2' comes too late, for 'bridge\*' before it has taken web",
        ),
        ({"weights": {"real": 1}, "tags": {"real": ["pots", "plots"]}}, r"tags\.real: no source .* called 'plots'"),
        ({"weights": {"*": 1, "real": 1}, "tags": {"real": ["pots"]}}, r"'real' comes too late, for '\*' before it"),
        ({"weights": {"reel": 1}, "tags": {"real": ["pots"]}}, r"called 'reel'; did you mean \"real\""),
        ({"by": "dataset", "weights": {"lap": 1}}, r"no dataset of split train .* called 'lap'; did you mean \"lab\""),
        ({"weights": {"t": 1}, "tags": {"t": ["t"]}}, r"tags\.t: no source .* called 't'; it can be web/bridge, "),
        ({"by": "embodiment", "weights": {"lab/none": 1}}, r"no embodiment .*there are: web/none, web/arm, lab/arm"),
    ],
)
def test_a_name_that_stands_for_nothing(datasets, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        plan_samples(datasets, loader_config(datasets, settings))
    assert re.fullmatch(r"loader\.mixture[^\n]*\.", str(raised.value))


def test_one_folder_has_no_name(datasets):
    alone = Datasets({"": datasets.by_name["lab"]})
    with pytest.raises(UserError, match=r"by=dataset: \S+lab has no name; write loader\.dataset as \{NAME: FOLDER"):
        plan_samples(alone, loader_config(alone, {"by": "dataset", "weights": {"lab": 1}}))
    assert plan_samples(alone, loader_config(alone, {"weights": {"pots": 1}})) is not None
    with pytest.raises(UserError, match=r"is called ''; it can be "):
        plan_samples(alone, loader_config(alone, {"weights": {"": 1}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": {}},
        {"dataset": {"a/b": "x"}},
        {"mixture": {"weights": {"x": 1}, "tags": {"x": []}}},
        {"mixture": {"weights": {"x": 1e308, "y": 1e308}}},  # their sum is no number
    ],
)
def test_settings_that_make_no_sense(datasets, changes):
    with pytest.raises(ValidationError):
        LoaderConfig(**{"dataset": "x", **changes})


def test_names_of_datasets_are_refused_in_words():
    for dataset, message in (("{}", "names no dataset; write a folder"), ("{a/b: x}", "has the name 'a/b'; letters")):
        with pytest.raises(UserError, match=f"^command line: dataset {message}"):
            load_config(LoaderConfig, None, [f"dataset={dataset}"])


def test_the_home_folder_of_several():
    config = LoaderConfig(dataset={"lab": "~/lab", "cloud": "s3://bucket/lab"})
    assert config.addresses == {"lab": Path.home() / "lab", "cloud": "s3://bucket/lab"}


def weights_of(datasets, settings, split="train", **changes):
    plan = plan_samples(datasets, loader_config(datasets, settings, split=split), **changes)
    return None if plan is None else {stream.source: stream.num_samples for stream in plan.order.streams}


def test_weights_by_dataset_embodiment_and_tag(datasets):
    by_dataset = plan_samples(datasets, loader_config(datasets, {"by": "dataset", "weights": {"web": 3, "lab": 1}}))
    assert dict(zip([s.name for s in by_dataset.order.streams], by_dataset.order.weights_at(0), strict=True)) == (
        {"web/web/16x16x5": 0.75, "lab/lab/16x16x5": 0.25}
    )
    tags = {"held": ["pots", "bridge_v2"], "all_bridges": ["bridge*"]}
    by_tag = plan_samples(datasets, loader_config(datasets, {"weights": {"held": 1, "all_bridges": 1}, "tags": tags}))
    assert [stream.name for stream in by_tag.order.streams] == [
        "held/web/16x16x5", "held/lab/16x16x5", "all_bridges/web/16x16x5", "all_bridges/lab/16x16x5",
    ]  # fmt: skip
    arms = weights_of(datasets, {"by": "embodiment", "weights": {"lab/arm": 1, "arm": 1, "none": 2}})
    assert arms.keys() == {"lab/arm", "arm", "none"}


def test_validation_leaves_out_what_it_lacks_and_says_so_once(datasets, caplog):
    caplog.set_level(logging.INFO)
    weights = {"lab/*": 1, "street": 1, "bridge*": 1}
    assert weights_of(datasets, {"weights": weights}).keys() == weights.keys()
    assert not caplog.records
    held_out = weights_of(datasets, {"weights": weights}, "validation", may_lack=True)
    assert held_out and "street" not in held_out
    (record,) = caplog.records
    assert "split validation holds nothing of lab/*, street, which" in record.getMessage()
    assert weights_of(datasets, {"weights": {"street": 1}}, "validation", may_lack=True) is None
    # at the start, which is where validation reads, only what it lacks would be drawn
    schedule = {"street": {0: 1, 9: 0}, "bridge*": {0: 0, 9: 1}}
    assert weights_of(datasets, {"weights": schedule}, "validation", may_lack=True) is None
    with pytest.raises(UserError, match=r"no source of split validation .* called 'street'"):
        weights_of(datasets, {"weights": {"street": 1}}, "validation")


def test_check_names_accepts_what_stands_for_something(datasets):
    check_names(mixture("web/bridge", "bridge*", "*"), NAMES, datasets, "train")
    tagged = mixture("bridge", "real", tags={"real": ("web/bridge", "pots")})  # one of its names is taken, not all
    check_names(tagged, NAMES, datasets, "train")


def test_weighted_datasets_are_drawn_by_weight(datasets):
    settings = {"by": "dataset", "weights": {"web": {0: 1, 50: 0}, "lab": {0: 0, 50: 1}}}
    reader = Loader(datasets, loader_config(datasets, settings, global_batch_size=10))
    from_lab = [sum(key >= "key020" for key in batch["keys"]) for batch, _ in zip(reader, range(60), strict=False)]
    assert from_lab[0] == 0 and from_lab[25] == 5 and from_lab[59] == 10
