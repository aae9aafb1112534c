"""What the model reads: the layout of the published checkpoints, and our own short one."""

from __future__ import annotations

import pytest

from plume import Item, PlumeConfig, PlumeModel
from plume.inputs.prompt import suffix

PUBLISHED = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}\n<disc_emb>\n"
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First output "
    "the thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. "
    "Finally, use the <gen_emb> tag to represent the entire input.<|im_end|>\n<|im_start|>assistant\n<think><bot>"
)


@pytest.fixture(scope="module")
def processor(backbone_folder):
    return PlumeModel.from_backbone(str(backbone_folder)).processor


@pytest.mark.parametrize(
    ("raw", "content"),
    [
        pytest.param("hello", "hello", id="text"),
        pytest.param({"text": "a cat", "instruction": "Find it:"}, "Find it: a cat", id="text with instruction"),
        pytest.param({"text": 'says "{x}" \\n\nbye'}, 'says "{x}" \\n\nbye', id="characters that templates use"),
    ],
)
def test_the_prefix_of_a_text_is_the_published_one(processor, raw, content):
    assert processor.write([Item.parse(raw)]) == [PUBLISHED.format("@").replace("@", content)]


def test_media_stand_before_the_text_and_an_instruction_between(processor, picture):
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    raw = {"image": [picture(), picture()], "text": "which?", "instruction": "Compare:"}
    assert processor.write([Item.parse(raw)]) == [PUBLISHED.format(f"{image}{image}Compare: which?")]
    only_image = Item.parse({"image": picture(), "instruction": "Describe."})
    assert processor.write([only_image]) == [PUBLISHED.format(f"{image}Describe.")]


def test_a_prompt_of_sentence_transformers_lands_in_the_user_turn(processor):
    messages = [{"role": "system", "content": "query: "}, {"role": "user", "content": "red"}]
    assert processor.apply_chat_template(messages) == PUBLISHED.format("query: red")


def test_the_chat_template_writes_what_the_processor_writes(processor, picture):
    messages = [
        {"role": "system", "content": " Compare "},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture()},
                {"type": "text", "text": "this\n"},
                {"type": "video", "video": [picture()] * 2},
                {"type": "text", "text": "that"},
            ],
        },
    ]
    for one in (messages, messages[1:], [messages[0], {"role": "user", "content": messages[1]["content"][:1]}]):
        assert processor.apply_chat_template(one) == processor.write([processor.parse(one)])[0]


def test_an_image_takes_as_many_placeholders_as_visual_tokens(processor, picture):
    batch = processor.encode([Item.parse(picture(84, 56)), Item.parse("red")])
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (batch["input_ids"] == image_id).sum(dim=1).tolist() == [6, 0]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert not batch["attention_mask"][1, 0]  # padded on the left
    assert batch["attention_mask"][:, -1].all()


@pytest.mark.parametrize(
    ("rationale", "answer", "end_turn", "expected"),
    [
        ("", "", False, "<eot></think>\n<gen_emb>"),
        ("", "", True, "<eot></think>\n<gen_emb><|im_end|>\n"),
        ("", "A cat.", True, "<eot></think><answer>A cat.</answer>\n<gen_emb><|im_end|>\n"),
        ("", "A cat.\n<gen_emb>", True, "<eot></think><answer>A cat.\n<gen_emb></answer><|im_end|>\n"),
        (
            "Rest of text.",
            "A cat.",
            True,
            "<eot>Rest of text.</think><answer>A cat.</answer>\n<gen_emb><|im_end|>\n",
        ),
    ],
)
def test_suffixes_are_those_of_the_method(rationale, answer, end_turn, expected):
    assert suffix(PlumeConfig(), rationale, answer, end_turn) == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt_template", "{content}<bot>", "must hold {content} once and <disc_emb>"),
        ("prompt_template", "{content}<disc_emb>", "end with <bot>"),
        ("suffix_template", "{rationale}", "must start with <eot>"),
        ("read_out", "\n", "must hold <gen_emb>"),
        ("top_k", 5, "top_k must lie in 1..num_experts=4; received 5"),
        ("transition", "lstm", "transition must be one of 'moe'"),
        ("num_latent_steps", 33, "exceeds the step table"),
        ("num_latent_steps", -1, ">= 0; received -1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        PlumeConfig(**{field: value})
