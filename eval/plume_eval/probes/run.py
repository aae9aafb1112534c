"""The probes a sceptic asks for, each beside what it is compared with, and a verdict in plain words.

All of them read one model on the test questions of a hops data set. Interventions are compared with the model as it is,
question by question, with intervals bootstrapped over questions; candidates are embedded as usual, with fewer steps
also with as few. Descriptions (K against hops, decoders, early exit, confidence, experts) have a control instead. A
model that answers no better than a rule is not probed.

Letters: Q questions, D hidden size, K latent steps, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from plume.engine.engine import Engine
from plume.inputs.item import Item
from plume.model.interface import normalize, read_out_column
from plume.model.model import PlumeModel
from plume.model.transition import MixtureOfExperts
from plume_eval.baselines import embed
from plume_eval.hops.run import HopsTask, best_rule
from plume_eval.metrics import Estimate, bootstrap, ranks
from plume_eval.probes.interventions import (
    CutDecoder,
    constant,
    frozen_gates,
    noise,
    of_another_row,
    renumbered_steps,
    replaced_inputs,
    shown_columns,
)

BATCH_SIZE = 64
#: Training questions that linear probes learn from.
NUM_PROBE_ROWS = 1536
TOLERANCES = (0.1, 0.2, 0.4, 0.8)
_RIDGE = 1.0


@dataclass
class Probe:
    """A probe: what it measured, and what that means.

    name: what was done. values: plain numbers. verdict: a sentence.
    """

    name: str
    values: dict[str, Any]
    verdict: str


@dataclass
class Read:
    """What a pass over all questions left: unit vectors `[Q, D]`, states `[Q, K+1, D]`, gates `[Q, K, E]` or None."""

    vectors: Tensor
    states: Tensor
    gates: Tensor | None


@dataclass
class Prober:
    """Runs the probes on one model and one data set."""

    model: PlumeModel
    task: HopsTask
    seed: int = 0
    show_progress: bool = False
    found: list[Probe] = field(default_factory=list)

    @torch.inference_mode()
    def run(self) -> list[Probe]:
        """All probes that the model has the parts for."""
        config = self.model.config
        self.steps = config.num_latent_steps
        self.batches = self.encoded(self.task)
        self.candidates = embed(self.model, self.task.candidates("name"), "latent").embedding
        self.real = self.read()
        self.right = self.is_right(self.real.vectors)
        self.found.append(self.beyond_rules())
        if self.found[0].values["difference"]["low"] <= 0:  # nothing to lose, so that no probe means anything
            return self.found
        probes: list[Callable[[], Probe]] = [self.without_steps, self.fewer_steps_than_hops]
        probes += [self.candidates_without_steps] if self.steps else []
        probes += [self.more_steps] if self.steps and config.latents == "sequential" else []
        if self.steps and not config.is_one_pass:
            probes += [self.random_inputs, self.inputs_of_another, self.mean_inputs, self.skipped, self.repeated]
            probes += [self.gates_frozen] if isinstance(self.model.transition, MixtureOfExperts) else []
        if self.steps and config.latents == "sequential":
            probes += [self.context_cut, self.early_exit]
        if self.steps:
            probes += [self.decoded_by_the_head, self.decoded_by_a_linear_probe, self.confidence]
        if self.real.gates is not None:
            probes.append(self.experts)
        for probe in tqdm(probes, desc="Probing", disable=not self.show_progress):
            self.found.append(probe())
        return self.found

    def encoded(self, task: HopsTask) -> list[dict[str, Tensor]]:
        """The questions as batches of tensors."""
        assert self.model.processor is not None
        queries = task.queries()
        starts = range(0, len(queries), BATCH_SIZE)
        return [dict(self.model.processor.encode(queries[start : start + BATCH_SIZE])) for start in starts]

    @property
    def num_rows(self) -> int:
        """Q."""
        return len(self.task.rows)

    def read(
        self,
        num_latent_steps: int | None = None,
        within: Callable[[], AbstractContextManager] = nullcontext,
        cut_after: int | None = None,
    ) -> Read:
        """Embed all questions.

        Args:
            num_latent_steps: K; None: the model's.
            within: a context that intervenes.
            cut_after: hide what the question is about after so many latent inputs.
        """
        steps = self.steps if num_latent_steps is None else num_latent_steps
        vectors, states, gates = [], [], []
        with within():
            for batch in self.batches:
                inputs = self.model.read_inputs(batch, num_latent_steps=steps)
                decoder = None
                if cut_after is not None:
                    decoder = CutDecoder(self.model, shown_columns(self.model, inputs), cut_after)
                _, result = self.model.roll_out(inputs, decoder=decoder)
                column = read_out_column(self.model.config, inputs.suffix_ids, inputs.suffix_mask)
                vectors.append(normalize(result.suffix[torch.arange(len(column)), column]))
                states.append(result.states.float())
                gates.append(result.gates)
        whole = None if gates[0] is None else torch.cat(gates)  # type: ignore[arg-type]
        return Read(torch.cat(vectors), torch.cat(states), whole)

    def symbols_at(self, num_latent_steps: int) -> Tensor:
        """All symbols with K of their own, `[symbols, D]`."""
        return embed(self.model, self.task.candidates("name"), "latent", num_latent_steps=num_latent_steps).embedding

    def is_right(self, vectors: Tensor, candidates: Tensor | None = None) -> np.ndarray:
        """Whether the answer is the nearest symbol, `[Q]`."""
        candidates = self.candidates if candidates is None else candidates
        return (ranks((vectors @ candidates.T).numpy(), self.task.answers) == 1).astype(float)

    def is_right_at(self, num_latent_steps: int) -> np.ndarray:
        """The same with fewer steps; symbols with as many, or with the model's, whichever answers better."""
        vectors = self.read(num_latent_steps).vectors
        found = [self.is_right(vectors), self.is_right(vectors, self.symbols_at(num_latent_steps))]
        return max(found, key=np.mean)

    def compared(self, name: str, right: np.ndarray, what: str, harm: str = "") -> Probe:
        """A probe that asks how much worse the answers become.

        Args:
            name: of the probe.
            right: which questions are still answered rightly.
            what: begins the verdict.
            harm: what worse answers mean, if not that the answers need what was taken away.
        """
        difference = bootstrap(self.right - right, seed=self.seed)
        values = {
            "real": asdict(bootstrap(self.right)),
            "probed": asdict(bootstrap(right)),
            "difference": asdict(difference),
            "by_hops": self.by_hops(right),
        }
        verdict = judged(bootstrap(self.right).mean, bootstrap(right).mean, difference, harm)
        return Probe(name, values, f"{what}: {verdict}")

    def by_hops(self, right: np.ndarray) -> dict[str, float]:
        """Recall of the questions of each number of hops."""
        hops = self.task.num_hops
        return {str(count): float(right[hops == count].mean()) for count in np.unique(hops)}

    # Which probes there are.

    def beyond_rules(self) -> Probe:
        """The model as it is, beside the best rule that follows no path."""
        rule = best_rule(self.task)["rule"]
        difference = bootstrap(self.right - self.task.rules()[rule], seed=self.seed)
        values = {"real": asdict(bootstrap(self.right)), "rule": rule, "difference": asdict(difference)}
        told = f"Recall is {bootstrap(self.right)}, {difference} above the best rule ({rule})"
        return Probe("real", values, told if difference.low > 0 else f"{told}: no skill that a probe could take away")

    def without_steps(self) -> Probe:
        """K = 0, the same model."""
        return self.compared("K = 0", self.is_right_at(0), "Without latent steps")

    def fewer_steps_than_hops(self) -> Probe:
        """Every K up to the model's, against hops."""
        rows = {str(steps): self.by_hops(self.is_right_at(steps)) for steps in range(self.steps + 1)}
        rows[str(self.steps)] = self.by_hops(self.right)
        few = [rows[k][h] for k in rows for h in rows[k] if 0 < int(k) < int(h)]
        enough = [rows[k][h] for k in rows for h in rows[k] if int(k) >= int(h)]
        verdict = "No question has more hops than a K that was read"
        if few:
            verdict = (
                f"Where hops exceed K recall is {np.mean(few):.3f}, elsewhere {np.mean(enough):.3f} (means over K >= 1 "
                f"and hops; trained at K = {self.steps} alone, so a smaller K is out of its training too)"
            )
        return Probe("K against hops", {"recall": rows}, verdict)

    def candidates_without_steps(self) -> Probe:
        """Candidates at K = 0, questions as they are."""
        right = self.is_right(self.real.vectors, self.symbols_at(0))
        return self.compared("candidates at K = 0", right, "Candidates without latent steps")

    def more_steps(self) -> Probe:
        """Two steps more than the model was trained with."""
        steps = self.steps + 2
        what, harm = f"K = {steps} in place of {self.steps}", "more steps than trained with do harm"
        return self.compared("more steps", self.is_right_at(steps), what, harm)

    def random_inputs(self) -> Probe:
        """Noise in place of latent inputs."""
        generator = torch.Generator().manual_seed(self.seed)
        read = self.read(within=lambda: replaced_inputs(self.model, noise(generator)))
        return self.compared("noise", self.is_right(read.vectors), "Noise of equal norm in place of latent inputs")

    def inputs_of_another(self) -> Probe:
        """Latent inputs of another question."""
        read = self.read(within=lambda: replaced_inputs(self.model, of_another_row))
        right = self.is_right(read.vectors)
        probe = self.compared("another's", right, "Latent inputs of another question")
        others = np.concatenate([np.roll(self.task.answers[start : start + BATCH_SIZE], 1) for start in self._starts()])
        taken = (ranks((read.vectors @ self.candidates.T).numpy(), others) == 1) & (others != self.task.answers)
        differs = others != self.task.answers
        probe.values["gives_the_others_answer"] = float(taken[differs].mean()) if differs.any() else None
        if differs.any():
            probe.verdict += f"; the other question's answer comes in {taken[differs].mean():.0%} of the cases"
        return probe

    def _starts(self) -> range:
        return range(0, self.num_rows, BATCH_SIZE)

    def mean_inputs(self) -> Probe:
        """Their mean over questions: constant latents."""
        seen: dict[int, list[Tensor]] = {}

        def record(inputs: Tensor, step: int) -> Tensor:
            seen.setdefault(step, []).append(inputs)
            return inputs

        self.read(within=lambda: replaced_inputs(self.model, record))
        # With refinements an input is made several times in each batch; the last ones are those that are read.
        times = {step: len(inputs) // len(self.batches) for step, inputs in seen.items()}
        last = {step: inputs[times[step] - 1 :: times[step]] for step, inputs in seen.items()}
        means = torch.stack([torch.cat(last[step]).mean(dim=0) for step in sorted(last)])
        read = self.read(within=lambda: replaced_inputs(self.model, constant(means)))
        return self.compared("mean", self.is_right(read.vectors), "The mean latent inputs of all questions (constant)")

    def skipped(self) -> Probe:
        """Each step left out."""
        return self._renumbered("a step skipped", [[s for s in range(self.steps) if s != k] for k in range(self.steps)])

    def repeated(self) -> Probe:
        """Each step taken twice."""
        return self._renumbered("a step repeated", [sorted([*range(self.steps), k]) for k in range(self.steps)])

    def _renumbered(self, name: str, lists: Sequence[Sequence[int]]) -> Probe:
        most = self.model.config.max_latent_steps
        lists = [steps for steps in lists if steps and (most is None or len(steps) <= most)]
        if not lists:
            return Probe(name, {}, f"Not possible at K = {self.steps}")
        rights = [
            self.is_right(self.read(len(steps), within=lambda steps=steps: renumbered_steps(self.model, steps)).vectors)
            for steps in lists
        ]
        probe = self.compared(name, np.mean(rights, axis=0), f"With {name} (mean over which)")
        probe.values["recall_by_step"] = [float(right.mean()) for right in rights]
        return probe

    def gates_frozen(self) -> Probe:
        """The mean gates of each step for every question."""
        assert self.real.gates is not None
        means = self.real.gates.mean(dim=0)
        read = self.read(within=lambda: frozen_gates(self.model, means))
        return self.compared(
            "gates frozen", self.is_right(read.vectors), "With the router's mean gates for every question"
        )

    def context_cut(self) -> Probe:
        """What the question is about, hidden after so many steps."""
        rights = [self.is_right(self.read(cut_after=steps).vectors) for steps in range(self.steps)]
        rows = {str(steps): self.by_hops(right) for steps, right in enumerate(rights)}
        lost = [bootstrap(self.right - right, seed=self.seed) for right in rights]
        enough = next((k for k, one in enumerate(lost) if one.high <= 0.05), None)
        verdict = (
            f"With what is shown hidden behind the prefix recall is {rights[0].mean():.3f} of {self.right.mean():.3f} "
            f"(lost {lost[0]}); "
            + (
                f"hidden after {enough} steps it loses at most 0.05, so that later steps hardly look at it"
                if enough is not None
                else "even the last step, or the read-out behind it, looks at it"
            )
        )
        return Probe("context cut", {"recall": rows, "control": float(self.right.mean())}, verdict)

    def early_exit(self) -> Probe:
        """Steps that are taken until the state settles, against the hops that are needed."""
        hops, found = self.task.num_hops, {}
        correlation = 0.0
        for tolerance in TOLERANCES:
            with torch.inference_mode(False):  # what it joins stays a part of the model, which may be trained later
                engine = Engine(self.model, backend="eager", exit_tolerance=tolerance)
            output = embed(self.model, self.task.queries(), "latent", engine=engine)
            steps = output.num_reasoning_steps.numpy().astype(float)
            found[str(tolerance)] = {
                "recall": float(self.is_right(output.embedding).mean()),
                "steps": float(steps.mean()),
                "steps_by_hops": self.by_hops(steps),
            }
            if steps.std() and hops.std():
                correlation = max(correlation, float(np.corrcoef(steps, hops)[0, 1]))
        kept = [one for one in found.values() if one["recall"] >= self.right.mean() - 0.01]
        fewest = min((one["steps"] for one in kept), default=float(self.steps))
        verdict = (
            f"Stopping where the state settles takes {fewest:.1f} of {self.steps} steps at a loss of at most 0.01; "
            f"steps taken and hops needed correlate at {correlation:.2f} at most"
        )
        return Probe("early exit", {"by_tolerance": found, "correlation": correlation}, verdict)

    def decoded_by_the_head(self) -> Probe:
        """What each state would say, against the path."""
        ids = self.model.processor.tokenizer.convert_tokens_to_ids(self.task.symbols)  # type: ignore[union-attr]
        said = self.model.logits(self.real.states.to(self.model.dtype))[..., ids].argmax(dim=-1).numpy()  # [Q, K+1]
        return self._decoded("decoded by the head", said[..., None] == self.task.paths[:, None], None)

    def decoded_by_a_linear_probe(self) -> Probe:
        """The same by a linear map that learns from training questions; with shuffled labels as its control."""
        train = HopsTask(self.task.folder, limit=NUM_PROBE_ROWS, split="train")
        learnt = Prober(self.model, train)
        learnt.steps = self.steps
        learnt.batches = self.encoded(train)
        states, paths = learnt.read().states, train.paths
        width = min(paths.shape[1], self.task.paths.shape[1])
        rng = np.random.default_rng(self.seed)
        shape = (*self.real.states.shape[:2], self.task.paths.shape[1])
        is_held, by_chance = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for state in range(states.shape[1]):
            for hop in range(width):
                known: np.ndarray = paths[:, hop] >= 0
                if known.sum() < len(self.task.symbols):
                    continue
                for target, labels in ((is_held, paths[known, hop]), (by_chance, rng.permutation(paths[known, hop]))):
                    guess = _ridge(states[known, state], labels, self.real.states[:, state], len(self.task.symbols))
                    target[:, state, hop] = guess == self.task.paths[:, hop]
        return self._decoded("decoded by a linear probe", is_held, by_chance)

    def _decoded(self, name: str, is_held: np.ndarray, by_chance: np.ndarray | None) -> Probe:
        """Accuracy of each state for each symbol on the path, `[Q, K+1, hops+1]`."""
        has_hop = (self.task.paths >= 0)[:, None] & np.ones_like(is_held)
        count = has_hop.sum(axis=0)
        matrix = (is_held & has_hop).sum(axis=0) / np.maximum(count, 1)
        values: dict[str, Any] = {"accuracy": np.where(count > 0, matrix, np.nan).tolist()}
        chance = 1 / len(self.task.symbols)
        if by_chance is not None:
            control = (by_chance & has_hop).sum(axis=0) / np.maximum(count, 1)
            values["control"] = np.where(count > 0, control, np.nan).tolist()
            chance = float(control[count > 0].mean())
        # State k is to hold hop k + 1, since its last word was hop k; with another number of steps per hop it need not.
        steps = range(min(matrix.shape[0] - 1, matrix.shape[1] - 1))
        own = [matrix[k, k + 1] for k in steps if count[k, k + 1]]
        others = [matrix[k, j] for k in steps for j in range(1, matrix.shape[1]) if j != k + 1 and count[k, j]]
        own_mean, other_mean = float(np.mean(own)), float(np.mean(others)) if others else chance
        values |= {"own_hop": own_mean, "other_hops": other_mean, "chance": chance}
        holds = (
            "each state holds its own hop"
            if own_mean > 2 * max(other_mean, chance)
            else "states hold no hop of their own"
        )
        verdict = (
            f"State k gives hop k + 1 in {own_mean:.3f} of the cases, other hops in {other_mean:.3f} (chance "
            f"{chance:.3f}): {holds}"
        )
        return Probe(name, values, verdict)

    def confidence(self) -> Probe:
        """Whether the trajectory tells which answers are wrong, beside the margin of the ranking."""
        wrong = self.right == 0
        states = self.real.states
        scores = (self.real.vectors @ self.candidates.T).topk(2, dim=1).values
        signals = {
            "change of the last step": (states[:, -1] - states[:, -2]).norm(dim=-1) / states[:, -1].norm(dim=-1),
            "mean change of a step": ((states[:, 1:] - states[:, :-1]).norm(dim=-1) / states[:, 1:].norm(dim=-1)).mean(
                dim=1
            ),
            "small margin of the ranking (control)": scores[:, 1] - scores[:, 0],
        }
        areas = {name: area_under_curve(signal.numpy(), wrong) for name, signal in signals.items()}
        verdict = f"Too few errors to tell ({int(wrong.sum())} of {self.num_rows})"
        if areas["small margin of the ranking (control)"] is not None and wrong.sum() >= 10:
            listed = ", ".join(f"{name} {area:.2f}" for name, area in areas.items())
            verdict = f"Area under the curve for predicting errors (0.5: nothing): {listed}"
        return Probe("confidence", {"auc": areas, "num_errors": int(wrong.sum())}, verdict)

    def experts(self) -> Probe:
        """Which experts are kept, by form of the question; two halves of the same form are the control."""
        assert self.real.gates is not None
        kept = self.real.gates.topk(self.model.config.top_k, dim=-1).indices  # [Q, K, T]
        use = F.one_hot(kept, self.real.gates.shape[-1]).sum(dim=2).float().mean(dim=1).numpy()  # [Q, E]
        forms, is_even = self.task.forms, np.arange(self.num_rows) % 2 == 0
        shares = {form: use[forms == form].mean(axis=0) / self.model.config.top_k for form in np.unique(forms)}
        halves = [
            np.abs(use[(forms == f) & is_even].mean(axis=0) - use[(forms == f) & ~is_even].mean(axis=0)).sum()
            for f in shares
        ]
        values = {form: share.tolist() for form, share in shares.items()}
        values["captions (no reasoning)"] = self._caption_experts()
        if len(shares) < 2:
            verdict = "There is one form of question only"
        else:
            first, *rest = shares.values()
            apart = max(float(np.abs(first - one).sum()) / 2 for one in rest)
            control = float(np.max(halves)) / 2 / self.model.config.top_k
            tells = "specialise by form" if apart > 2 * control + 0.02 else "do not specialise by form"
            verdict = (
                f"Experts {tells}: shares of two forms differ by {apart:.3f}, of two halves of one by {control:.3f}"
            )
        by_step = self.real.gates.mean(dim=0).tolist()
        return Probe("experts", {"share_by_form": values, "gates_by_step": by_step}, verdict)

    def _caption_experts(self) -> list[float] | None:
        if not self.task.has_control:
            return None
        captions: list[Item] = self.task.captions()[0][:BATCH_SIZE]
        assert self.model.processor is not None
        gates = self.model(**self.model.processor.encode(captions)).gates
        kept = gates.topk(self.model.config.top_k, dim=-1).indices
        share = F.one_hot(kept, gates.shape[-1]).sum(dim=2).float().mean(dim=(0, 1)) / self.model.config.top_k
        return share.tolist()


def judged(real: float, probed: float, difference: Estimate, harm: str = "") -> str:
    """What a paired difference of recall means.

    Example:
        >>> judged(0.9, 0.2, Estimate(0.7, 0.6, 0.8))
        'recall falls from 0.900 to 0.200 (by 0.700 [0.600, 0.800]): the answers need them'
    """
    change = f"recall {'falls' if difference.mean >= 0 else 'rises'} from {real:.3f} to {probed:.3f} (by {difference})"
    if difference.low <= 0 <= difference.high:
        return f"{change}: no difference that can be told from noise"
    if difference.mean < 0:
        return f"{change}: the answers are better without"
    if harm:
        return f"{change}: {harm}"
    return f"{change}: the answers need them" if difference.mean > 0.1 * real else f"{change}: a small part needs them"


def area_under_curve(signal: np.ndarray, is_wrong: np.ndarray) -> float | None:
    """Probability that a wrong answer has the larger signal, ties halved; None without wrong or right ones.

    Example:
        >>> area_under_curve(np.array([0.1, 0.9, 0.5]), np.array([False, True, False]))
        1.0
    """
    wrong, right = signal[is_wrong], signal[~is_wrong]
    if not len(wrong) or not len(right):
        return None
    larger = (wrong[:, None] > right).mean() + (wrong[:, None] == right).mean() / 2
    return float(larger)


def _ridge(states: Tensor, labels: np.ndarray, others: Tensor, num_classes: int) -> np.ndarray:
    """Classes of other states by least squares on standardised ones."""
    mean, spread = states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
    x = F.pad((states - mean) / spread, (0, 1), value=1.0).double()
    y = F.one_hot(torch.from_numpy(labels).long(), num_classes).double()
    weights = torch.linalg.solve(x.T @ x + _RIDGE * torch.eye(x.shape[1]).double(), x.T @ y)
    return (F.pad((others - mean) / spread, (0, 1), value=1.0).double() @ weights).argmax(dim=1).numpy()
