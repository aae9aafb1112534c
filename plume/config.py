"""What a checkpoint must remember, so that its embeddings mean the same wherever it is loaded.

Defaults are those of the PLUME paper (arXiv 2604.02073) and the strings of its published checkpoints.
"""

from __future__ import annotations

import json
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from PIL import ImageColor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from plume.terminal import did_you_mean
from plume.tokens import ANCHOR, LATENT_END, LATENT_START, READ_OUT, token_id

#: The `model_type` of backbones that plume has been written for.
SUPPORTED = ("qwen2_vl", "qwen2_5_vl")

Transition = Literal["moe", "mlp", "projector", "identity"]
LatentPositions = Literal["mrope", "kv_length"]
RouterContext = Literal["anchor", "prefix_last", "none"]
VisionPositions = Literal["all_axes", "height_width"]
Latents = Literal["sequential", "parallel"]
LatentScale = Literal["state", "embedding"]

SYSTEM_MESSAGE = "You are a helpful assistant."
EMBEDDING_PROMPT = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. "
    "First output the thinking process in <think> </think> tags and then summarize the entire input in a "
    "word or sentence. Finally, use the <gen_emb> tag to represent the entire input."
)


#: Fields that say how latent inputs come about. Another choice leaves backbone, prompt and processor as they are.
TRANSITION_FIELDS = (
    *("latents", "refinements", "latent_scale", "transition", "num_experts", "top_k", "shared_expert"),
    *("expert_hidden_size", "expert_dropout", "num_step_embeddings", "router_context", "step_embedding"),
    *("num_latent_steps", "document_latent_steps", "gate_threshold"),
)


