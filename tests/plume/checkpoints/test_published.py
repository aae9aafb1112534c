"""Published PLUME checkpoints, against an independent reading of them: one sample at a time, no padding, no cache."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from plume import Plume, PlumeModel
from plume.random_models import SHORT_STRINGS, save_tiny_backbone

WIDTH, EXPERTS, STEPS_TABLE = 32, 4, 32
NEW_TOKENS = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")
STOCK_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}\n<disc_emb>\n"
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First output the "
    "thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. Finally, use "
    "the <gen_emb> tag to represent the entire input.<|im_end|>\n<|im_start|>assistant\n<think><bot>"
)
SUFFIX = "<eot></think>\n<gen_emb>"


def save_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """A slow Qwen2 tokenizer without merges, so that each byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    known = {token: 256 + i for i, token in enumerate((*STOCK_TOKENS, *PADS, *NEW_TOKENS))}
    (folder / "added_tokens.json").write_text(json.dumps(known))
    decoder = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in NEW_TOKENS,
        }
        for token, i in known.items()
    }
    settings = {
        "added_tokens_decoder": decoder,
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 32768,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Qwen2Tokenizer.from_pretrained(folder)


def adapter_tensors(shared: bool) -> dict[str, torch.Tensor]:
    shapes = {
        "ln.weight": (WIDTH,),
        "ln.bias": (WIDTH,),
        "step_embed.weight": (STEPS_TABLE, WIDTH),
        "router.weight": (EXPERTS, 2 * WIDTH),
        "router.bias": (EXPERTS,),
    }
    for name in [f"experts.{m}" for m in range(EXPERTS)] + ["shared_expert"] * shared:
        shapes |= {
            f"{name}.fc1.weight": (2 * WIDTH, WIDTH),
            f"{name}.fc1.bias": (2 * WIDTH,),
            f"{name}.fc2.weight": (WIDTH, 2 * WIDTH),
            f"{name}.fc2.bias": (WIDTH,),
        }
    return {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def save_published(
    folder: Path, layout: str = "4.49", tied: bool = True, shared: bool = True, num_steps: int | None = 3
) -> Path:
    """A tiny checkpoint with the file names, the keys and the flat configuration of the published ones."""
    folder.mkdir()
    tokenizer = save_tokenizer(folder)
    ids = tokenizer.get_vocab()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    places = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": tied,
    }
    flat = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **text,
        **places,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"model_type": "qwen2_vl", **vision},
        "torch_dtype": "float32",
        "transformers_version": "4.49.0",
    }
    (folder / "config.json").write_text(json.dumps(flat))
    stock = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = {}
    for name, tensor in stock.state_dict().items():
        if name == "lm_head.weight":
            if not tied:
                weights[name] = tensor
        elif layout == "4.49":
            weights[name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")] = tensor
        else:
            weights[name] = tensor
    adapter = {f"latent_moe_transition.{name}": tensor for name, tensor in adapter_tensors(shared).items()}
    weights = {name: tensor.contiguous().clone() for name, tensor in (weights | adapter).items()}
    names = sorted(weights)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate(parts)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    if num_steps is not None:
        history = [{"curriculum_latent_tokens": 1.0}, {"loss": 0.5}, {"curriculum_latent_tokens": num_steps + 0.1}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


class Oracle:
    """The method, step by step, on the tensors of the files: every pass reads the whole sequence again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        self.images = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=2359296)
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        self.adapter = {
            name.split("transition.")[1]: tensor for name, tensor in weights.items() if "latent_moe" in name
        }
        stock = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
        renamed = {}
        for name, tensor in weights.items():
            if name.startswith(("visual.", "model.visual.")):
                renamed["model.visual." + name.split("visual.", 1)[1]] = tensor
            elif name.startswith("model."):
                renamed["model.language_model." + name.replace("language_model.", "")[len("model.") :]] = tensor
        missing, unexpected = stock.load_state_dict(renamed, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        self.model = stock.model.eval()

    def transition(self, state: torch.Tensor, step: int, context: torch.Tensor) -> torch.Tensor:
        a = self.adapter
        router_input = torch.cat([state + context, a["step_embed.weight"][step]])
        gates = torch.softmax(a["router.weight"] @ router_input + a["router.bias"], dim=0)
        centred = state - state.mean()
        normed = centred / torch.sqrt((centred**2).mean() + 1e-5) * a["ln.weight"] + a["ln.bias"]

        def expert(name: str) -> torch.Tensor:
            inner = a[f"{name}.fc1.weight"] @ normed + a[f"{name}.fc1.bias"]
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            return a[f"{name}.fc2.weight"] @ inner + a[f"{name}.fc2.bias"]

        out = state + (expert("shared_expert") if "shared_expert.fc1.weight" in a else 0)
        for m in sorted(range(EXPERTS), key=lambda m: -gates[m].item())[:2]:
            out = out + gates[m] * expert(f"experts.{m}")
        return out

    def run(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False
        ).last_hidden_state[0]

    @torch.no_grad()
    def embed(self, text: str, image: Image.Image | None, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Text alone has a white image of 28 x 28 before it, which evaluation enlarges to 56 x 56.
        image = Image.new("RGB", (28, 28), "white").resize((56, 56)) if image is None else image
        seen = self.images(image, return_tensors="pt")
        _, rows, columns = (seen["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
        pads = "<|image_pad|>" * (rows * columns)
        prefix = PROMPT.format(f"<|vision_start|>{pads}<|vision_end|>{text}")
        ids = torch.tensor(self.tokenizer(prefix)["input_ids"])
        embeds = self.model.get_input_embeddings()(ids).clone()
        is_image = ids == self.tokenizer.get_vocab()["<|image_pad|>"]
        embeds[is_image] = self.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output

        positions, following, visual = [], 0, 0
        for pad in is_image.tolist():
            if pad:
                positions.append([following, following + visual // columns, following + visual % columns])
                visual += 1
                if visual == rows * columns:
                    following += max(rows, columns)
            else:
                positions.append([following] * 3)
                following += 1
        positions = torch.tensor(positions).T
        length = len(ids)

        hidden = self.run(embeds, positions)
        anchor_column = int((ids == self.tokenizer.get_vocab()["<disc_emb>"]).nonzero()[-1])
        context, state = hidden[anchor_column], hidden[-1]
        for step in range(num_steps):
            embeds = torch.cat([embeds, self.transition(state, step, context)[None]])
            positions = torch.cat([positions, torch.full((3, 1), length + step)], dim=1)
            state = self.run(embeds, positions)[-1]
        for j, token in enumerate(self.tokenizer(SUFFIX)["input_ids"]):
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([token]))])
            positions = torch.cat([positions, torch.full((3, 1), length + num_steps + j)], dim=1)
        read_out = self.run(embeds, positions)[-1]
        return read_out / read_out.norm(), context / context.norm()


def noise(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(1).randbytes(width * height * 3))


CASES = {
    "4.49 tied": {},
    "4.52 tied": {"layout": "4.52"},
    "4.49 untied, no shared expert": {"tied": False, "shared": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_published_checkpoint_gives_the_vectors_of_the_method(tmp_path, case):
    folder = save_published(tmp_path / "published", **case)
    model = PlumeModel.from_pretrained(folder).eval()
    assert model.config.num_latent_steps == 3
    oracle = Oracle(folder)
    inputs = [("a red kite over the sea", None), ("which bird?", noise(140, 84)), ("", noise(56, 112))]
    items = [model.processor.parse({"text": text, "image": image}) for text, image in inputs]
    with torch.no_grad():
        output = model(**model.processor.encode(items))
    for row, (text, image) in enumerate(inputs):
        embedding, anchor = oracle.embed(text, image, 3)
        assert torch.allclose(output.embedding[row], embedding, atol=2e-5)
        assert torch.allclose(output.anchor_embedding[row], anchor, atol=2e-5)
    assert (output.embedding[0] - output.embedding[1]).norm() > 1e-2


def test_a_converted_checkpoint_is_the_same_model(tmp_path):
    folder = save_published(tmp_path / "published")
    direct = PlumeModel.from_pretrained(folder).eval()
    direct.save_pretrained(tmp_path / "converted")
    expected = direct(**direct.processor.encode([direct.processor.parse("a red kite")])).embedding
    plume = Plume(tmp_path / "converted", device="cpu", backend="torch")
    assert torch.equal(plume.encode(["a red kite"], convert_to_tensor=True), expected)
    assert plume.plume_config.latent_positions == "kv_length"


@pytest.mark.parametrize(("num_steps", "expected"), [(None, 8), (6, 6), (0, 0)])
def test_the_number_of_steps_comes_from_the_trainers_log_else_is_eight(tmp_path, num_steps, expected):
    folder = save_published(tmp_path / "published", num_steps=num_steps)
    assert PlumeModel.from_pretrained(folder).config.num_latent_steps == expected


def edit(folder: Path, change) -> None:
    """Rewrite the tensors of the first shard."""
    file = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


BROKEN = {
    "unknown tensor": (lambda w: w.update({"mystery.weight": torch.zeros(1)}), "mystery.weight belongs to no part"),
    "unknown layer": (
        lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(48, WIDTH)}),
        "unexpected keys, for example backbone.language_model.layers.7",
    ),
    "missing tensor": (
        lambda w: w.pop(next(name for name in w if "model.layers.0.mlp" in name)),
        "missing keys, for example backbone.language_model.layers.0.mlp",
    ),
    "missing router": (lambda w: w.pop("latent_moe_transition.router.weight"), "no adapter tensor router.weight"),
    "missing expert": (
        lambda w: [w.pop(name) for name in list(w) if "experts.3" in name],
        r"4 rows, the experts are \[0, 1, 2\]",
    ),
    "head that is not tied": (
        lambda w: w.update({"lm_head.weight": torch.zeros(268, WIDTH)}),
        "ties the output head to the embeddings",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_tensor_is_accounted_for(tmp_path, name):
    folder = save_published(tmp_path / "published")
    change, message = BROKEN[name]
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        PlumeModel.from_pretrained(folder)


def test_a_damaged_file_of_weights_is_named(tmp_path):
    folder = save_published(tmp_path / "published")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is damaged .*; copy it again"):
        PlumeModel.from_pretrained(folder)


@pytest.mark.parametrize("lost", ["preprocessor_config.json", "vocab.json"])
def test_a_file_that_cannot_be_fetched_is_named(tmp_path, lost):
    folder = save_published(tmp_path / "published")
    (folder / lost).unlink()
    with pytest.raises(ValueError, match="copy it there from the base model"):
        PlumeModel.from_pretrained(folder)


def test_a_token_that_is_missing_is_named(tmp_path):
    folder = save_published(tmp_path / "published")
    for file in ("added_tokens.json", "tokenizer_config.json"):
        path = folder / file
        path.write_text(path.read_text().replace("<eot>", "<other>"))
    with pytest.raises(ValueError, match="no token '<eot>'"):
        PlumeModel.from_pretrained(folder)


def test_the_embedder_says_how_to_convert(tmp_path):
    folder = save_published(tmp_path / "published")
    with pytest.raises(ValueError, match="plume convert"):
        Plume(folder)


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    "keys", [{"min_pixels": 3136, "max_pixels": 12_845_056}, {"min_pixels": 3136}, {"max_pixels": 1}]
)
def test_pixel_limits_of_a_file_yield_to_the_callers(tmp_path, keys):
    """transformers 4.52 writes them, and inside the library's processor they override the size that it is given."""
    folder = save_published(tmp_path / "published")
    edit_json(folder / "preprocessor_config.json", **keys, size={"shortest_edge": 9, "longest_edge": 99})
    imported = PlumeModel.from_pretrained(folder)
    assert dict(imported.processor.image_processor.size) == {"shortest_edge": 3136, "longest_edge": 2_359_296}
    grid = imported.processor.encode([imported.processor.parse(Image.new("RGB", (2000, 1600)))])["image_grid_thw"]
    assert grid.tolist() == [[1, 98, 122]]

    save_tiny_backbone(tmp_path / "stock", ["red"])
    processor_file = next((tmp_path / "stock").glob("p*processor_config.json"))
    edit_json(processor_file, **keys)
    for limits in ((784, 100_000), (56 * 56, 56 * 56), (28 * 28, 28 * 28 * 4)):
        chosen = {"min_pixels": limits[0], "max_pixels": limits[1]}
        model = PlumeModel.from_backbone(str(tmp_path / "stock"), **chosen, **SHORT_STRINGS)
        model.save_pretrained(tmp_path / "saved")
        for processor in (model.processor, PlumeModel.from_pretrained(tmp_path / "saved").processor):
            assert processor.limits.pixels == limits
            patches = processor.encode([processor.parse(noise(700, 500))])["image_grid_thw"].prod().item()
            assert patches * 14 * 14 <= limits[1]


@pytest.mark.parametrize("limits", [(0, 100), (-1, 100), (200, 100)])
def test_pixel_limits_that_contradict_each_other_are_refused(tmp_path, limits):
    save_tiny_backbone(tmp_path / "stock", ["red"])
    with pytest.raises(ValueError, match=f"received min_pixels={limits[0]} and max_pixels={limits[1]}"):
        PlumeModel.from_backbone(str(tmp_path / "stock"), min_pixels=limits[0], max_pixels=limits[1])


def test_small_images_and_frames_are_enlarged_to_four_visual_tokens(tmp_path):
    processor = PlumeModel.from_pretrained(save_published(tmp_path / "published")).processor
    for size, grid in (((40, 40), [1, 4, 4]), ((28, 28), [1, 4, 4]), ((10, 90), [1, 12, 2]), ((56, 84), [1, 6, 4])):
        assert processor.encode([processor.parse(noise(*size))])["image_grid_thw"].tolist() == [grid], size
    frames = [noise(48, 36)] * 3
    assert processor.encode([processor.parse({"video": frames})])["video_grid_thw"].tolist() == [[2, 4, 6]]


def test_imported_checkpoints_strip_texts_and_put_transparent_images_on_white(tmp_path):
    model = PlumeModel.from_pretrained(save_published(tmp_path / "published")).eval()
    processor = model.processor
    seen_through = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    for raw, same in (("\n a red kite ", "a red kite"), (seen_through, Image.new("RGB", (56, 56), "white"))):
        first, second = (processor.encode([processor.parse(one)]) for one in (raw, same))
        assert all(torch.equal(first[name], second[name]) for name in first)
