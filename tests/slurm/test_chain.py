"""A chain's jobs: what each runs, what it waits for, and on how many nodes it may."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError, load_config
from slurm.chain import ChainConfig, Job, TrainingConfig, plan_jobs, seconds, usable_node_counts
from slurm.submit import dependency, groups

STAGE = {"config": "c.yaml", "time": "60"}


def chain_of(**stages: dict[str, Any]) -> ChainConfig:
    return ChainConfig(run_dir="/runs/x", stages={name: {**STAGE, **stage} for name, stage in stages.items()})


def jobs_of(**stages: dict[str, Any]) -> dict[str, Job]:
    return {job.stage: job for job in plan_jobs(chain_of(**stages))}


# --- commands -----------------------------------------------------------------------------------------------------


def test_stages_are_wired_by_their_folders():
    jobs = jobs_of(data={}, pretrain={}, finetune={}, evaluate={})
    assert {stage: job.tasks[""].command for stage, job in jobs.items()} == {
        "data": ("data_pipeline.build", "--config", "c.yaml", "out=/runs/x/dataset"),
        "pretrain": (
            *("pretrain.train", "--config", "c.yaml"),
            *("run_dir=/runs/x/pretrain", "loader.dataset=/runs/x/dataset"),
        ),
        "finetune": (
            *("finetune.train", "--config", "c.yaml"),
            *("run_dir=/runs/x/finetune", "loader.dataset=/runs/x/dataset", "pretrained=/runs/x/pretrain/export"),
        ),
        "evaluate": (
            *("finetune.evaluate", "--config", "c.yaml", "output=/runs/x/evaluate"),
            *("checkpoint=/runs/x/finetune/export", "open_loop.dataset=/runs/x/dataset"),
        ),
    }
    assert [jobs[stage].after for stage in jobs] == [None, "data", "pretrain", "finetune"]


def test_what_is_left_out_is_not_wired():
    jobs = jobs_of(finetune={"overrides": ["pretrained=/elsewhere/export"]})
    assert jobs["finetune"].tasks[""].command[3:] == ("run_dir=/runs/x/finetune", "pretrained=/elsewhere/export")
    assert jobs["finetune"].after is None


def test_the_preset_has_the_last_word():
    preset = {"name": "a", "config": "a.yaml", "overrides": ["loader.dataset=$RUN_DIR/other"]}
    jobs = jobs_of(data={}, finetune={"overrides": ["loader.dataset=/mine"], "presets": [preset]})
    command = jobs["finetune"].tasks["0"].command
    assert command[1:3] == ("--config", "a.yaml")
    assert [word for word in command if word.startswith("loader.dataset")] == [
        *("loader.dataset=/runs/x/dataset", "loader.dataset=/mine", "loader.dataset=/runs/x/other")
    ]


def test_presets_and_seeds_are_tasks_of_their_own_which_evaluation_follows():
    presets = [{"name": "a"}, {"name": "b"}]
    jobs = jobs_of(finetune={"presets": presets, "seeds": [0, 7]}, evaluate={})
    names = ["a_seed_0", "a_seed_7", "b_seed_0", "b_seed_7"]
    assert [task.name for task in jobs["finetune"].tasks.values()] == names
    assert [task.name for task in jobs["evaluate"].tasks.values()] == names
    assert jobs["finetune"].tasks["3"].command[-1] == "seed=7"
    assert str(jobs["finetune"].tasks["3"].run_dir) == "/runs/x/finetune/b_seed_7"
    assert "checkpoint=/runs/x/finetune/b_seed_7/export" in jobs["evaluate"].tasks["3"].command
    assert jobs["evaluate"].follows_task_by_task
    assert len({task.folder for job in jobs.values() for task in job.tasks.values()}) == 8


def test_parts_of_a_build_are_one_pattern():
    job = jobs_of(data={"parts": 3})["data"]
    assert [task.command[-1] for task in job.tasks.values()] == ["partition=0/3", "partition=1/3", "partition=2/3"]
    assert job.pattern is not None and job.pattern.command[-1] == "partition=$SLURM_ARRAY_TASK_ID/3"


# --- settings that cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_dir: r\nstages: {}\n", "stages is empty"),
        ("run_dir: r\nstages: {data: }\n", "stages is empty"),
        ("run_dir: a b\nstages: {data: {config: c, time: 5}}\n", "without spaces"),
        ("run_dir: a#b\nstages: {data: {config: c, time: 60}}\n", "without spaces, quotes, $, %, #"),
        ('run_dir: "a\\x07"\nstages: {data: {config: c, time: 60}}\n', "without spaces"),
        ("run_dir: r\nstages: {data: {config: c, time: soon}}\n", "HH:MM:SS"),
        ("run_dir: r\nstages: {data: {config: c, time: 00:05:00}}\n", "lead_s=300 leaves nothing of time=00:05:00"),
        ("run_dir: r\nstages: {dta: {config: c, time: 60}}\n", 'did you mean "stages.data"'),
        ("run_dir: r\nstages: {data: {config: c, tim: 60}}\n", 'did you mean "stages.data.time"'),
        (
            "run_dir: r\nstages: {pretrain: {config: c, time: 60, nodes: {min: 3, max: 2}}}\n",
            "min=3 is more than max=2",
        ),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, nodes: 0}}\n", "nodes"),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, overrides: [steps]}}\n", "overrides"),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, sbatch: [gres]}}\n", "sbatch"),
        ("run_dir: r\nstages: {finetune: {config: c, time: 60, presets: [{name: a/b}]}}\n", "presets"),
        ("run_dir: r\nstages: {finetune: {config: c, time: 60, presets: [{name: a}, {name: a}]}}\n", "the name a"),
        ("run_dir: r\nstages: {finetune: {config: c, time: 60, seeds: [1, 1]}}\n", "2 runs the name seed_1"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, memory: '1G\\n'}}\n", "stages.data.memory"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, partition: a b}}\n", "stages.data.partition"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, sbatch: [--x=a b]}}\n", "stages.data.sbatch"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, sbatch: [--nodes=3]}}\n", "--nodes=3: a chain sets this"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, overrides: [out=/x]}}\n", "out=/x: where a stage writes"),
        (
            "run_dir: r\nstages: {finetune: {config: c, time: 60, presets: [{name: a, overrides: [run_dir=x]}]}}\n",
            "run_dir=x: where a stage writes",
        ),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, nodes: {min: 1, max: 1000000}}}\n", "10000"),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, nodes: 1e30}}\n", "nodes"),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, nodes: -1}}\n", "nodes"),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 9-0, lead_s: 70000}}\n", "65535"),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, gpus_per_node: 1000000000000}}\n", "gpus_per_node"),
        ("run_dir: r\nstages: {pretrain: {config: c, time: 60, max_failures: 10000000000000000000}}\n", "max_failures"),
        ("run_dir: r\nstages: {data: {config: c, time: 99999999}}\n", "more than a year"),
        ("run_dir: r\nstages: {data: {config: c, time: \u0663\u0660}}\n", "HH:MM:SS"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, sbatch: [--arr=1-9]}}\n", "--arr=1-9: a chain sets this"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, sbatch: [--wait]}}\n", "--wait: a chain sets this"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, sbatch: [--comment=a#b]}}\n", "stages.data.sbatch"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, nodes: 2}}\n", "nodes=2 is for kind=ray"),
        ("run_dir: r\nstages: {data: {config: c, time: 60, kind: ray, parts: 2}}\n", "are for kind=array"),
        ('run_dir: r\nstages: {data: {config: c, time: 60, overrides: ["a=\\0"]}}\n', "stages.data.overrides"),
        ("run_dir: r\nstages: {finetune: {config: c, time: 60, seeds: [1e40]}}\n", "seeds"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str):
    (tmp_path / "chain.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(ChainConfig, tmp_path / "chain.yaml")
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("01:30:00", 5400),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("1-00:00:01", 86_401),
    ],
)
def test_times_are_read_as_sbatch_reads_them(time: str, expected: int):
    assert seconds(time) == expected


# --- numbers of nodes ---------------------------------------------------------------------------------------------


def settings_of(batch: int, micro_batches: int = 1, sequence_parallel: int = 1) -> dict[str, Any]:
    engine = {"grad_accum_steps": micro_batches, "sequence_parallel": sequence_parallel}
    return {"loader": {"global_batch_size": batch}, "engine": engine}


@given(
    st.integers(1, 512), st.integers(1, 16), st.integers(0, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 2)
)
def test_a_batch_can_be_cut_for_every_usable_number_of_nodes(batch, fewest, more, ranks, micro_batches, parallel):
    nodes = {"min": fewest, "max": fewest + more}
    config = TrainingConfig(**STAGE, nodes=nodes, ranks_per_node=ranks)
    settings = settings_of(batch, micro_batches, parallel)
    fits = [
        count
        for count in range(fewest, fewest + more + 1)
        if count * ranks % parallel == 0 and batch % (count * ranks // parallel * micro_batches) == 0
    ]
    if fits:
        assert usable_node_counts("stage x", config, settings) == fits
    else:
        with pytest.raises(UserError, match=f"global_batch_size={batch} cannot be cut equally"):
            usable_node_counts("stage x", config, settings)


def test_without_the_stages_settings_every_number_may_do():
    assert usable_node_counts("x", TrainingConfig(**STAGE, nodes={"min": 2, "max": 4}), None) == [2, 3, 4]


# --- what waits for what ------------------------------------------------------------------------------------------


def test_a_job_waits_for_all_of_the_one_before():
    job = jobs_of(pretrain={}, finetune={"presets": [{"name": "a"}, {"name": "b"}]})["finetune"]
    assert dependency(job, ["0", "1"], {"": "12"}) == "afterok:12"
    assert dependency(job, ["0", "1"], {}) == ""
    after_parts = jobs_of(data={"parts": 3}, pretrain={})["pretrain"]
    assert dependency(after_parts, [""], {"0": "3", "2": "7", "1": "3"}) == "afterok:3:7"


def test_evaluation_waits_task_by_task_for_the_job_that_has_the_task():
    job = jobs_of(finetune={"presets": [{"name": name} for name in "abcd"]}, evaluate={})["evaluate"]
    not_done = {"1": "30", "2": "31", "3": "30"}
    assert list(groups(job, ["0", "1", "2", "3"], not_done)) == [["0"], ["1", "3"], ["2"]]
    assert [dependency(job, indices, not_done) for indices in groups(job, ["0", "1", "2", "3"], not_done)] == [
        *("", "aftercorr:30", "aftercorr:31")
    ]
