"""`Plume` over the engine: backends, caches, precision, and what goes to other processes."""

from __future__ import annotations

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from plume import InputError, Plume, PlumeModel
from plume.embedder.digests import item_key, media_keys, medium_key
from plume.embedder.encode import prefetched
from plume.engine.lru import LRUCache
from plume.inputs.item import Item
from plume.threads import num_physical_cores


@pytest.fixture(scope="module")
def shown() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (112, 84, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture
def asked(shown) -> list:
    """Two images under several instructions, and text alone."""
    questions = ["which kite is red?", "what is blue?", "table"]
    return [*({"image": image, "text": text} for image in shown[:2] for text in questions), "red kite", shown[2]]


@pytest.fixture(scope="module")
def plain(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


def test_backends_differ_by_rounding_alone(plume_folder, plain, asked):
    torch_layers = Plume(plume_folder, device="cpu", backend="torch")
    assert torch_layers.engine is None
    assert plain.engine is not None
    for steps in (0, 3):
        expected = torch_layers.encode(asked, num_latent_steps=steps)
        assert np.abs(plain.encode(asked, num_latent_steps=steps) - expected).max() < 1e-5


@pytest.mark.parametrize("steps", [0, 4])
def test_vectors_are_the_same_to_the_bit_with_and_without_a_vector_cache(plume_folder, plain, asked, steps):
    cached = Plume(plume_folder, device="cpu", vector_cache_bytes=1 << 20)
    expected = plain.encode(asked, num_latent_steps=steps)
    ran = []
    run = cached.engine.run
    cached.engine.run = lambda layout: ran.append(len(layout.ids)) or run(layout)
    for _ in range(3):
        assert np.array_equal(cached.encode(asked, num_latent_steps=steps), expected)
    assert sum(ran) == len(asked)
    mixed = cached.encode(["blue", *reversed(asked), "kite"], num_latent_steps=steps)
    assert np.array_equal(mixed[1:-1], expected[::-1])
    assert np.abs(mixed[[0, -1]] - plain.encode(["blue", "kite"], num_latent_steps=steps)).max() < 1e-6
    assert sum(ran) == len(asked) + 2


def test_a_vector_is_known_by_all_that_decides_it(plume_folder, asked):
    cached = Plume(plume_folder, device="cpu", vector_cache_bytes=1 << 20)
    plain = Plume(plume_folder, device="cpu")
    one = asked[0]
    ways = [
        {},
        {"num_latent_steps": 1},
        {"instruction": "Find:"},
        {"truncate_dim": 16},
        {"processing_kwargs": {"image": {"size": {"shortest_edge": 784, "longest_edge": 3136}}}},
    ]
    for _ in range(2):
        for way in ways:
            assert np.array_equal(cached.encode([one], **way), plain.encode([one], **way))
    with torch.no_grad():
        for plume in (cached, plain):
            plume.plume_model.backbone.language_model.layers[0].mlp.down_proj.weight.mul_(2)
    assert np.array_equal(cached.encode([one]), plain.encode([one]))


def test_a_vector_is_known_by_the_length_that_the_embedder_cuts_it_to(plume_folder):
    cached = Plume(plume_folder, device="cpu", vector_cache_bytes=1 << 20)
    whole = cached.encode(["red", "kite"])
    with cached.truncate_sentence_embeddings(16):
        assert np.allclose(cached.encode(["red", "blue"])[0], whole[0, :16] / np.linalg.norm(whole[0, :16]))
    assert np.array_equal(cached.encode(["red", "kite"]), whole)
    assert torch.equal(cached.encode(["red"], convert_to_tensor=True), torch.from_numpy(whole[:1]))
    cached.vector_cache.clear()
    assert len(cached.vector_cache) == 0


def test_features_of_images_that_are_kept_are_to_the_bit_those_seen_anew(plume_folder, plain, asked, monkeypatch):
    cached = Plume(plume_folder, device="cpu", vision_cache_bytes=1 << 24)
    seen = []
    tower = cached.engine.tower
    monkeypatch.setattr(type(tower), "__call__", _spied(type(tower).__call__, seen))
    first = cached.encode(asked)
    assert len(seen) == 3
    assert np.abs(first - plain.encode(asked)).max() < 1e-6  # where images are packed: rounding
    seen.clear()
    for _ in range(2):
        assert np.array_equal(cached.encode(asked), first)
    assert len(seen) == 0
    forgets = Plume(plume_folder, device="cpu", vision_cache_bytes=1)
    for _ in range(2):
        assert np.array_equal(forgets.encode(asked), first)
    other = {"processing_kwargs": {"image": {"size": {"shortest_edge": 784, "longest_edge": 3136}}}}
    assert np.abs(cached.encode(asked, **other) - plain.encode(asked, **other)).max() < 1e-6


def _spied(call, seen):
    def spy(self, patches, *others):
        seen.append(len(patches))
        return call(self, patches, *others)

    return spy


@pytest.mark.parametrize("steps", [0, 4])
def test_a_prefix_is_read_once_for_all_instructions(plume_folder, plain, asked, steps):
    cached = Plume(plume_folder, device="cpu", prefix_cache_bytes=1 << 24)
    first = cached.encode(asked, num_latent_steps=steps)
    begun = len(cached.engine.prefix_cache.entries)
    assert begun == 3
    assert np.array_equal(cached.encode(asked, num_latent_steps=steps), first)
    assert len(cached.engine.prefix_cache.entries) == begun
    assert np.abs(first - plain.encode(asked, num_latent_steps=steps)).max() < 1e-5
    small = Plume(plume_folder, device="cpu", prefix_cache_bytes=1)
    assert np.array_equal(small.encode(asked, num_latent_steps=steps), first)
    assert len(small.engine.prefix_cache.entries) == 0


def test_all_caches_together_and_bounded(plume_folder, plain, shown):
    size = plain.plume_model.config.hidden_size * 4
    cached = Plume(
        plume_folder,
        device="cpu",
        vector_cache_bytes=10 * size,
        vision_cache_bytes=30_000,
        prefix_cache_bytes=30_000,
    )
    inputs = [{"image": shown[number % 3], "text": f"kite {number}"} for number in range(30)]
    assert np.abs(cached.encode(inputs, batch_size=4) - plain.encode(inputs, batch_size=4)).max() < 1e-5
    assert len(cached.vector_cache) == 10
    assert 0 < cached.engine.prefix_cache.entries.num_bytes <= 30_000
    assert 0 < cached.engine._features.num_bytes <= 30_000


def test_an_input_may_stop_early(plume_folder):
    stops = Plume(plume_folder, device="cpu", exit_tolerance=1e9)
    assert np.abs(stops.encode(["red"]) - stops.encode(["red"], num_latent_steps=1)).max() < 1e-6


def test_int8_is_close(plume_folder, plain, asked):
    found = Plume(plume_folder, device="cpu", int8=True).encode(asked)
    steps = 127 / (127 if torch.cpu._is_vnni_supported() else 63)  # how much coarser numbers are on this CPU
    # Half of a step is the error of a number, and the angle grows with it: its cosine falls with the square.
    assert 1 - 0.02 * steps**2 < (found * plain.encode(asked)).sum(axis=1).min() < 0.9999999


def test_weights_are_float32_on_a_cpu_unless_asked_otherwise(plume_folder, tmp_path):
    PlumeModel.from_pretrained(plume_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert Plume(tmp_path, device="cpu").plume_model.dtype == torch.float32
    asked = Plume(tmp_path, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    assert asked.plume_model.dtype == torch.bfloat16
    assert abs(np.linalg.norm(asked.encode("red")) - 1) < 1e-3


def test_a_model_that_a_call_moves_is_looked_at_again(plume_folder, asked):
    plume = Plume(plume_folder, device="cpu")
    expected = plume.encode(asked)
    stack = plume.engine.layers
    run = plume.engine.run

    def moved(layout):  # as `encode(device=...)` leaves it: the engine's weights are elsewhere
        plume._engine.device = torch.device("meta")
        return run(layout)

    plume._engine.run = moved
    assert np.array_equal(plume.encode(asked), expected)
    assert plume._engine.layers is not stack


def test_settings_without_effect_are_errors(plume_folder):
    with pytest.raises(ValueError, match='int8 is of the engine, which backend="torch" does not use'):
        Plume(plume_folder, device="cpu", backend="torch", int8=True)
    with pytest.raises(ValueError, match="backend must be"):
        Plume(plume_folder, device="cpu", backend="onnx")  # type: ignore[arg-type]


def test_a_model_that_the_engine_cannot_run_runs_as_before_with_a_warning(plume_folder):
    peft = pytest.importorskip("peft")
    plume = Plume(plume_folder, device="cpu")
    expected = plume.encode("red")
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), plume.plume_model.backbone
    )
    with pytest.warns(UserWarning, match="transformers' own layers run.*merge adapters first"):
        changed = plume.encode("red")
    assert np.abs(changed - expected).max() > 1e-4
    assert np.array_equal(changed, plume.encode("red"))
    assert plume.engine is None
    for module in list(plume.plume_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, peft.tuners.lora.Linear):
                child.merge()
                setattr(module, name, child.get_base_layer())
    assert np.abs(plume.encode("red") - changed).max() < 1e-5
    assert plume.engine is not None


def test_gradients_go_through_the_model_itself(plain):
    batch = dict(plain.plume_model.processor.encode([Item.parse("red")]))
    with torch.enable_grad():
        assert plain.forward(batch)["sentence_embedding"].requires_grad
    with torch.no_grad():
        assert not plain.forward(batch)["sentence_embedding"].requires_grad


def test_an_embedder_can_be_copied_and_sent_to_another_process(plume_folder, asked):
    plume = Plume(plume_folder, device="cpu", vector_cache_bytes=1 << 20, vision_cache_bytes=1 << 20)
    expected = plume.encode(asked)
    for again in (copy.deepcopy(plume), pickle.loads(pickle.dumps(plume))):
        assert np.array_equal(again.encode(asked), expected)


def test_keys_tell_contents_apart(shown):
    image, other = shown[:2]
    assert medium_key(image) == medium_key(image.copy()) != medium_key(other)
    assert medium_key(image) != medium_key(image, {"longest_edge": 784})
    contents = [("ab",), ("a", "b"), (image, "ab"), ("ab", image), (other, "ab")]
    assert len({item_key(Item(one)) for one in contents} | {item_key(Item(("ab",), "Find:"))}) == 6
    assert media_keys([Item((image, "a", other))]) == [([medium_key(image), medium_key(other)], [])]


def test_what_is_kept_stays_within_its_bounds():
    kept: LRUCache[bytes] = LRUCache(max_items=3, max_bytes=10, size_of=len)
    for number in range(5):
        kept.put(number, b"aa")
    assert [kept.get(number) is None for number in range(5)] == [True, True, False, False, False]
    kept.get(2)
    kept.put(5, b"aaaaaaaa")  # 2, used last, is all that fits beside it
    assert kept.num_bytes == 10
    assert kept.get(2) == b"aa"
    kept.put(6, b"a" * 11)
    assert kept.get(6) is None
    assert kept.get(5) is not None
    kept.put(5, b"a")
    assert kept.num_bytes == 3


def test_threads_are_no_more_than_the_cores_that_this_process_may_use():
    assert 1 <= num_physical_cores() <= len(os.sched_getaffinity(0))


def test_inputs_are_loaded_one_portion_ahead_and_errors_come_through():
    made = []

    def numbers():
        for number in range(4):
            made.append(number)
            yield number
        raise ValueError("the fifth")

    with ThreadPoolExecutor(1) as thread:
        ahead = prefetched(thread, numbers())
        assert next(ahead) == 0
        assert next(ahead) == 1
        assert len(made) <= 3
        with pytest.raises(ValueError, match="the fifth"):
            list(ahead)


def test_a_tokenizer_may_be_asked_by_two_threads(plume_folder):
    processor = Plume(plume_folder, device="cpu").plume_model.processor
    short, long = [Item(("red",)), Item(("red " * 60,))], Item(("kite " * 6000,))

    def pads() -> None:
        for _ in range(150):
            processor.encode(short)

    def counts() -> None:
        for _ in range(60):
            with pytest.raises(InputError):
                processor.fit(long)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(pads), threads.submit(counts)]:
            done.result()


def test_caches_know_the_sizes_that_the_processor_is_set_to(plume_folder, picture):
    image = picture(300, 200)
    every = Plume(
        plume_folder,
        device="cpu",
        vector_cache_bytes=1 << 20,
        vision_cache_bytes=1 << 20,
        prefix_cache_bytes=1 << 20,
    )
    before = every.encode(image)
    for edges in ((3136, 7840), (200_000, 300_000)):
        plain = Plume(plume_folder, device="cpu")
        for one in (every, plain):
            sizes = one.plume_model.processor.image_processor.size
            one[0].processor.image_processor.size = type(sizes)(shortest_edge=edges[0], longest_edge=edges[1])
            one.plume_model.processor.image_processor.size = one[0].processor.image_processor.size
        assert np.abs(every.encode(image) - plain.encode(image)).max() < 1e-6
        assert not np.allclose(every.encode(image), before, atol=1e-5)