class PlumeConfig(PreTrainedConfig):
    """Configuration of a `PlumeModel`.

    Example:
        >>> config = PlumeConfig(num_latent_steps=4, top_k=1)
        >>> config.num_experts, config.max_latent_steps
        (4, 32)
        >>> PlumeConfig(latent_positions="absolute")
        Traceback (most recent call last):
        ValueError: latent_positions must be one of 'mrope', 'kv_length'; received 'absolute'
    """

    model_type = "plume"
    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig}  # type: ignore[override]

    backbone_config: Any = None
    """Configuration of the Qwen-VL backbone: an object of transformers, or its dict."""

    num_latent_steps: int = 8
    """K, latent steps of an encoding unless the caller says otherwise; 0 is a single pass. Paper, table 4."""

    document_latent_steps: int | None = None
    """K of documents at most, in a model trained with fewer steps on targets; None: as many as queries take."""

    gate_threshold: float | None = None
    """Inputs whose gate says less than this, in [0, 1], take no latent steps unless a caller says how many; None: there
    is no gate, and all take K. `plume-train gate` trains one."""

    latents: Latents = "sequential"
    """How the inputs of latent steps come about: each from the state before it ("sequential", PLUME), or all at once
    ("parallel"): learnt inputs behind the prefix, read in its own pass (LaME, RGLT)."""

    refinements: int = 0
    """T, how often the inputs of parallel latents are computed anew from all states (Jacobi, PCCoT): T + 2 passes
    instead of one. From T = K - 1 on the result is that of sequential latents, to rounding."""

    latent_scale: LatentScale = "state"
    """Length of the inputs of latent steps: as the adapter gives them ("state"), or a learnt number that begins as the
    mean length of a token's embedding ("embedding"). States are several times longer than embeddings."""

    transition: Transition = "moe"
    """The map from a hidden state to the next input: "moe" (PLUME), "mlp" (its ablation), "projector" (CODI),
    "identity" (Coconut)."""

    num_experts: int = 4
    """E, routed experts of "moe"."""

    top_k: int = 2
    """T, experts kept per step; their gates are not renormalised (paper, eq. 5)."""

    shared_expert: bool = True
    """Whether "moe" has an expert that always runs, unweighted."""

    expert_hidden_size: int | None = None
    """Inner width of an expert or of the projector; None means twice the hidden size."""

    expert_dropout: float = 0.1
    """Dropout inside the experts while training, in [0, 1); as in the published multi-node training."""

    num_step_embeddings: int = 32
    """Rows of the router's step table and of the inputs of parallel latents, hence the largest K of both."""

    router_context: RouterContext = "anchor"
    """What the router sees beside the state: the anchor (paper), the state at `<bot>`, or nothing."""

    step_embedding: bool = True
    """Whether the router of "moe" sees which step it is; without, its step table is zero and does not learn."""

    latent_positions: LatentPositions = "mrope"
    """Rotary position of latent step 0: one after `<bot>` ("mrope", as in the paper), or the number of prefix
    tokens ("kv_length", as the published checkpoints are evaluated). They differ after an image."""

    vision_positions: VisionPositions = "all_axes"
    """Rotary position of the text behind an image or a video: one after the largest of time, height and width
    ("all_axes"), or of height and width alone ("height_width", as transformers 5 computes it). They differ for videos
    of many frames. Qwen-VL's checkpoints and the published ones were trained with the first, so new models take it."""

    prompt_template: str = (
        f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n"
        f"<|im_start|>user\n{{content}}\n{ANCHOR}\n{EMBEDDING_PROMPT}<|im_end|>\n"
        f"<|im_start|>assistant\n<think>{LATENT_START}"
    )
    """The prefix. `{content}` is the user's media and text, in order. Must hold the anchor and end with
    `<bot>`."""

    suffix_template: str = f"{LATENT_END}{{rationale}}</think>{{answer}}"
    """What follows the latent block, up to the read-out. At inference rationale and answer are empty."""

    answer_template: str = "<answer>{answer}</answer>"
    """How an answer is written, in training. Empty: answers are not written."""

    read_out: str = f"\n{READ_OUT}"
    """Closes the suffix, unless the answer already holds `<gen_emb>`."""

    blank_image_size: int | None = None
    """Side in pixels of a white image put before every input without media; None puts none. The published
    checkpoints need 56: they place a white image of 28 x 28, which their processor enlarges to four visual tokens."""

    background: str | None = "white"
    """Colour behind transparent pixels of images and frames, by any name that Pillow knows. None drops transparency and
    shows the colours that are stored beneath it, for checkpoints that were trained so."""

    video_num_frames: int = 8
    """Frames taken from a video, evenly, from the first to the last; all frames of a shorter one."""

    video_fps: float | None = None
    """Frames per second taken instead of a fixed number."""

    video_max_frames: int = 64
    """The most frames taken at `video_fps`; a longer video gives this many, evenly."""

    video_min_pixels: int = 128 * 28 * 28
    """Pixels of a frame at least; smaller frames are enlarged. The default of Qwen2-VL's video processor."""

    video_max_pixels: int = 768 * 28 * 28
    """Pixels of a frame at most; larger frames are reduced. The default of Qwen2-VL's video processor."""

    turn_end: str = "<|im_end|>\n"
    """Closes the assistant's turn in training; supervised, never fed at inference."""

    anchor_token_id: int | None = None
    """Id of `<disc_emb>`."""

    latent_start_token_id: int | None = None
    """Id of `<bot>`."""

    latent_end_token_id: int | None = None
    """Id of `<eot>`."""

    read_out_token_id: int | None = None
    """Id of `<gen_emb>`."""

    suffix_ids: list[int] | None = None
    """Tokens of the suffix that ends every encoding (`prompt.suffix` with neither rationale nor answer)."""

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            backbone = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(backbone.pop("model_type"), **backbone)
        self._check()
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """D, the length of an embedding."""
        return self.backbone_config.get_text_config().hidden_size

    @property
    def max_latent_steps(self) -> int | None:
        """The largest K that the adapter can run; None means any."""
        return self.num_step_embeddings if self.transition == "moe" or self.latents == "parallel" else None

    def is_gated(self, requested: Any) -> bool:
        """Whether the gate decides who takes latent steps, where this K is asked for."""
        return requested is None and self.gate_threshold is not None

    def document_steps(self, query_steps: int | None = None) -> int:
        """K of documents, where queries take so many steps; None: this checkpoint's own.

        Example:
            >>> config = PlumeConfig(num_latent_steps=8, document_latent_steps=2)
            >>> config.document_steps(), config.document_steps(1)
            (2, 1)
        """
        steps = self.num_latent_steps if query_steps is None else query_steps
        return steps if self.document_latent_steps is None else min(steps, self.document_latent_steps)

    @property
    def is_one_pass(self) -> bool:
        """Whether latent inputs are known before the prefix has been read, so that no adapter runs."""
        return self.latents == "parallel" and self.refinements == 0

    def check_num_latent_steps(self, num_latent_steps: int) -> None:
        """Refuse a number of latent steps that this checkpoint cannot run.

        Raises:
            ValueError: negative, not whole, or beyond the step table.
        """
        if isinstance(num_latent_steps, bool) or not isinstance(num_latent_steps, Integral) or num_latent_steps < 0:
            raise ValueError(f"num_latent_steps must be a whole number >= 0; received {num_latent_steps!r}")
        if self.max_latent_steps is not None and num_latent_steps > self.max_latent_steps:
            raise ValueError(
                f"num_latent_steps={num_latent_steps} exceeds the step table of this checkpoint "
                f"(num_step_embeddings={self.num_step_embeddings}); ask for at most that many, or train with "
                "a longer table"
            )

    def remember_ids(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the ids of the special tokens from a tokenizer.

        Raises:
            ValueError: the tokenizer lacks one.
        """
        self.anchor_token_id = token_id(tokenizer, ANCHOR)
        self.latent_start_token_id = token_id(tokenizer, LATENT_START)
        self.latent_end_token_id = token_id(tokenizer, LATENT_END)
        self.read_out_token_id = token_id(tokenizer, READ_OUT)

    @classmethod
    def check_field_names(cls, names: list[str]) -> None:
        """Refuse names that are not fields of this configuration, with the nearest field as a hint."""
        fields = [name for name in cls.__annotations__ if name != "model_type"]
        for name in names:
            if name not in fields:
                remedy = did_you_mean(name, fields, f"the fields are {', '.join(sorted(fields))}")
                raise ValueError(f"PlumeConfig has no field {name!r}; {remedy}")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a checkpoint's `config.json`; those of its base model where it is an adapter alone.

        Raises:
            OSError: there is no configuration. transformers itself would take defaults, and another prompt with them.
            ValueError: the base model of an adapter cannot be read.
        """
        fields, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if fields:
            return fields, rest
        hub = {name: kwargs[name] for name in ("cache_dir", "revision", "token", "local_files_only") if name in kwargs}
        adapter = find_adapter_config_file(str(pretrained_model_name_or_path), **hub)
        if adapter is None:
            raise OSError(f"{pretrained_model_name_or_path} holds no config.json; save the model with save_pretrained")
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        try:
            return cls.get_config_dict(base, **{**kwargs, "revision": None})
        except OSError as error:
            reason = "there is no such folder" if Path(base).is_absolute() else str(error).partition("\n")[0]
            raise ValueError(
                f"{pretrained_model_name_or_path} is an adapter of {base!r}, which cannot be read ({reason}); put its "
                "place into base_model_name_or_path of adapter_config.json, or save a merged model where both are"
            ) from None

    def _check(self) -> None:
        for name, choices in (
            ("transition", get_args(Transition)),
            ("latent_positions", get_args(LatentPositions)),
            ("router_context", get_args(RouterContext)),
            ("vision_positions", get_args(VisionPositions)),
            ("latents", get_args(Latents)),
            ("latent_scale", get_args(LatentScale)),
        ):
            if (value := getattr(self, name)) not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {listed}; received {value!r}")
        for name in ("num_experts", "num_step_embeddings", "video_num_frames", "video_max_frames", "video_min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; received {getattr(self, name)}")
        if isinstance(self.refinements, bool) or not isinstance(self.refinements, int) or self.refinements < 0:
            raise ValueError(f"refinements must be a whole number >= 0; received {self.refinements!r}")
        if self.refinements and self.latents == "sequential":
            raise ValueError(
                f"refinements={self.refinements} belongs to parallel latents; set latents='parallel', or refinements=0"
            )
        if self.gate_threshold is not None and not 0 <= self.gate_threshold <= 1:
            raise ValueError(f"gate_threshold must be None or lie in [0, 1]; received {self.gate_threshold}")
        if self.gate_threshold is not None and self.is_one_pass:
            raise ValueError(
                "gate_threshold: latents that are read in the pass of the prefix cannot be decided about after it; set "
                "refinements, or gate_threshold=None"
            )
        if self.blank_image_size is not None and self.blank_image_size < 28:
            raise ValueError(f"blank_image_size must be None or at least 28; received {self.blank_image_size}")
        if self.background is not None:
            try:
                ImageColor.getrgb(self.background)
            except (ValueError, AttributeError):
                raise ValueError(
                    f'background must be None or a colour, such as "white" or "#ffffff"; received {self.background!r}'
                ) from None
        if self.video_fps is not None and self.video_fps <= 0:
            raise ValueError(f"video_fps must be None or above 0; received {self.video_fps}")
        if self.video_max_pixels < self.video_min_pixels:
            raise ValueError(
                f"video_max_pixels must be at least video_min_pixels={self.video_min_pixels}; "
                f"received {self.video_max_pixels}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must lie in 1..num_experts={self.num_experts}; received {self.top_k}")
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout must lie in [0, 1); received {self.expert_dropout}")
        self.check_num_latent_steps(self.num_latent_steps)
        if self.document_latent_steps is not None:
            self.check_num_latent_steps(self.document_latent_steps)

        prompt, suffix = self.prompt_template, self.suffix_template
        if prompt.count("{content}") != 1 or ANCHOR not in prompt or not prompt.endswith(LATENT_START):
            raise ValueError(
                f"prompt_template must hold {{content}} once and {ANCHOR}, and end with {LATENT_START}; "
                f"received {prompt!r}"
            )
        if not suffix.startswith(LATENT_END) or "{rationale}" not in suffix:
            raise ValueError(
                f"suffix_template must start with {LATENT_END} and hold {{rationale}}; received {suffix!r}"
            )
        if READ_OUT not in self.read_out:
            raise ValueError(f"read_out must hold {READ_OUT}; received {self.read_out!r}")
