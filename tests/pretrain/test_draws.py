"""What a sample draws depends on the seed, the step and its place in the global batch, and on nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.draws import SampleDraws, seed_layers

numbers = st.integers(0, 2**31)


def everything(draws: SampleDraws) -> torch.Tensor:
    return torch.cat([draws.normal(2, 3).flatten(1), draws.uniform()[:, None], draws.gamma(1.5)[:, None]], dim=1)


@given(seed=numbers, step=numbers, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_global_batch_draws_the_same_however_it_is_shared(seed: int, step: int, sizes: list[int]) -> None:
    whole = everything(SampleDraws.seeded(seed, step, range(sum(sizes))))
    torch.manual_seed(seed)  # the default generator has no say
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    ranks = [SampleDraws.seeded(seed, step, range(first, first + n)) for first, n in zip(firsts, sizes, strict=True)]
    assert torch.equal(torch.cat([everything(rank) for rank in ranks]), whole)
    draws = SampleDraws.seeded(seed, step, range(sum(sizes)))
    micro_batches = [draws[first : first + n] for first, n in zip(firsts, sizes, strict=True)]
    assert torch.equal(torch.cat([everything(part) for part in micro_batches]), whole)


@given(seed=numbers, step=numbers, size=st.integers(1, 40), num_ranks=st.integers(1, 4))
def test_stratified_draws_cover_the_global_batch_evenly_on_any_number_of_ranks(
    seed: int, step: int, size: int, num_ranks: int
) -> None:
    share = -(-size // num_ranks)
    parts = [range(first, min(first + share, size)) for first in range(0, size, share)]
    ranks = [SampleDraws.seeded(seed, step, places, global_batch_size=size) for places in parts]
    for _ in range(2):  # a second kind of number in the same step
        drawn = torch.cat([rank.stratified() for rank in ranks])
        assert sorted((drawn * size).floor().int().clamp_max(size - 1).tolist()) == list(range(size))
    whole = SampleDraws.seeded(seed, step, range(size))
    whole.stratified()
    micro_batches = [whole[place : place + 1] for place in range(size)]
    assert torch.equal(torch.cat([one.stratified() for one in micro_batches]), drawn)


def test_two_kinds_of_stratified_draws_are_independent_and_steps_differ() -> None:
    draws = SampleDraws.seeded(0, 0, range(200))
    first, second, later = draws.stratified(), draws.stratified(), SampleDraws.seeded(0, 1, range(200)).stratified()
    for other in (second, later):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.25


@given(seed=numbers, step=numbers, size=st.integers(1, 5))
def test_a_choice_is_that_of_the_whole_step(seed: int, step: int, size: int) -> None:
    whole = SampleDraws.seeded(seed, step, range(size))
    ranks = [SampleDraws.seeded(seed, step, range(place, place + 1), global_batch_size=size) for place in range(size)]
    assert {draws.one_of([0, 1, 2]) for draws in [whole, *ranks]} == {
        SampleDraws.seeded(seed, step, range(1)).one_of([0, 1, 2])
    }


def test_choices_come_equally_often() -> None:
    drawn = [SampleDraws.seeded(0, step, range(1)).one_of([0, 1, 2]) for step in range(600)]
    assert all(150 < drawn.count(choice) < 250 for choice in (0, 1, 2))


def test_samples_steps_seeds_and_streams_draw_different_numbers() -> None:
    rows = [SampleDraws.seeded(seed, step, range(3)).uniform(2) for seed in range(3) for step in range(3)]
    rows.append(SampleDraws.seeded(0, 0, range(3), stream="validation").uniform(2))
    drawn = {tuple(row) for row in torch.cat(rows).tolist()}
    assert len(drawn) == 30


@given(seed=numbers, step=numbers, rank=numbers)
def test_layers_draw_the_same_again(seed: int, step: int, rank: int) -> None:
    seed_layers(seed, step, rank)
    first = torch.rand(4)
    seed_layers(seed, step, rank)
    assert torch.equal(torch.rand(4), first)
    assert not torch.equal(SampleDraws.seeded(seed, step, range(rank, rank + 1)).uniform(4)[0], first)
