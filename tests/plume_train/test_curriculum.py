"""Segments, stages and target texts against the tables of the method."""

from __future__ import annotations

import random

import pytest

from plume import PlumeConfig
from plume_train.curriculum import DIRECT, PAPER, PUBLISHED, Curriculum, Stage
from plume_train.data.segment import segments, sentences
from plume_train.data.target import UnclosedTag, parse_written, write_target

TEXTS = [
    "",
    "One.",
    "It rose 3.5 points. It fell.",
    "1. First do this. 2. Then that.\n3. Done!",
    'He said "no." Then he left?! (Really.) Yes',
    "他来了。她走了！真的吗？是",
    "no sentence end at all here",
    "   spaces   around.  \n\n ",
    "A. B. C. D. E. F. G.",
]


@pytest.mark.parametrize("num_segments", [1, 2, 4, 6])
@pytest.mark.parametrize("text", TEXTS)
def test_segments_joined_are_the_text_again(text, num_segments):
    parts = segments(text, num_segments)
    assert len(parts) == num_segments
    assert "".join(parts) == text


def test_sentences_end_where_they_end():
    assert sentences("It rose 3.5 points. It fell.") == ["It rose 3.5 points. ", "It fell."]
    assert sentences("Version 10.1.2 costs 1,000.25.") == ["Version 10.1.2 costs 1,000.25."]
    assert sentences("他来了。她走了！") == ["他来了。", "她走了！"]
    assert sentences("1. First.\n2. Second.") == ["1. First.\n", "2. Second."]
    assert sentences('He said "no." Then left.') == ['He said "no." ', "Then left."]


def test_more_sentences_than_segments_fill_the_first_ones():
    assert segments("A. B. C. D. E.", 4) == ["A. B. ", "C. ", "D. ", "E."]


def test_fewer_sentences_than_segments_can_stay_whole():
    assert segments("A b. C d.", 4, whole_sentences=True) == ["A b. ", "C d.", "", ""]
    assert segments("A. B. C. D. E.", 4, whole_sentences=True) == segments("A. B. C. D. E.", 4)
    assert segments("", 2, whole_sentences=True) == ["", ""]


def test_fewer_sentences_than_segments_are_cut_at_white_space():
    parts = segments("one two three four five six.", 3)
    assert parts == ["one two ", "three four ", "five six."]
    assert segments("天地玄黄", 2) == ["天地", "玄黄"]


@pytest.mark.parametrize(("largest", "expected"), [(4, [0, 1, 2, 3, 4]), (6, [0, 2, 3, 4, 6]), (8, [0, 2, 4, 6, 8])])
def test_latent_steps_per_stage_round_half_to_even(largest, expected):
    curriculum = Curriculum(stages=PAPER, num_segments=largest)
    assert [curriculum.num_latent_steps(stage) for stage in PAPER] == expected


def test_the_published_stages_begin_where_the_method_says():
    curriculum = Curriculum(stages=PUBLISHED, num_segments=6)
    first = {}
    for step in range(1200):
        first.setdefault(curriculum.stage_at(step, 1200), step / 1200)
    assert [round(share, 4) for share in first.values()] == [0, 0.1667, 0.3333, 0.5, 0.75]


def test_the_paper_spends_three_epochs_of_five_on_written_rationales():
    curriculum = Curriculum(stages=PAPER, num_segments=8)
    stages = [curriculum.stage_at(step, 5000) for step in range(5000)]
    assert [stages.count(index) for index in range(5)] == [3000, 334, 333, 333, 1000]


def test_a_single_pass_leaves_the_rationale_out_and_takes_no_step():
    curriculum = Curriculum(stages=DIRECT, num_segments=4, steps_per_segment=0)
    target = write_target(PlumeConfig(), curriculum, DIRECT[0], "A. B. C. D.", "x")
    assert target.layout == "<bot><eot></think>\n<gen_emb><|im_end|>\n"


def test_mixing_draws_earlier_stages_as_often_as_asked():
    curriculum = Curriculum(stages=PAPER, num_segments=8, mix_earlier=0.4)
    rng = random.Random(0)
    drawn = [curriculum.draw_stage(2, rng) for _ in range(4000)]
    assert set(drawn) == {0, 1, 2}
    assert 0.37 < sum(stage < 2 for stage in drawn) / 4000 < 0.43
    assert {curriculum.draw_stage(0, rng) for _ in range(50)} == {0}


LAYOUTS = [
    (0.0, False, "<bot><eot>A. B. C. D.</think><answer>x</answer>\n<gen_emb>"),
    (0.5, False, "<bot><ct><ct><eot>C. D.</think><answer>x</answer>\n<gen_emb>"),
    (1.0, False, "<bot><ct><ct><ct><ct><eot></think><answer>x</answer>\n<gen_emb>"),
    (1.0, True, "<bot><ct><ct><ct><ct><eot></think>\n<gen_emb>"),
]


