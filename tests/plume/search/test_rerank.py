"""A second look at the best rows: their order, what is given to it, and what it cannot judge."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from plume import Index, Plume
from plume.cli.main import app
from plume.search.query import All, Any, Like, Not
from plume.search.rerank import CrossEncoderReranker, asked_of, document_of


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("library"), np.random.default_rng(0)
    for number in range(20):
        (root / f"{number:02}.txt").write_text(" ".join(rng.choice(["kite", "red", "blue", "table", "hill"], 6)))
    Image.new("RGB", (60, 60), "red").save(root / "red.png")
    Image.new("RGB", (60, 60), "white").save(root / "blank.pdf")
    (root / "long.md").write_text("\n\n".join(f"a kite {at} over the hill, what is it to see" for at in range(30)))
    return root


@pytest.fixture(scope="module")
def index(library, plume, tmp_path_factory) -> Index:
    index = Index.create(tmp_path_factory.mktemp("made") / "index", plume, passage_tokens=40)
    index.update(library, plume, show_progress=False)
    return index


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """A tiny cross-encoder of random weights, saved as sentence-transformers saves one."""
    from sentence_transformers import CrossEncoder
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "kite",
        "red",
        "blue",
        "table",
        "hill",
        "a",
        "over",
        "the",
        "what",
        "is",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("cross") / "encoder"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=512, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    model = CrossEncoder(str(folder), device="cpu")
    model.save_pretrained(str(folder))
    return folder


def test_the_best_rows_are_ordered_by_the_reranker_and_keep_their_cosines(index, plume):
    plain = index.search("a red kite", plume, top_k=12)
    seen = []

    def backwards(query, hits):
        seen.append((query, len(hits)))
        return [-hit.score for hit in hits]

    found = index.search("a red kite", plume, top_k=5, rerank=backwards, rerank_k=12)
    assert seen == [("a red kite", 12)]
    assert [hit.row for hit in found] == [hit.row for hit in plain][::-1][:5]
    assert [hit.rerank_score for hit in found] == [-hit.score for hit in found]
    assert found[0].to_dict()["rerank_score"] == found[0].rerank_score
    assert "rerank_score" not in plain[0].to_dict()
    whole = index.search(All("a red kite", "blue"), plume, top_k=100, rerank=backwards)
    assert len(whole) == len(index.store.rows(["name"]))


def test_no_more_rows_are_reranked_than_asked_for(index, plume):
    plain = index.search("a red kite", plume, top_k=15)
    found = index.search(
        "a red kite", plume, top_k=15, rerank=lambda query, hits: [-hit.score for hit in hits], rerank_k=4
    )
    assert [hit.row for hit in found] == [hit.row for hit in [*plain[:4][::-1], *plain[4:]]]
    assert [hit.rerank_score is not None for hit in found] == [True] * 4 + [False] * 11


def test_a_query_is_given_by_what_is_wanted_of_it(library):
    picture = Image.open(library / "red.png")
    assert asked_of({"text": "a kite"}) == asked_of("a kite") == "a kite"
    assert asked_of(All("a kite", Any("blue", Not("red")))) == "a kite blue"
    assert asked_of({"image": picture, "text": "blue"})["text"] == "blue"
    assert asked_of(library / "red.png")["image"].size == (60, 60)
    for query in (Like("x"), Not("a kite"), {"image": [picture, picture]}):
        with pytest.raises(ValueError, match="reads words or one image"):
            asked_of(query)


def test_what_cannot_be_judged_stands_behind_in_its_own_order(index, plume):
    plain = index.search("a red kite", plume, top_k=10)

    def some(query, hits):
        return [np.nan if at % 2 else at for at in range(len(hits))]

    found = index.search("a red kite", plume, top_k=10, rerank=some, rerank_k=10)
    assert [hit.row for hit in found] == [hit.row for hit in [*plain[::2][::-1], *plain[1::2]]]
    assert [hit.rerank_score for hit in found[5:]] == [None] * 5


def test_another_number_of_scores_is_refused(index, plume):
    with pytest.raises(ValueError, match=r"scores of shape \[1\] for 50 hits"):
        index.search("a red kite", plume, rerank=lambda query, hits: [1.0])
    with pytest.raises(ValueError, match="rerank_k must be at least 1"):
        index.search("a red kite", plume, rerank=lambda query, hits: [1.0], rerank_k=0)


def test_a_reranker_sees_what_the_files_hold(index, plume, library):
    of_name = {}
    for hit in index.search("a red kite", plume, top_k=100):
        of_name.setdefault(hit.path.rpartition("/")[2], hit)
    assert document_of(of_name["03.txt"]) == (library / "03.txt").read_text()
    assert document_of(of_name["red.png"]).size == (60, 60)
    assert isinstance(document_of(of_name["blank.pdf"]), Image.Image)
    passage = of_name["long.md"]
    assert document_of(passage) == (library / "long.md").read_text()[int(passage.start) : int(passage.end)]


def test_a_cross_encoder_of_sentence_transformers_orders_texts(index, plume, cross_encoder, library):
    reranker = CrossEncoderReranker(cross_encoder, device="cpu")
    found = index.search("a red kite", plume, top_k=100, rerank=reranker, rerank_k=100, where="kind = 'text'")
    texts = [document_of(hit) for hit in found]
    expected = reranker.model.predict([("a red kite", text) for text in texts], show_progress_bar=False)
    np.testing.assert_allclose([hit.rerank_score for hit in found], expected, atol=1e-5)
    assert list(expected) == sorted(expected, reverse=True)
    told = index.search({"text": "a red kite"}, plume, top_k=3, rerank=reranker, where="kind = 'text'")
    assert [hit.row for hit in told] == [hit.row for hit in found[:3]]


def test_the_command_line_reranks(index, plume_folder, cross_encoder):
    words = ["search", "a red kite", "--index", str(index.path), "--model", str(plume_folder), "--kind", "text"]
    result = CliRunner().invoke(
        app, [*words, "--rerank", str(cross_encoder), "--rerank-k", "9", "--top-k", "5", "--json"]
    )
    assert result.exit_code == 0, result.output
    scores = [json.loads(line)["rerank_score"] for line in result.stdout.splitlines()]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 5
