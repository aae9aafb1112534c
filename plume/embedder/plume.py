"""Plume: the user's object. A thin SentenceTransformer over a plume checkpoint."""

from __future__ import annotations

import os
import warnings
from abc import ABCMeta
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.decorators import deprecated_kwargs

from plume.checkpoints.damage import naming_damaged_files
from plume.checkpoints.fingerprint import fingerprint
from plume.checkpoints.folder import check_is_plume
from plume.config import PlumeConfig
from plume.embedder.classify import Labels, calibrated, similarities
from plume.embedder.digests import media_keys
from plume.embedder.encode import EncodeCall, Loaded, Window, converted, image_settings, limits_of
from plume.embedder.precision import comparable
from plume.embedder.vector_cache import VectorCache
from plume.engine.engine import Backend, Engine
from plume.engine.layers.weights import UnsupportedModelError
from plume.engine.layout import lay_out
from plume.inputs.item import Item, check_unicode, list_inputs
from plume.inputs.pages import Page
from plume.inputs.processor import PlumeProcessor
from plume.inputs.video import Video
from plume.model.model import PlumeModel
from plume.space.labels import SLOT, Calibration, Template, probabilities
from plume.threads import slow_on_cpu
from plume.tracing.trace import Trace, trace

LatentSteps = int | Mapping[Literal["query", "document"], int | None]
"""K, or the K of queries and that of documents."""

Input = str | Image.Image | Page | Path | Video | Item | Mapping[str, Any] | bytes | np.ndarray | torch.Tensor
"""What one input may be; see `Item.parse`."""

Inputs = Input | Iterable[Input | Sequence[Mapping[str, Any]]]
"""One input, or several of any kinds; a list of messages is one."""

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


class EncodeOptions(TypedDict, total=False):
    """Settings of `Plume.encode` that do not change the type of what it returns."""

    num_latent_steps: LatentSteps | None
    instruction: str | None
    on_error: Literal["raise", "skip"]
    max_tokens_per_batch: int
    task: Literal["query", "document"] | None
    precision: Precision | None
    normalize_embeddings: bool
    truncate_dim: int | None
    device: str | torch.device | list[str | torch.device] | None
    pool: dict[str, Any] | None
    chunk_size: int | None
    processing_kwargs: dict[str, Any] | None


class _KnownByItsName(ABCMeta):
    """Lets libraries know a SentenceTransformer by the name of its type.

    BERTopic, KeyBERT and others look there, and load another model in the place of an object that they do not know.
    """

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}', a sentence_transformers.SentenceTransformer>"