@pytest.mark.parametrize(("ratio", "drop_answer", "layout"), LAYOUTS)
def test_layouts_are_those_of_the_method(ratio, drop_answer, layout):
    curriculum = Curriculum(stages=PAPER, num_segments=4)
    stage = Stage(ratio=ratio, share=1, drop_answer=drop_answer)
    target = write_target(PlumeConfig(), curriculum, stage, "A. B. C. D.", "x")
    assert target.layout == layout + "<|im_end|>\n"


def test_an_empty_rationale_still_takes_the_latent_steps_of_its_stage():
    curriculum = Curriculum(stages=PAPER, num_segments=4)
    target = write_target(PlumeConfig(), curriculum, PAPER[2], "", "x")
    assert target.layout.startswith("<bot><ct><ct><eot></think>")


def test_written_turns_are_taken_apart():
    assert parse_written("<THINK> why \n so </think><answer> this </answer>") == ("why \n so", "this")
    assert parse_written("<think>why</think>\n<gen_emb>", accept_unclosed=True) == ("why", "")
    with pytest.raises(UnclosedTag, match="<think> is not closed"):
        parse_written("<think>why")
    unclosed = "<think>why</think><answer>A cat.\n<gen_emb>"
    with pytest.raises(UnclosedTag):
        parse_written(unclosed)
    assert parse_written(unclosed, accept_unclosed=True) == ("why", "A cat.\n<gen_emb>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>R.</think>A cat.\n<gen_emb>", ("R.", "A cat.\n<gen_emb>")),
        ("A cat. <think>R.</think>", ("R.", "A cat.")),
        ("A cat.\n<gen_emb>", ("", "A cat.\n<gen_emb>")),
        ("<think>R.</think>A cat.</answer>", ("R.", "A cat.")),
        ("no tags", ("", "no tags")),
    ],
)
def test_an_answer_without_its_tags_is_kept_or_named(text, expected):
    assert parse_written(text, accept_unclosed=True) == expected
    with pytest.raises(UnclosedTag, match="set unclosed_answer=accept to keep all but the rationale as the answer"):
        parse_written(text)


# S, c, ratio; replaced segments and latent steps: k = min(n // c, S), and k c steps, or n where nothing is left.
STAGES = [
    (6, 2, 0.25, 1, 2),
    (6, 2, 0.5, 3, 6),
    (6, 2, 0.75, 4, 8),
    (6, 2, 1.0, 6, 12),
    (4, 2, 0.1, 0, 0),
    (4, 3, 0.25, 1, 3),
    (5, 3, 0.5, 2, 6),
    (2, 4, 0.4, 0, 0),
    (3, 3, 1.0, 3, 9),
    (8, 1, 0.25, 2, 2),
]


@pytest.mark.parametrize(("num_segments", "each", "ratio", "replaced", "steps"), STAGES)
def test_latent_steps_stand_for_whole_segments(num_segments, each, ratio, replaced, steps):
    stage = Stage(ratio=ratio, share=1)
    curriculum = Curriculum(stages=(stage,), num_segments=num_segments, steps_per_segment=each)
    assert (curriculum.num_replaced_segments(stage), curriculum.num_latent_steps(stage)) == (replaced, steps)
    rationale = " ".join(f"Sentence {number}." for number in range(num_segments))
    layout = write_target(PlumeConfig(), curriculum, stage, rationale).layout
    assert layout.count("<ct>") == steps
    assert layout.count("Sentence") == num_segments - replaced


def test_a_stage_begins_at_the_first_step_whose_share_of_the_run_is_its_own():
    """As the published code asks: progress = step / max_steps, and a stage below a border ends there."""
    for num_steps in (7, 10, 100, 1000, 1001):
        for stages in (PAPER, PUBLISHED):
            curriculum = Curriculum(stages=stages, num_segments=6)
            borders = [sum(stage.share for stage in stages[:index]) for index in range(1, len(stages))]
            for step in range(num_steps):
                expected = sum(step / num_steps >= border - 1e-9 for border in borders)
                assert curriculum.stage_at(step, num_steps) == expected, (num_steps, step)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": (Stage(ratio=1, share=0.5),), "num_segments": 4}, "sum to 1; received 0.5"),
        ({"stages": PAPER, "num_segments": 0}, "num_segments must be at least 1"),
        ({"stages": PAPER, "num_segments": 4, "mix_earlier": 1.0}, "mix_earlier must lie in"),
    ],
)
def test_a_curriculum_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**fields)
