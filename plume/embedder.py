"""Plume: the user's object. A thin SentenceTransformer over a plume checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.decorators import deprecated_kwargs
from tqdm.auto import tqdm

from plume import card, checkpoint, content
from plume.ahead import Ahead, Loaded, one_ahead
from plume.batches import join_batches, plan_batches
from plume.config import PlumeConfig
from plume.engine import Backend, Engine
from plume.inputs import Item, check_unicode, inputs_of_call
from plume.model import PlumeModel
from plume.parts import UnsupportedModelError
from plume.plan import plan
from plume.processor import PlumeProcessor
from plume.requests import budget_of, comparable, converted, image_settings, windows_of
from plume.threads import slow_on_cpu
from plume.trace import Trace
from plume.vectors import Vectors

# Inputs are loaded and embedded in windows of this many batches, so that a folder of photos need not fit into
# memory, while inputs of like length still meet in a batch.
_BATCHES_PER_WINDOW = 8

LatentSteps = int | Mapping[Literal["query", "document"], int]
"""K, or the K of queries and that of documents."""


class Plume(SentenceTransformer):
    """Embeds text, images, video, pages and mixtures of them into one space of unit vectors.

    Everything of `SentenceTransformer` works: `similarity`, `encode_query`, `truncate_dim`, quantised precision,
    several devices, saving, `push_to_hub`.

    Example:
        >>> from PIL import Image
        >>> plume = Plume(getfixture("plume_folder"), device="cpu")
        >>> plume.encode(["a red kite", {"text": "what is this?", "image": Image.new("RGB", (56, 56))}]).shape
        (2, 64)
        >>> plume.encode("a red kite", num_latent_steps=0).shape
        (64,)
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        *,
        num_latent_steps: LatentSteps | None = None,
        backend: Backend | Literal["torch"] = "auto",
        int8: bool = False,
        exit_tolerance: float | None = None,
        vector_cache_bytes: int = 0,
        vision_cache_bytes: int = 0,
        prefix_cache_bytes: int = 0,
        **kwargs: Any,
    ):
        """Open a checkpoint.

        On a CPU weights are float32, whatever the checkpoint's, unless `model_kwargs` says otherwise.

        Args:
            model_name_or_path: a folder or a Hub name.
            num_latent_steps: K of every call that does not say otherwise; None is the checkpoint's own. A dict with
                "query" and "document" gives `encode_query` and `encode_document` a K each. Not saved with the model.
            backend: how the model runs: the engine's "auto", "triton", "graph" or "eager" (see `plume.engine.Engine`),
                or "torch" for transformers' own layers. Vectors differ by rounding.
            int8: products in int8, on a CPU; faster, and not the same vectors.
            exit_tolerance: an input stops reasoning at the first step that changes its state by at most this share.
            vector_cache_bytes: embeddings of inputs that come again are kept in so much memory, by content,
                instruction, K and weights.
            vision_cache_bytes: features of images that come again, likewise.
            prefix_cache_bytes: what is before the text of an input with images, likewise.
            kwargs: as for `SentenceTransformer`, for example `device`, `model_kwargs`, `truncate_dim`.

        Raises:
            ValueError: the checkpoint is not plume's, is damaged, or cannot run this K; or a setting that cannot be
                honoured.
        """
        settings = {
            "int8": int8,
            "exit_tolerance": exit_tolerance,
            "vision_cache_bytes": vision_cache_bytes,
            "prefix_cache_bytes": prefix_cache_bytes,
        }
        if backend == "torch" and (unused := [name for name, value in settings.items() if value not in (0, None)]):
            raise ValueError(f'{unused[0]} is of the engine, which backend="torch" does not use')
        hub = {k: kwargs[k] for k in ("revision", "token", "local_files_only") if k in kwargs}
        if (cache := kwargs.get("cache_folder") or os.environ.get("SENTENCE_TRANSFORMERS_HOME")) is not None:
            hub["cache_dir"] = cache
        checkpoint.check_is_plume(model_name_or_path, **hub)
        with checkpoint.naming_damaged_files(model_name_or_path):
            super().__init__(str(model_name_or_path), **kwargs)
        self._check_truncate_dim(self.truncate_dim)
        if self.device.type == "cpu":
            if not {"dtype", "torch_dtype"} & set(kwargs.get("model_kwargs") or {}):
                self.plume_model.float()
            if warning := slow_on_cpu(self.plume_model):
                warnings.warn(f"plume: {warning}", stacklevel=2)
        self._engine: Engine | None = None
        self._refused = ""  # why the engine could not run the model, when it could not
        self._engine_settings: dict[str, Any] | None = None
        if backend != "torch":
            self._engine_settings = {"backend": backend, **settings}
            self._refresh_engine()  # what cannot be honoured is said now
        self._vectors = Vectors(self.plume_model, vector_cache_bytes) if vector_cache_bytes else None
        self._check_steps(num_latent_steps)
        self.num_latent_steps = num_latent_steps
        folder = Path(model_name_or_path)
        #: Where the checkpoint came from: a folder, absolute, or a Hub name.
        self.source = str(folder.resolve()) if folder.is_dir() else str(model_name_or_path)

    @property
    def plume_model(self) -> PlumeModel:
        """The model inside."""
        transformer: Any = self[0]
        return transformer.model

    @property
    def plume_config(self) -> PlumeConfig:
        """The configuration of the loaded checkpoint."""
        return self.plume_model.config

    @property
    def engine(self) -> Engine | None:
        """What runs the model, with its present weights; None where transformers' own layers do."""
        return self._refresh_engine()

    def _refresh_engine(self) -> Engine | None:
        if self._engine_settings is None:
            return None
        try:
            if self._engine is None:
                self._engine = Engine(self.plume_model, **self._engine_settings)
            elif not self.training:
                self._engine.refresh()
        except UnsupportedModelError as error:
            self._engine = None
            if str(error) != self._refused:
                warnings.warn(f"plume: transformers' own layers run, since the engine cannot: {error}", stacklevel=2)
            self._refused = str(error)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        # Graphs and joined weights belong to one process; another makes its own.
        return {**self.__dict__, "_engine": None, "_vectors": None}

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embeddings of a batch that `preprocess` has made, by the engine unless gradients are wanted."""
        if (laid_out := input.get("plan")) is not None:  # by `encode`, which has just looked after the engine
            assert self._engine is not None
            return {**input, "sentence_embedding": self._engine.run(laid_out).embedding}
        engine = None if torch.is_grad_enabled() or self.training else self.engine
        if engine is None:
            return super().forward(input, **kwargs)
        tensors = {name: value for name, value in input.items() if isinstance(value, torch.Tensor)}
        return {**input, "sentence_embedding": engine(tensors, kwargs.get("num_latent_steps")).embedding}

    @deprecated_kwargs(sentences="inputs")
    def encode(  # type: ignore[override]
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        *,
        num_latent_steps: LatentSteps | None = None,
        instruction: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_tokens_per_batch: int = 32_768,
        task: Literal["query", "document"] | None = None,
        output_value: Literal["sentence_embedding"] = "sentence_embedding",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32",
        **kwargs: Any,
    ) -> Any:
        """Embed one input or a list that mixes kinds.

        Args:
            inputs: what `Item.parse` accepts: strings, PIL images, pages, `pathlib.Path`s to files, dicts, chat
                messages; one of them, or a list, a tuple, a column of a data set, an iterator of them. A list of
                messages is one input; so is an array of pixels, of which four axes are one video.
            prompt_name: one of the checkpoint's presets (`plume.prompts`): "retrieve", "classify", "question".
            prompt: as `instruction`, by the name that sentence-transformers gives it.
            batch_size: inputs per pass at most.
            show_progress_bar: None shows it when there is more than one batch.
            num_latent_steps: K; 0 is a single pass; None is that of the constructor, else the checkpoint's own.
            instruction: for every input that brings none of its own; stands before its text.
            on_error: "raise" stops at the first input that cannot be embedded; "skip" warns, names it, and leaves
                a row of NaN in its place.
            max_tokens_per_batch: visual and text tokens per pass, padding included, as far as they can be estimated.
                Inputs of like length share a pass; which ones does not change their embeddings.
            task: set by `encode_query` and `encode_document`.
            output_value: only embeddings; `trace` returns what happened inside.
            convert_to_numpy: return a numpy array.
            convert_to_tensor: return a tensor instead.
            precision: quantised by sentence-transformers over all inputs of the call.
            kwargs: as for `SentenceTransformer.encode`, for example `truncate_dim`, `device`, `pool`.

        Returns:
            Unit vectors `[N, D]`, float32, in the order of the inputs; `[D]` for a single input.

        Raises:
            InputError: an input that cannot be embedded, named by its place in the list; or no list of inputs.
            ValueError: a K that the checkpoint cannot run, or a setting that cannot be honoured.
        """
        if isinstance(inputs, list) and inputs and isinstance(inputs[0], Loaded):
            # A worker process of sentence-transformers before 6.2, which hands a chunk to `encode` once more.
            steps = {} if num_latent_steps is None else {"num_latent_steps": num_latent_steps}
            return super().encode(
                inputs,  # type: ignore[arg-type]
                prompt="",
                batch_size=batch_size,
                show_progress_bar=False,
                convert_to_numpy=convert_to_numpy,
                convert_to_tensor=convert_to_tensor,
                **steps,
                **kwargs,
            )
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip"; received {on_error!r}')
        if on_error == "skip" and precision != "float32":
            raise ValueError('on_error="skip" marks rows with NaN, which only precision="float32" can hold')
        if output_value != "sentence_embedding":
            raise ValueError(f"output_value={output_value!r} is not available; Plume.trace returns states and gates")
        if batch_size < 1 or max_tokens_per_batch < 1:
            raise ValueError("batch_size and max_tokens_per_batch must be at least 1")
        steps = self._steps(num_latent_steps, task)
        if steps is not None:
            kwargs["num_latent_steps"] = steps
        if task is not None and instruction is not None:
            prompt_name = None  # encode_query and encode_document name one of their own accord
        instruction = self._instruction(instruction, prompt, prompt_name)
        raws, single = inputs_of_call(inputs)
        dim = self._check_truncate_dim(
            kwargs["truncate_dim"] if kwargs.get("truncate_dim") is not None else self.truncate_dim
        )
        if dim is not None:
            kwargs["truncate_dim"], kwargs["normalize_embeddings"] = dim, True  # what is cut is not of unit length
        self.eval()
        self._refresh_engine()
        show = len(raws) > batch_size if show_progress_bar is None else show_progress_bar

        kept: list[int] = []
        rows: list[torch.Tensor] = []
        skipped: list[str] = []
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))  # a caller's is no part of the model
            if isinstance(kwargs.get("device"), list):
                kwargs["pool"] = self.start_multi_process_pool(kwargs.pop("device"))
                stack.callback(self.stop_multi_process_pool, kwargs["pool"])
            workers = len(kwargs["pool"]["processes"]) if kwargs.get("pool") else 0
            share = _BATCHES_PER_WINDOW * max(workers, 1)
            limit = share * batch_size, share * max_tokens_per_batch
            threads = stack.enter_context(ThreadPoolExecutor(2))
            bar = stack.enter_context(tqdm(total=len(raws), desc="Encoding", unit="input", disable=not show))
            budget = budget_of(self._processor, kwargs)
            left_out = None if on_error == "raise" else skipped
            windows = windows_of(self._processor, raws, instruction, budget, limit, left_out)
            if self.device.type != "cpu":  # on a CPU the model itself would have to wait
                windows = one_ahead(threads, windows)
            memory = None
            if self._vectors is not None:
                memory = self._vectors.of_call(kwargs)
            on_cpu = convert_to_numpy and not convert_to_tensor
            for window in windows:
                if memory is not None:
                    known, window = memory.recall(window)
                    rows += [vector[None].to("cpu" if on_cpu else self.device) for _, vector in known]
                    kept += [place for place, _ in known]
                    bar.update(len(known))
                lengths = [length for *_, length in window]
                for num_rows, run in join_batches(plan_batches(lengths, batch_size, max_tokens_per_batch)):
                    kwargs["chunk_size"] = num_rows  # of worker processes, if there are any
                    vectors = self._embed([window[i][1] for i in run], num_rows, None if workers else threads, kwargs)
                    if memory is not None:
                        memory.remember([window[i][0] for i in run], vectors)
                    rows.append(vectors.cpu() if on_cpu else vectors)
                    kept += [window[i][0] for i in run]
                    bar.update(len(run))
            bar.update(len(skipped))
        if skipped:
            warnings.warn(f"{len(skipped)} inputs were skipped:\n" + "\n".join(skipped), stacklevel=3)
        whole = torch.cat(rows) if rows else torch.empty(0, dim or self.plume_config.hidden_size)
        ordered = whole.new_full((len(raws), whole.shape[1]), torch.nan)
        ordered[kept] = whole
        return converted(ordered, single, precision, convert_to_tensor, convert_to_numpy)

    def _embed(
        self, items: Sequence[Item], num_rows: int, thread: ThreadPoolExecutor | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Vectors of loaded inputs, in batches of so many rows, in this order."""
        ahead = None
        if thread is not None and any(item.images or item.videos for item in items):
            batches = [items[i : i + num_rows] for i in range(0, len(items), num_rows)]
            ahead = Ahead(thread, partial(self._prepare, settings=kwargs), batches)
        return super().encode(
            [Loaded(item, -place, ahead) for place, item in enumerate(items)],  # type: ignore[arg-type]
            prompt="",  # each item holds its instruction
            batch_size=num_rows,
            show_progress_bar=False,
            convert_to_tensor=True,
            **kwargs,
        )

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Tensors of a batch; items that are loaded already skip the parsing of sentence-transformers."""
        if inputs and all(isinstance(one, Loaded) for one in inputs):
            items, ahead = [one.item for one in inputs], inputs[0].ahead
            return self._prepare(items, kwargs) if ahead is None else ahead.take(items)
        return super().preprocess(inputs, prompt, **kwargs)

    def _prepare(self, items: Sequence[Item], settings: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as `forward` takes it: laid out for the engine, or as tensors."""
        budget = image_settings(settings)
        sends_bytes = self._engine is not None and self.device.type == "cuda"
        batch = dict(self._processor.encode(items, budget, as_bytes=sends_bytes))
        if (engine := self._engine) is None:
            return batch
        complete = [self._processor.complete(item) for item in items]
        size = (budget or {}).get("size") or dict(self._processor.image_processor.size)
        keys = content.media_keys(complete, size) if engine.keeps_media else None
        laid_out = plan(self.plume_model, batch, settings.get("num_latent_steps"), media_keys=keys)
        return {"plan": laid_out.pinned() if self.device.type == "cuda" else laid_out}

    @staticmethod
    def _input_length(sample: Any) -> int:
        # By which sentence-transformers sorts before it cuts batches.
        return sample.rank if isinstance(sample, Loaded) else SentenceTransformer._input_length(sample)

    @property
    def _processor(self) -> PlumeProcessor:
        transformer: Any = self[0]
        return transformer.processor

    def trace(
        self, inputs: Any, *, num_latent_steps: int | None = None, candidates: Any = None, num_words: int = 5
    ) -> list[Trace]:
        """What happened inside the rollout of each input; see `PlumeModel.trace`.

        Args:
            inputs: one input or a list, as for `encode`.
            num_latent_steps: K; None is that of the constructor (of queries), else the checkpoint's own.
            candidates: inputs to compare every state with.
            num_words: nearest vocabulary tokens per state.
        """
        num_latent_steps = self._steps(num_latent_steps, "query")
        return self.plume_model.trace(
            inputs, num_latent_steps=num_latent_steps, candidates=candidates, num_words=num_words
        )

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """As `SentenceTransformer.similarity`; vectors of any precision, packed bits as signs."""
        dim = self.get_embedding_dimension()
        with torch.autocast(self.device.type, enabled=False):
            return super().similarity(comparable(embeddings1, dim), comparable(embeddings2, dim))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """As `SentenceTransformer.similarity_pairwise`; likewise."""
        dim = self.get_embedding_dimension()
        with torch.autocast(self.device.type, enabled=False):
            return super().similarity_pairwise(comparable(embeddings1, dim), comparable(embeddings2, dim))

    def _create_model_card(self, path: str, model_name: str | None = None, train_datasets: Any = None) -> None:
        # Called by SentenceTransformer.save and push_to_hub, whose own card knows nothing of latent steps.
        card.write_model_card(self.plume_model, path, model_name)

    def default_steps(self, task: Literal["query", "document"]) -> int:
        """K of a call that does not say otherwise."""
        steps = self._steps(None, task)
        return self.plume_config.num_latent_steps if steps is None else steps

    def get_embedding_dimension(self) -> int:
        """D of what `encode` returns.

        Raises:
            ValueError: `truncate_dim` has been set to a length that vectors do not have.
        """
        return self._check_truncate_dim(self.truncate_dim) or self.plume_config.hidden_size

    def _check_truncate_dim(self, dim: int | None) -> int | None:
        """The length that vectors are cut to, None where they are not.

        Raises:
            ValueError: there are not as many numbers.
        """
        if dim is None:
            return None
        most = self.plume_config.hidden_size
        if isinstance(dim, bool) or not isinstance(dim, Integral) or not 1 <= dim <= most:
            raise ValueError(f"truncate_dim must be a whole number from 1 to {most}, or None; received {dim!r}")
        return int(dim)

    def _check_steps(self, steps: LatentSteps | None) -> None:
        if isinstance(steps, Mapping):
            if set(steps) != {"query", "document"}:
                raise ValueError(f'num_latent_steps needs "query" and "document"; received {sorted(steps)}')
            for one in steps.values():
                self.plume_config.check_num_latent_steps(one)
        elif steps is not None:
            self.plume_config.check_num_latent_steps(steps)

    def _steps(self, asked: LatentSteps | None, task: str | None) -> int | None:
        """K of a call; None is the checkpoint's own."""
        self._check_steps(asked)
        steps = self.num_latent_steps if asked is None else asked
        if not isinstance(steps, Mapping):
            return steps
        if task not in ("query", "document"):
            raise ValueError(
                "num_latent_steps differs for queries and documents; call encode_query or encode_document, "
                "or give this call one number"
            )
        return steps[task]

    def _instruction(self, instruction: str | None, prompt: str | None, prompt_name: str | None) -> str:
        if sum(one is not None for one in (instruction, prompt, prompt_name)) > 1:
            raise ValueError("give one of instruction, prompt and prompt_name; they mean the same")
        chosen = self._resolve_prompt(prompt, prompt_name) if instruction is None else instruction
        if chosen:
            check_unicode(chosen, "the instruction")
        return chosen or ""