class Plume(SentenceTransformer, metaclass=_KnownByItsName):
    """Embeds text, images, video, pages and mixtures of them into one space of unit vectors.

    Everything of `SentenceTransformer` works: `similarity`, `encode_query`, `truncate_dim`, quantised precision,
    several devices, saving, `push_to_hub`.

    Example:
        >>> from PIL import Image
        >>> model = Plume(getfixture("plume_folder"), device="cpu")
        >>> model.encode(["a red kite", {"text": "what is this?", "image": Image.new("RGB", (56, 56))}]).shape
        (2, 64)
        >>> model.encode("a red kite", num_latent_steps=0).shape
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
        truncate: bool | None = None,
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
                "query" and "document" gives `encode_query` and `encode_document` a K each, None again the checkpoint's
                own. Not saved with the model.
            backend: how the model runs: the engine's "auto", "triton", "graph" or "eager" (see
                `plume.engine.engine.Engine`), or "torch" for transformers' own layers. Vectors differ by rounding.
            int8: products in int8, on a CPU; faster, and not the same vectors.
            exit_tolerance: an input stops reasoning at the first step that changes its state by at most this share.
            truncate: whether texts beyond `max_seq_length` tokens are cut at their end and inputs without content are
                taken as empty texts; a warning counts them. Both are errors otherwise. It is saved with the model;
                None takes the checkpoint's own, False where none was saved.
            vector_cache_bytes: memory for embeddings of inputs that come again, by content, instruction, K and weights.
            vision_cache_bytes: memory for features of images that come again.
            prefix_cache_bytes: memory for what stands before the text of inputs with images.
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
        check_is_plume(model_name_or_path, **hub)
        with naming_damaged_files(model_name_or_path):
            super().__init__(str(model_name_or_path), **kwargs)
        self._check_truncate_dim(self.truncate_dim)
        self.plume_model.processor = self._processor.adopt(self.plume_config)  # one of two that were loaded
        if truncate is not None:
            self._processor.truncate = truncate
        if self.device.type == "cpu":
            is_quantised = hasattr(self.plume_config, "quantization_config")
            if not is_quantised and not {"dtype", "torch_dtype"} & set(kwargs.get("model_kwargs") or {}):
                self.plume_model.float()
            if warning := slow_on_cpu(self.plume_model):
                warnings.warn(f"plume: {warning}", stacklevel=2)
        self._engine: Engine | None = None
        self._refused = ""  # why the engine could not run the model, when it could not
        self._engine_settings: dict[str, Any] | None = None
        if backend != "torch":
            self._engine_settings = {"backend": backend, **settings}
            self._refresh_engine()  # what cannot be honoured is said now
        #: Vectors of inputs that come again; None without one.
        self.vector_cache = VectorCache(self.plume_model, vector_cache_bytes) if vector_cache_bytes else None
        folder = Path(model_name_or_path)
        #: Where the checkpoint came from: a folder, absolute, or a Hub name.
        self.source = str(folder.resolve()) if folder.is_dir() else str(model_name_or_path)
        is_offloaded = any(weight.is_meta for weight in self.plume_model.parameters())
        #: Digest of the weights and of the settings that change vectors.
        self.fingerprint = "offloaded" if is_offloaded else fingerprint(self.plume_model)
        self.num_latent_steps = num_latent_steps

    @property
    def num_latent_steps(self) -> LatentSteps | None:
        """K of every call that does not say otherwise; None is the checkpoint's own.

        Raises:
            ValueError: it is set to a K that the checkpoint cannot run.
        """
        return self._num_latent_steps

    @num_latent_steps.setter
    def num_latent_steps(self, steps: LatentSteps | None) -> None:
        self._check_steps(steps)
        self._num_latent_steps = steps
        # mteb keeps results by name and revision, which for it are those of every folder alike, whatever its K.
        card = self.model_card_data
        if card.model_name is None:
            card.model_name = f"local/{Path(self.source).name}" if Path(self.source).is_dir() else self.source
        counts = dict.fromkeys(map(self.default_steps, ("query", "document")))
        card.base_model_revision = "-".join([self.fingerprint, *("gated" if k is None else f"K{k}" for k in counts)])

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
        return {**self.__dict__, "_engine": None, "vector_cache": None}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile transformers' layers with `torch.compile`; for `backend="torch"`, arguments as in PyTorch.

        Raises:
            ValueError: the engine runs the model.
        """
        if self._engine_settings is not None:
            raise ValueError(
                'compile() is for the layers of transformers; open the model with backend="torch". The engine runs '
                'fewer operations already, on a GPU as CUDA graphs or with backend="triton" as fused kernels'
            )
        super().compile(*args, **kwargs)

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embeddings of a batch that `preprocess` has made, by the engine unless gradients are wanted."""
        if (layout := input.get("layout")) is not None:  # from `encode`, which has just refreshed the engine
            assert self._engine is not None
            return {**input, "sentence_embedding": self._engine.run(layout).embedding}
        engine = None if torch.is_grad_enabled() or self.training else self.engine
        if engine is None:
            return super().forward(input, **kwargs)
        tensors = {name: value for name, value in input.items() if isinstance(value, torch.Tensor)}
        return {**input, "sentence_embedding": engine(tensors, kwargs.get("num_latent_steps")).embedding}

    @overload
    def encode(
        self,
        inputs: Inputs,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        *,
        convert_to_numpy: Literal[True] = ...,
        convert_to_tensor: Literal[False] = ...,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        inputs: Inputs,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        *,
        convert_to_numpy: bool = ...,
        convert_to_tensor: Literal[True],
        **options: Unpack[EncodeOptions],
    ) -> torch.Tensor: ...

    @overload
    def encode(
        self,
        inputs: Inputs,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        *,
        convert_to_numpy: bool = ...,
        convert_to_tensor: bool = ...,
        output_value: Literal["sentence_embedding"] | None = ...,
        **options: Unpack[EncodeOptions],
    ) -> Any: ...

    @deprecated_kwargs(sentences="inputs")
    def encode(  # type: ignore[override]
        self,
        inputs: Inputs,
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
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        output_value: Literal["sentence_embedding"] | None = "sentence_embedding",
        precision: Precision | None = "float32",
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        device: str | torch.device | list[str | torch.device] | None = None,
        pool: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        processing_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Embed one input or a list that mixes kinds.

        Args:
            inputs: what `Item.parse` accepts: strings, PIL images, pages, `pathlib.Path`s to files, dicts, chat
                messages; one of them, or a list, a tuple, a column of a data set, an iterator of them. A list of
                messages is one input; so is an array of pixels, of which four axes are one video.
            prompt_name: one of the checkpoint's presets (`plume.prompts`): "retrieve", "classify", "question".
            prompt: as `instruction`, by the name that sentence-transformers gives it; goes before `prompt_name`.
            batch_size: inputs per pass at most.
            show_progress_bar: None shows it when there is more than one batch.
            num_latent_steps: K; 0 is a single pass; None takes the constructor's, else the checkpoint's.
            instruction: for every input that brings none of its own; stands before its text.
            on_error: "raise" stops at the first input that cannot be embedded; "skip" warns, names it, and leaves
                a row of NaN in its place.
            max_tokens_per_batch: visual and text tokens per pass, padding included, as far as they can be estimated.
                Batches group inputs of similar length; grouping does not affect the result.
            task: set by `encode_query` and `encode_document`.
            convert_to_numpy: return a numpy array.
            convert_to_tensor: return a tensor instead.
            output_value: None returns a dict with "sentence_embedding" for each input.
            precision: quantised by sentence-transformers over all inputs of the call; None is "float32".
            normalize_embeddings: changes nothing, since vectors are of unit length.
            truncate_dim: numbers of a vector that are kept; None: all, or as the constructor says.
            device: where to run; several devices share the work.
            pool: of `start_multi_process_pool`.
            chunk_size: inputs that go to a process of the pool at once.
            processing_kwargs: `{"image": {"size": ...}}`, pixels of images in this call.

        Returns:
            Unit vectors `[N, D]`, float32, in the order of the inputs; `[D]` for a single input. A numpy array, or with
            `convert_to_tensor` a tensor; with neither a list of tensors.

        Raises:
            InputError: an input that cannot be embedded, named by its place in the list; or no list of inputs.
            ValueError: a K that the checkpoint cannot run, or a setting that cannot be honoured.
        """
        precision = "float32" if precision is None else precision
        self._check_call(on_error, precision, batch_size, max_tokens_per_batch, output_value)
        settings = {
            "num_latent_steps": self._steps(num_latent_steps, task),
            "normalize_embeddings": normalize_embeddings,
            "device": device,
            "pool": pool,
            "chunk_size": chunk_size,
            "processing_kwargs": processing_kwargs,
        }
        kwargs: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        if task is not None and instruction is not None:
            prompt_name = None  # encode_query and encode_document name one of their own accord
        instruction = self._instruction(instruction, prompt, prompt_name)
        inputs, single = list_inputs(inputs)
        dim = self._check_truncate_dim(self.truncate_dim if truncate_dim is None else truncate_dim)
        if dim is not None:
            kwargs["truncate_dim"], kwargs["normalize_embeddings"] = dim, True  # what is cut is not of unit length
        self.eval()
        self._refresh_engine()
        if self.device.type == "meta":
            raise ValueError(
                "the model was offloaded after it was opened, so that inputs have no device to go to; open it with "
                'model_kwargs={"device_map": "auto", "offload_folder": ...} instead'
            )
        cache = None if self.vector_cache is None else self.vector_cache.for_call(kwargs)
        to_cpu = convert_to_numpy and not convert_to_tensor
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))  # a caller's is no part of the model
            if isinstance(kwargs.get("device"), list):
                kwargs["pool"] = self.start_multi_process_pool(kwargs.pop("device"))
                stack.callback(self.stop_multi_process_pool, kwargs["pool"])
            num_workers = len(kwargs["pool"]["processes"]) if kwargs.get("pool") else 0
            call = EncodeCall(
                processor=self._processor,
                inputs=inputs,
                instruction=instruction,
                limits=limits_of(self._processor, kwargs),
                batch_size=batch_size,
                max_tokens_per_batch=max_tokens_per_batch,
                skips_errors=on_error == "skip",
                shows_progress=len(inputs) > batch_size if show_progress_bar is None else show_progress_bar,
                loads_ahead=self.device.type != "cpu",  # on a CPU the model itself would have to wait
                num_workers=num_workers,
                device=torch.device("cpu") if to_cpu or num_workers else self.device,
                run_batches=partial(self._run_batches, kwargs),
                prepare=None if num_workers else partial(self._prepare, settings=kwargs),
                recall=None if cache is None else cache.recall,
                remember=None if cache is None else cache.remember,
            )
            vectors = call.run(empty=torch.empty(0, dim or self.plume_config.hidden_size))
        call.warn(stacklevel=3)
        if output_value is None:
            rows = [{"sentence_embedding": vector} for vector in vectors]
            return rows[0] if single else rows
        return converted(vectors, single, precision, convert_to_tensor, convert_to_numpy)

    @staticmethod
    def _check_call(
        on_error: str, precision: str, batch_size: int, max_tokens_per_batch: int, output_value: str | None
    ) -> None:
        """Refuse settings of a call that cannot be honoured."""
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip"; received {on_error!r}')
        if on_error == "skip" and precision != "float32":
            raise ValueError('on_error="skip" marks rows with NaN, which only precision="float32" can hold')
        if output_value not in ("sentence_embedding", None):
            raise ValueError(
                f"output_value={output_value!r} is not available, since the embedding is one hidden state and no mean "
                'of tokens; expected "sentence_embedding" or None. Plume.trace returns states and gates'
            )
        if output_value is None and precision != "float32":
            raise ValueError("output_value=None returns vectors as they are; drop precision")
        if batch_size < 1 or max_tokens_per_batch < 1:
            raise ValueError("batch_size and max_tokens_per_batch must be at least 1")

    def _run_batches(self, kwargs: dict[str, Any], rows: Window, batch_size: int) -> torch.Tensor:
        """Vectors of loaded inputs, so many at a time, in this order."""
        return super().encode(  # type: ignore[return-value]
            rows,  # type: ignore[arg-type]
            prompt="",  # each item holds its instruction
            batch_size=batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
            **{**kwargs, "chunk_size": batch_size},  # of worker processes, if there are any
        )

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Tensors of a batch; items that are loaded already skip the parsing of sentence-transformers."""
        if inputs and all(isinstance(loaded, Loaded) for loaded in inputs):
            items, prefetcher = [loaded.item for loaded in inputs], inputs[0].prefetcher
            return self._prepare(items, kwargs) if prefetcher is None else prefetcher.take(items)
        return super().preprocess(inputs, prompt, **kwargs)

    def _prepare(self, items: Sequence[Item], settings: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as `forward` takes it: laid out for the engine, or as tensors."""
        image_kwargs = image_settings(settings)
        sends_bytes = self._engine is not None and self.device.type == "cuda"
        batch = dict(self._processor.encode(items, image_kwargs, as_bytes=sends_bytes))
        if (engine := self._engine) is None:
            return batch
        complete = [self._processor.complete(item) for item in items]
        size = (image_kwargs or {}).get("size") or dict(self._processor.image_processor.size)
        keys = media_keys(complete, size) if engine.caches_media else None
        layout = lay_out(self.plume_model, batch, settings.get("num_latent_steps"), media_keys=keys)
        return {"layout": layout.pinned() if self.device.type == "cuda" else layout}

    @staticmethod
    def _input_length(sample: Any) -> int:
        # sentence-transformers sorts by it, the longest first, before it cuts batches; loaded inputs keep their order.
        return -sample.place if isinstance(sample, Loaded) else SentenceTransformer._input_length(sample)

    @property
    def _processor(self) -> PlumeProcessor:
        transformer: Any = self[0]
        return transformer.processor

    def trace(
        self,
        inputs: Any,
        *,
        num_latent_steps: int | None = None,
        candidates: Any = None,
        num_words: int = 5,
        instruction: str | None = None,
    ) -> list[Trace]:
        """What happened inside the rollout of each input; see `plume.trace`.

        Args:
            inputs: one input or a list, as for `encode`.
            num_latent_steps: K; None is that of the constructor (of queries), else the checkpoint's own.
            candidates: inputs to compare every state with.
            num_words: nearest vocabulary tokens per state.
            instruction: for every input that brings none of its own; candidates get none.
        """
        steps = self._steps(num_latent_steps, "query")
        return trace(
            self.plume_model,
            inputs,
            num_latent_steps=steps,
            candidates=candidates,
            num_words=num_words,
            instruction=instruction,
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
        self.plume_model.write_card(path, model_name)

    def default_steps(self, task: Literal["query", "document"]) -> int | None:
        """K of a call that does not say otherwise; None: the checkpoint's own for inputs whose gate says so, else 0."""
        steps = self._steps(None, task)
        if steps is None and self.plume_config.gate_threshold is None:
            return self.plume_config.num_latent_steps
        return steps

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
            for num_steps in steps.values():
                if num_steps is not None:
                    self.plume_config.check_num_latent_steps(num_steps)
        elif steps is not None:
            self.plume_config.check_num_latent_steps(steps)

    def _steps(self, requested: LatentSteps | None, task: str | None) -> int | None:
        """K of a call; None is the checkpoint's own."""
        self._check_steps(requested)
        steps = self.num_latent_steps if requested is None else requested
        config = self.plume_config
        if steps is None and task == "document":
            return config.document_steps()  # a gate is for queries
        if steps is None and task is None and config.document_steps() != config.num_latent_steps:
            steps = {"query": config.num_latent_steps, "document": config.document_steps()}
        if not isinstance(steps, Mapping):
            return steps
        if task not in ("query", "document"):
            raise ValueError(
                "num_latent_steps differs for queries and documents; call encode_query or encode_document, "
                "or give this call one number"
            )
        return config.document_steps() if task == "document" and steps[task] is None else steps[task]

    def _instruction(self, instruction: str | None, prompt: str | None, prompt_name: str | None) -> str:
        if instruction is not None and (prompt is not None or prompt_name is not None):
            raise ValueError("give instruction, or prompt or prompt_name; they mean the same")
        chosen = self._resolve_prompt(prompt, prompt_name) if instruction is None else instruction
        if chosen:
            check_unicode(chosen, "the instruction")
        return chosen or ""

    def classify(
        self,
        inputs: Inputs,
        labels: Labels,
        *,
        templates: Sequence[Template] = (SLOT,),
        instruction: str | None = None,
        calibration: Calibration | None = None,
        num_latent_steps: LatentSteps | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Probability of each label for each input, without training.

        Args:
            inputs: as for `encode`.
            labels: what inputs may be, at least two different names; or a dict with examples of each, which are inputs
                too.
            templates: sentences about a label, in which "{}" is its name, or functions that write one; open_clip has
                both. Several are averaged.
            instruction: for the inputs; None takes the checkpoint's preset "classify", if it has one.
            calibration: of `calibrate`. Without it exactly one label is taken to be right, at PLUME's temperature of
                training, and probabilities say no more than which label is nearest: that none is right cannot be said.
            num_latent_steps: K, as for `encode`; of a mapping, inputs take that of queries.
            options: of `encode`: `batch_size` and others that change no vector, and `truncate_dim`.

        Returns:
            `[N, C]`, float32, columns in the order of the labels; `[C]` for a single input. Rows sum to 1, unless
            the calibration judges each label on its own.

        Raises:
            InputError: an input that cannot be embedded.
            ValueError: labels or templates that cannot be used.

        Example:
            >>> model = Plume(getfixture("plume_folder"), device="cpu")
            >>> found = model.classify(["a red kite", "tea"], ["bird", "drink"], templates=["a photo of a {}.", "{}"])
            >>> found.shape, found.sum(axis=1).round(4).tolist()
            ((2, 2), [1.0, 1.0])
        """
        settings = {"templates": templates, "instruction": instruction, "num_latent_steps": num_latent_steps}
        scores = similarities(self, inputs, labels, **settings, **options)
        return probabilities(np.atleast_2d(scores), calibration or Calibration()).reshape(scores.shape)

    def calibrate(
        self,
        inputs: Inputs,
        labels: Labels,
        answers: Sequence[str | Sequence[str]],
        *,
        templates: Sequence[Template] = (SLOT,),
        instruction: str | None = None,
        num_latent_steps: LatentSteps | None = None,
        **options: Any,
    ) -> Calibration:
        """Fit what makes probabilities of `classify` come true as often as they say, to labelled inputs.

        Args:
            inputs: some 200 or more, like those that will be classified.
            labels: as for `classify`.
            answers: the right label of each input; or a list of its right labels, which may be empty: then `classify`
                judges each label on its own.
            templates: as for `classify`.
            instruction: as for `classify`.
            num_latent_steps: as for `classify`.
            options: as for `classify`.

        Raises:
            InputError: an input that cannot be embedded.
            ValueError: answers that are no labels, or labels or templates that cannot be used.
        """
        settings = {"templates": templates, "instruction": instruction, "num_latent_steps": num_latent_steps}
        return calibrated(np.atleast_2d(similarities(self, inputs, labels, **settings, **options)), labels, answers)
