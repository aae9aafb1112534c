"""What needs a CUDA device: a correctness gate, then latency at the shapes of Qwen2-VL-2B with random weights.

`make gpu` runs it. `--tiny` runs the same code on a small model anywhere, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from plume import Item, PlumeModel
from plume.tiny import SHAPES_2B, random_model, save_tiny_backbone
from plume_eval.latency import latency_ms
from plume_eval.report import header, markdown_header, markdown_table

#: Tokens that the explicit baseline writes here; the paper's rationales have 403.
NUM_WRITTEN = 64


def small_model(device: str, dtype: torch.dtype) -> PlumeModel:
    """The tiny model, the same weights on every device."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_backbone(folder, ["red", "kite"])
        torch.manual_seed(0)
        return PlumeModel.from_backbone(folder, dtype="float32").to(device, dtype).eval()


def queries(count: int) -> list[Item]:
    """Questions about pictures of 256 visual tokens, all different."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 448, 448, 3), dtype=torch.uint8, generator=generator)
    return [
        Item.parse({"text": f"which kite is red? {i}", "image": Image.fromarray(noise[i].numpy())})
        for i in range(count)
    ]


@torch.inference_mode()
def gate(device: str) -> dict[str, float]:
    """Errors against the CPU in float32, of the small model; raises where they are too large."""
    reference, items = small_model("cpu", torch.float32), queries(4)
    expected = reference(**reference.processor.encode(items)).embedding
    errors = {}
    for name, dtype, least in (("float32", torch.float32, 0.9999), ("bfloat16", torch.bfloat16, 0.99)):
        model = small_model(device, dtype)
        found = model(**model.processor.encode(items).to(device)).embedding.cpu()
        errors[name] = cosine_similarity(found, expected).min().item()
        if errors[name] < least:
            sys.exit(f"correctness gate: {name} on {device} has cosine {errors[name]:.5f} to the CPU, expected {least}")
    return errors


def main() -> None:
    """Gate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--tiny", action="store_true", help="small model, any device")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        sys.exit("no CUDA device; run on one, or try the script with --tiny")

    cosines = gate(device)
    small = small_model(device, torch.float32)
    assert small.processor is not None
    model = small if options.tiny else random_model(small, SHAPES_2B, device, torch.bfloat16)
    rows = []
    for batch in (1, 2) if options.tiny else (1, 8, 32):
        items = queries(batch)
        times = {"single pass": latency_ms(model, items, "single_pass")}
        for steps in (1, 4, 8):
            times[f"latent, K = {steps}"] = latency_ms(model, items, "latent", num_latent_steps=steps)
        written = {"max_new_tokens": NUM_WRITTEN, "num_runs": 3, "num_warm_up": 1}
        times[f"explicit, {NUM_WRITTEN} tokens"] = latency_ms(model, items, "explicit", **written)
        base = times["single pass"]
        rows += [[batch, name, f"{ms:.2f}", f"{ms / base:.2f}"] for name, ms in times.items()]
    table = markdown_table(["batch", "mode", "ms per query", "ratio to single pass"], rows)
    fields = header(" ".join(["eval/gpu.py", *sys.argv[1:]])) | {
        "model": "tiny" if options.tiny else "shapes of Qwen2-VL-2B, random weights, bfloat16",
        "input": f"{model.processor.encode(queries(1))['input_ids'].shape[1]} tokens, 256 of them visual",
        "implementation": "eager, SDPA attention",
        "gate": f"lowest cosine to the CPU in float32: {cosines}",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.out / f"latency_{device}_{fields['date'][:4]}{fields['date'][5:7]}"
    name.with_suffix(".json").write_text(json.dumps({"header": fields, "rows": rows}, indent=1) + "\n")
    name.with_suffix(".md").write_text(f"# Latency\n\n{markdown_header(fields)}\n\n{table}\n")
    print(table)  # noqa: T201


if __name__ == "__main__":
    main()
