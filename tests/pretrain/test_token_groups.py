"""The visibility table, rule by rule, and that attention obeys it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.models.attention import attention
from pretrain.models.token_groups import AttentionPlan, Rule, TokenGroup, Visible, attention_plan, visible
from pretrain.models.transformer import ExpertBlock, KeyValueCache, run_experts
from pretrain.models.video_dit import rotary_table, rotations

CPU = torch.device("cpu")
BLOCKS = st.lists(st.integers(0, 5), min_size=1, max_size=6)

ALLOWED = {
    Rule.NEVER: lambda q, k: False,
    Rule.ALWAYS: lambda q, k: True,
    Rule.SAME_BLOCK: lambda q, k: q == k,
    Rule.EARLIER_BLOCKS: lambda q, k: k < q,
    Rule.SAME_OR_EARLIER_BLOCKS: lambda q, k: k <= q,
}


@given(queries=BLOCKS, keys=BLOCKS, rule=st.sampled_from(Rule), window=st.none() | st.integers(0, 4))
def test_a_rule_means_what_its_name_says(queries, keys, rule, window):
    mask = visible(Visible(rule, window), torch.tensor(queries), torch.tensor(keys))
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            near = window is None or abs(query - key) <= window
            assert mask[i, j].item() == (ALLOWED[rule](query, key) and near)


def seen_by(plan: AttentionPlan, num_queries: int, num_keys: int) -> list[list[bool]]:
    """A plan as one mask."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for part in plan:
        keys = torch.cat([torch.arange(num_keys)[columns] for columns in part.keys])
        mask[part.queries.start : part.queries.stop, keys] = True if part.mask is None else part.mask
    return mask.tolist()


def test_a_pair_that_is_not_in_the_table_never_sees_each_other():
    table = {("a", "a"): Rule.ALWAYS, ("b", "b"): Rule.ALWAYS, ("b", "a"): Rule.EARLIER_BLOCKS}
    headers = [("a", (0, 1)), ("b", (1,))]
    plan = attention_plan(headers, headers, table, CPU)
    assert seen_by(plan, 3, 3) == [[True, True, False], [True, True, False], [True, False, True]]


@given(
    chunks=st.lists(BLOCKS, min_size=1, max_size=3),
    rules=st.lists(st.sampled_from(Rule), min_size=9, max_size=9),
    window=st.none() | st.integers(0, 3),
)
def test_a_plan_shows_what_the_rules_say(chunks, rules, window):
    headers = [(str(number), tuple(blocks)) for number, blocks in enumerate(chunks)]
    pairs = [(query, key) for query, _ in headers for key, _ in headers]
    table = {pair: Visible(rule, window) for pair, rule in zip(pairs, rules, strict=False)}
    table |= {(name, name): Rule.ALWAYS for name, _ in headers}  # a token that sees nothing is an error
    expected = [
        torch.cat([visible(table[query, key], torch.tensor(a), torch.tensor(b)) for key, b in headers], 1)
        for query, a in headers
    ]
    count = sum(map(len, chunks))
    assert seen_by(attention_plan(headers, headers, table, CPU), count, count) == torch.cat(expected).tolist()


def test_whole_groups_need_no_mask_and_what_is_hidden_is_not_computed():
    """Context that looks at itself, and two kinds of tokens that look at everything."""
    headers = [("context", (0, 0)), ("future", (1,)), ("actions", (0, 0, 0))]
    table = {("context", "context"): Rule.ALWAYS}
    table |= {(query, key): Rule.ALWAYS for query in ("future", "actions") for key, _ in headers}
    context, rest = attention_plan(headers, headers, table, CPU)
    assert (context.queries, context.keys, context.mask) == (slice(0, 2), (slice(0, 2),), None)
    assert (rest.queries, rest.keys, rest.mask) == (slice(2, 6), (slice(0, 6),), None)


def test_a_token_that_sees_nothing_is_an_error():
    with pytest.raises(ValueError, match="sees nothing"):
        attention_plan([("a", (0,))], [("a", (0,))], {("a", "a"): Rule.EARLIER_BLOCKS}, CPU)


def make_group(name: str, expert: str, width: int, count: int, block: int) -> TokenGroup:
    rotary = rotations(rotary_table(8, torch.arange(count)), CPU)
    blocks = torch.full((count,), block)
    return TokenGroup(name, expert, torch.randn(2, count, width), torch.randn(2, 1, 6, width), rotary, blocks)


@pytest.fixture
def experts():
    torch.manual_seed(0)
    widths = {"wide": 16, "narrow": 12}
    stacks = {
        name: torch.nn.ModuleList(ExpertBlock(width, 24, heads=2, head_dim=8) for _ in range(2))
        for name, width in widths.items()
    }
    text = {name: torch.randn(2, 3, width) for name, width in widths.items()}
    return stacks, text, widths


TABLE = {("past", "past"): Rule.ALWAYS, ("future", "past"): Rule.ALWAYS, ("future", "future"): Rule.ALWAYS}


@torch.no_grad()
def test_what_a_group_may_not_see_cannot_change_it(experts):
    stacks, text, widths = experts
    past = make_group("past", "wide", widths["wide"], 4, 0)
    futures = [make_group("future", "narrow", widths["narrow"], 3, 1) for _ in range(2)]
    outputs = [run_experts(stacks, text, [past, future], TABLE)[0] for future in futures]
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert not torch.allclose(outputs[0][1], outputs[1][1])


@torch.no_grad()
def test_a_cached_group_gives_the_same_as_running_it_again(experts):
    stacks, text, widths = experts
    past = make_group("past", "wide", widths["wide"], 4, 0)
    future = make_group("future", "narrow", widths["narrow"], 3, 1)
    (_, together), _ = run_experts(stacks, text, [past, future], TABLE)
    _, cache = run_experts(stacks, text, [past], TABLE, keep=True)
    (alone,), _ = run_experts(stacks, text, [future], TABLE, cache)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_repeating_a_cache_repeats_each_sample_in_place():
    cache = KeyValueCache([(torch.arange(2.0)[:, None, None, None], torch.zeros(2, 1, 1, 1))], [("past", (0,))])
    assert cache.repeat(2).layers[0][0].flatten().tolist() == [0, 0, 1, 1]


def test_what_the_mask_hides_has_no_influence():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 5, 3, 8) for _ in range(3))
    mask = torch.rand(5, 5) < 0.6
    mask |= torch.eye(5, dtype=torch.bool)
    before = attention(query, key, value, mask)
    for hidden in range(5):
        changed_key, changed_value = key.clone(), value.clone()
        changed_key[:, hidden] += 1
        changed_value[:, hidden] += 1
        after = attention(query, changed_key, changed_value, mask)
        same = (after == before).flatten(2).all(2).all(0)
        assert torch.equal(same, ~mask[:, hidden])
