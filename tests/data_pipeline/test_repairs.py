"""Repairs: told once per kind, counted by episode, and no more of them than a description can hold."""

from data_pipeline import build_stages
from data_pipeline.curate.episode import rejected_episode
from data_pipeline.repairs import Repair, group_repairs
from data_pipeline.staging import Rejection


def test_sentences_that_differ_in_numbers_are_one():
    episodes = [
        ["The video has 9 frames for 8 rows."],
        [],
        ["No text.", "The video has 10.5 frames for 3 rows.", "The video has 1 frames for 3 rows."],
        ["no text.", "Cuts at 1.20 s."],
        ["Cuts at 1, 2.25, 3 s."],
        ["Cuts at 1, 2 … s."],
    ]
    assert group_repairs(episodes) == [
        Repair(sentence="The video has 9 frames for 8 rows.", num_episodes=2),
        Repair(sentence="No text.", num_episodes=1),
        Repair(sentence="no text.", num_episodes=1),
        Repair(sentence="Cuts at 1.20 s.", num_episodes=3),
    ]
    assert group_repairs([]) == []


def test_a_dataset_tells_the_most_common_and_how_many_more():
    letters = [chr(ord("a") + i) for i in range(25)]
    rejected = rejected_episode("lab", "0", Rejection(where="lab/0", reason="idle", detail="nothing happens"))
    records = [
        rejected.model_copy(update={"episode": letter, "repairs": ("z", f"only {letter}")})
        for letter in reversed(letters)
    ]
    info = build_stages._source_info(letters, records)
    assert [repair.sentence for repair in info.repairs] == ["z", *(f"only {letter}" for letter in letters[:19])]
    assert (info.repairs[0].num_episodes, info.repairs[1].num_episodes, info.more_repairs) == (25, 1, 6)
