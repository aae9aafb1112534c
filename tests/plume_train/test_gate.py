"""`plume-train gate`: who thinks, learnt from which vector is better."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from plume import Plume, PlumeModel
from plume.search.index import Index
from plume_eval.mmeb.content import Content
from plume_eval.mmeb.embedders import PlumeEmbedder
from plume_eval.pairs import PairsEvaluation
from plume_train import gate as module
from plume_train.data.records import Records
from plume_train.gate import Measured, curve, fit, gate, measure
from plume_train.run import train
from tests.plume_train.runs import settings

WORDS = ["red", "kite", "blue", "bird", "table", "rain", "sun", "sea"]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [{"query": f"{one} {other}", "target": other, "task": "t"} for one in WORDS for other in WORDS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_which_vector_is_better_is_seen_among_the_targets_of_the_task(data, plume_folder):
    plume = Plume(plume_folder, device="cpu")
    steps = plume.plume_config.num_latent_steps
    anchors, found = measure(plume, Records(data), batch_size=5)
    queries = [f"{one} {other}" for one in WORDS for other in WORDS]
    targets = plume.encode_document(WORDS)
    own = np.tile(np.arange(len(WORDS)), len(WORDS))
    for place, count in ((0, 0), (1, steps)):
        cosines = plume.encode_query(queries, num_latent_steps=count) @ targets.T
        others = cosines.copy()
        others[np.arange(len(own)), own] = -2
        assert [one.is_right[place] for one in found] == (cosines[np.arange(64), own] > others.max(axis=1)).tolist()
        logits = cosines / module.TEMPERATURE
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(64), own]
        assert np.allclose([one.loss[place] for one in found], losses, atol=1e-3)
    with torch.no_grad():
        batch = plume.plume_model.processor.encode([plume.plume_model.processor.parse(queries[9], "a query")])
        assert np.allclose(anchors[9], plume.plume_model(**batch).anchor_embedding[0], atol=1e-5)


def test_a_gate_finds_a_direction_that_tells_them_apart():
    generator = np.random.default_rng(0)
    anchors = generator.normal(size=(1000, 16))
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    anchors = anchors[np.abs(anchors[:, 3] - 0.1) > 0.02]  # none too near the border
    helps = anchors[:, 3] > 0.1
    weight, bias = fit(anchors[:700], helps[:700])
    assert ((anchors[700:] @ weight + bias > 0) == helps[700:]).mean() > 0.95


def test_the_curve_ends_where_nobody_and_everybody_thinks():
    """Four queries: steps help the first two, harm the third, and change nothing for the last."""
    measured = [
        Measured((False, True), (2.0, 0.1), 0.1),
        Measured((False, True), (2.0, 0.1), 0.2),
        Measured((True, False), (0.1, 2.0), 0.9),
        Measured((True, True), (0.1, 0.1), 0.8),
    ]
    points = {point.share: point for point in curve(measured, np.array([4.0, 3.0, 1.0, 2.0]), 8)}
    assert (points[0.0].gate, points[0.0].rule, points[0.0].chance) == (0.5, 0.5, 0.5)
    assert (points[1.0].gate, points[1.0].rule, points[1.0].chance) == (0.75, 0.75, 0.75)
    assert points[0.5].gate == points[0.5].rule == 1.0  # both leave out the third
    assert points[0.5].chance == 0.625
    assert points[0.5].mean_latent_steps == 4.0


def test_the_model_with_its_gate_thinks_about_the_share_that_was_asked_for(data, plume_folder, tmp_path, capsys):
    assert gate([str(plume_folder), "--data", str(data), "--out", str(tmp_path / "out"), "--share", "0.4",
                 "--anyway"]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "100%" in told
    written = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert written["num_queries"] == 19  # of 64, 30 % are held out
    assert len(written["curve"]) == 11
    plain, gated = Plume(plume_folder, device="cpu"), Plume(tmp_path / "out", device="cpu")
    assert 0 < gated.plume_config.gate_threshold < 1
    queries = [f"{one} {other}" for one in WORDS for other in WORDS]
    with torch.no_grad():
        batch = gated.plume_model.processor.encode([gated.plume_model.processor.parse(one, "") for one in queries])
        thinks = gated.plume_model(**batch).num_latent_steps > 0
    assert 0.2 < thinks.float().mean() < 0.6
    steps = plain.plume_config.num_latent_steps
    expected = np.where(
        thinks[:, None], plain.encode(queries, num_latent_steps=steps), plain.encode(queries, num_latent_steps=0)
    )
    for found in (gated.encode(queries), gated.encode_query(queries)):
        assert np.abs(found - expected).max() < 1e-5
    torch_backend = Plume(tmp_path / "out", device="cpu", backend="torch")
    assert np.abs(torch_backend.encode(queries) - expected).max() < 1e-5
    # Documents take all, and so does who is told to.
    for found in (gated.encode_document(queries), gated.encode(queries, num_latent_steps=steps)):
        assert np.abs(found - plain.encode(queries)).max() < 1e-5
    assert gated.fingerprint != plain.fingerprint
    cached = Plume(tmp_path / "out", device="cpu", vector_cache_bytes=10**6)  # knows who asked
    assert np.abs(cached.encode_query(queries) - expected).max() < 1e-5
    assert np.abs(cached.encode_document(queries) - plain.encode(queries)).max() < 1e-5
    assert np.abs(cached.encode_query(queries) - expected).max() < 1e-5


@pytest.fixture
def gated_folder(plume_folder, tmp_path):
    """A checkpoint whose gate, by the first number of the anchor, lets some words think and others not."""
    model = PlumeModel.from_pretrained(plume_folder)
    gated, _ = model.reconfigured(gate_threshold=0.5, document_latent_steps=1)
    with torch.no_grad():
        gated.gate.weight.zero_()
        gated.gate.weight[0] = 1.0
        gated.gate.bias.zero_()
        batch = model.processor.encode([model.processor.parse(word, "") for word in WORDS])
        first = gated(**batch, num_latent_steps=0).anchor_embedding[:, 0]
        gated.gate.bias.fill_(-first.median().item())
        assert 0 < (gated(**batch).num_latent_steps > 0).sum() < len(WORDS)
    gated.save_pretrained(tmp_path / "gated")
    return tmp_path / "gated"


def test_a_gate_holds_in_an_index_for_queries(gated_folder, tmp_path):
    plume = Plume(gated_folder, device="cpu")
    (tmp_path / "notes").mkdir()
    for word in WORDS:
        (tmp_path / "notes" / f"{word}.txt").write_text(word)
    index = Index.create(tmp_path / "index", plume)
    index.update(tmp_path / "notes", plume, show_progress=False)
    assert Index.open(tmp_path / "index").identity.query_latent_steps is None
    assert index.identity.num_latent_steps == 1
    documents = plume.encode_document(WORDS)
    for word in WORDS:
        scores = {hit.excerpt: hit.score for hit in index.search(word, plume)}
        expected = dict(zip(WORDS, documents @ plume.encode_query(word), strict=True))
        assert scores == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="query_latent_steps=None; this call uses query_latent_steps=2"):
        index.search("kite", plume, num_latent_steps=2)


def test_a_gate_holds_where_a_checkpoint_is_measured(gated_folder, data):
    plume = Plume(gated_folder, device="cpu")
    model = plume.plume_model.eval()
    steps = model.config.num_latent_steps
    numbers = PairsEvaluation(data)(model, 0, steps)
    assert {"recall_at_1_latent", "recall_at_1_latent_gated", "recall_at_1_single_pass"} <= numbers.keys()
    queries = [f"{one} {other}" for one in WORDS for other in WORDS]
    nearest = (plume.encode_query(queries) @ plume.encode_document(WORDS).T).argmax(axis=1)
    assert numbers["recall_at_1_latent_gated"] == pytest.approx((nearest == np.tile(np.arange(8), 8)).mean())
    embedder = PlumeEmbedder(str(gated_folder), device="cpu")
    assert embedder.name.endswith("_Kgated-1")
    found = embedder.embed([Content(text=word) for word in WORDS], "query")
    assert np.allclose(found.vectors, plume.encode_query([Content(text=word).input for word in WORDS]), atol=1e-5)
    assert 0 < found.reasoning_steps < steps * len(WORDS)
    assert found.reasoning_steps % steps == 0
    told = PlumeEmbedder(str(gated_folder), device="cpu", num_latent_steps=steps)
    assert told.name.endswith(f"_K{steps}-1")


def test_the_card_says_who_takes_how_many_steps(gated_folder):
    card = (gated_folder / "README.md").read_text()
    assert "4 by default, 1 for documents (`encode_document`), none for inputs whose gate says less than 0.5" in card


def test_a_gate_does_not_change_where_its_model_is_trained_further(data, plume_folder, tmp_path, start, hops_folder):
    gated, _ = PlumeModel.from_pretrained(plume_folder).reconfigured(gate_threshold=0.25)
    with torch.no_grad():
        gated.gate.weight.fill_(0.5)
    gated.save_pretrained(tmp_path / "gated")
    train(settings(tmp_path, tmp_path / "gated", hops_folder, plume_config={}, max_steps=2, stage_ratios=None,
                   stage_shares=None, curriculum="direct"))  # fmt: skip
    found = PlumeModel.from_pretrained(tmp_path / "out")
    assert found.config.gate_threshold == 0.25
    assert torch.equal(found.gate.weight, gated.gate.weight)


def test_what_cannot_be_decided_is_said(data, plume_folder, tmp_path, monkeypatch, capsys):
    single, _ = PlumeModel.from_pretrained(plume_folder).reconfigured(num_latent_steps=0)
    single.save_pretrained(tmp_path / "single")
    command = ["--data", str(data), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="takes its steps in one pass, or none, so that there is nothing to decide"):
        gate([str(tmp_path / "single"), *command])
    with pytest.raises(ValueError, match=r"latent steps help every query of .*, so that a gate has nothing to tell"):
        gate([str(plume_folder), *command, "--least-gain=-1000"])
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        gate([str(plume_folder), "--data", str(data), "--out", str(tmp_path / "single")])
    with pytest.raises(SystemExit):
        gate([str(plume_folder), *command, "--share", "1"])
    assert "--share is 1; expected a number between 0 and 1" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(module, "fit", lambda anchors, helps: (np.zeros(anchors.shape[1]), 0.0))
    monkeypatch.setattr(module, "curve", lambda *args: [module.Point(0.5, 1.0, 0.1, 0.1, 0.2)])
    assert gate([str(plume_folder), *command]) == 1
    assert "no better than chance, and nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_documents_take_as_many_steps_as_targets_did(plume_folder, tmp_path, start, hops_folder):
    train(settings(tmp_path, start, hops_folder, target_steps=0, max_steps=10))
    plume = Plume(tmp_path / "out", device="cpu")
    assert (plume.default_steps("query"), plume.default_steps("document")) == (2, 0)
    assert np.array_equal(plume.encode_document("red"), plume.encode_document("red", num_latent_steps=0))
    assert np.array_equal(plume.encode_query("red"), plume.encode_query("red", num_latent_steps=2))
    with pytest.raises(ValueError, match="num_latent_steps differs for queries and documents; call encode_query"):
        plume.encode("red")
    assert len(plume.encode("red", num_latent_steps=1))
    plume.save(str(tmp_path / "again"))
    assert Plume(tmp_path / "again", device="cpu").default_steps("document") == 0
