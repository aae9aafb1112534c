"""Shards on Ray: a pool of actors, each with a model, that is handed the names of shards. The only importer of ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plume.corpus.plan import Job
from plume.corpus.work import ShardWorker

# Of a shard whose actor dies; one that dies of a shard would else do so for ever.
_RETRIES = 3


class _Actor:
    """What Ray Data calls: a batch is one shard."""

    def __init__(self, job: str, model: str | None):
        self.worker = ShardWorker(job, model=model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"shard": batch["shard"], "rows": [self.worker(str(shard)) for shard in batch["shard"]]}


def run_on_ray(
    job: Job, address: str, *, actors: int, num_gpus: float, model: str | None, done: Callable[[int], object]
) -> None:
    """Embed what is left on a Ray cluster, whose machines see the job's folder and the corpus under the same paths.

    An actor that dies is started again, and its shard with it. What is finished is never embedded twice.

    Args:
        job: of the corpus.
        address: of the cluster; "auto" finds the one that runs, "local" starts one here.
        actors: of the pool at most.
        num_gpus: of each actor; 0: they run on CPUs.
        model: where the checkpoint is on the machines, if not where it was when the job was planned.
        done: told of the rows of each shard.

    Raises:
        ImportError: ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("a cluster needs Ray; pip install 'plume-embed[ray]'") from None
    left = job.left()
    if not left:
        return
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    shards = ray.data.from_items([{"shard": shard} for shard in left], override_num_blocks=len(left))
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors, len(left)))
    finished = shards.map_batches(
        _Actor,
        batch_size=1,
        compute=pool,
        num_cpus=None if num_gpus else 1,
        num_gpus=num_gpus or None,
        fn_constructor_args=(str(job.path.resolve()), model),
        max_restarts=-1,
        max_task_retries=_RETRIES,
    )
    for row in finished.iter_rows():
        done(int(row["rows"]))
