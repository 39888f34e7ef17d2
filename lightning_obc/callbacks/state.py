"""What a run has done so far, and how it is written into, and found again in, a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_obc.activations import InputGrid, inputs_from_state, inputs_state
from lightning_obc.callbacks.held import HeldWeights
from lightning_obc.callbacks.plateau import PlateauWatch
from lightning_obc.callbacks.timetable import Timetable
from lightning_obc.correction import CorrectionReport
from lightning_obc.correction_spec import Correct
from lightning_obc.errors import FingerprintError
from lightning_obc.layerwise import Edges, stage_layers
from lightning_obc.origins import Origins
from lightning_obc.report import StageReport, WeightSample
from lightning_obc.specs import Stage

PREFIX = "OBCCallback-"


@dataclass
class RunState:
    """The part of the callback that belongs to one model.

    Attributes:
        timetable: Which stages are done.
        held: Masks and grids that training must keep.
        inputs: Ranges of the layers' inputs that are quantized.
        reports: One report per finished stage; without solutions after a resume.
        corrections: One report per finished correction.
        dense: Validation figures of the model before the first stage.
        dense_when: When they were measured.
        dense_step: Optimizer steps at that time.
        watch: The metric that the next stage waits for.
        plans: The plans of the stages that have run, as text.
        samples: Some weights of each layer before the first stage; fewer after a resume.
        histograms: Histograms of the weights of each layer before and after the last stage that solved it.
        origins: Weights before the stages that run now, one after the other without training in between.
    """

    timetable: Timetable
    held: HeldWeights = field(default_factory=HeldWeights)
    inputs: dict[str, InputGrid] = field(default_factory=dict)
    reports: list[StageReport] = field(default_factory=list)
    corrections: list[CorrectionReport] = field(default_factory=list)
    dense: dict[str, float] = field(default_factory=dict)
    dense_when: str = ""
    dense_step: int = 0
    watch: PlateauWatch = field(default_factory=PlateauWatch)
    plans: list[str] = field(default_factory=list)
    samples: dict[str, WeightSample] = field(default_factory=dict)
    histograms: dict[str, Any] = field(default_factory=dict)
    origins: Origins = field(default_factory=Origins)

    @contextmanager
    def whole_or_not(self) -> Iterator[None]:
        """After an exception or an interrupt inside, the state is as it was before: that of weights taken back."""
        held, inputs, histograms = self.held.kept(), self.inputs, self.histograms
        reports, corrections, plans = len(self.reports), len(self.corrections), len(self.plans)
        try:
            yield
        except BaseException:
            self.held.take_back(held)
            self.inputs, self.histograms = inputs, histograms
            del self.reports[reports:], self.corrections[corrections:], self.plans[plans:]
            raise

    def expect(self, model: nn.Module, stages: Sequence[Stage], edges: Edges | None) -> None:
        """These stages are about to run, with no training between them."""
        solved = {row.name for report in self.reports for row in report.layers if row.compressed}
        solving = [stage for stage in stages if not isinstance(stage, Correct)]
        self.origins.expect([stage_layers(model, stage, edges) for stage in solving], solved)

    def finish(self, index: int) -> None:
        """A stage is done; metrics that the next one waits for are those of another model."""
        self.timetable.done.append(index)
        if self.timetable.next_plateau() != self.timetable.stages[index].at:
            self.watch.restart()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only."""
        return {
            "version": 1,
            "stages": [repr(stage) for stage in self.timetable.stages],
            "done": list(self.timetable.done),
            "layers": self.held.state_dict(),
            "activations": inputs_state(self.inputs),
            "reports": [report.to_dict() for report in self.reports],
            "corrections": [report.to_dict() for report in self.corrections],
            "dense": dict(self.dense),
            "dense_when": self.dense_when,
            "dense_step": self.dense_step,
            "watch": self.watch.state_dict(),
            "plans": list(self.plans),
            "samples": {name: sample.state_dict() for name, sample in self.samples.items()},
            "histograms": dict(self.histograms),
            "origins": self.origins.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a written state whose finished stages are the first of ours.

        Raises:
            FingerprintError: The finished stages are others.
        """
        theirs = [state["stages"][index] for index in state["done"]]
        ours = [repr(self.timetable.stages[i]) for i in state["done"] if i < len(self.timetable.stages)]
        if theirs != ours:
            raise FingerprintError(
                "The checkpoint was compressed by another recipe",
                got="; ".join(theirs),
                expected=f"{'; '.join(map(repr, self.timetable.stages))} up to the same stage",
                remedy="resume with the stages that have run already, followed by any others",
            )
        self.timetable.done = list(state["done"])
        self.load_layers(state)
        self.reports = [StageReport.from_dict(entry) for entry in state["reports"]]
        self.corrections = [CorrectionReport.from_dict(entry) for entry in state.get("corrections", ())]
        self.dense, self.dense_when = dict(state["dense"]), state["dense_when"]
        self.dense_step = state["dense_step"]
        self.watch.load_state_dict(state.get("watch", {}))
        self.plans, self.histograms = list(state.get("plans", ())), dict(state.get("histograms", {}))
        self.samples = {name: WeightSample.from_state(one) for name, one in state.get("samples", {}).items()}
        self.origins.load_state_dict(state.get("origins", {}))

    def load_layers(self, state: Mapping[str, Any]) -> None:
        """Take over what the weights of a checkpoint carry, whatever recipe they came from."""
        self.held.load_state_dict(state["layers"])
        self.inputs = inputs_from_state(state.get("activations") or {})


def state_key(stages: Sequence[Stage]) -> str:
    """One key per recipe: two callbacks of one Trainer must not share their state."""
    return PREFIX + hashlib.sha256("; ".join(map(repr, stages)).encode()).hexdigest()[:12]


def foreign_state(checkpoint: Mapping[str, Any], present: Sequence[str]) -> Mapping[str, Any] | None:
    """The one state in a checkpoint that belongs to none of the callbacks present, or None.

    A recipe that was changed has another key; Lightning would then drop its masks with no more than a warning.

    Raises:
        FingerprintError: There are several, so that it cannot be told whose they are.
    """
    states = {key: state for key, state in (checkpoint.get("callbacks") or {}).items() if key.startswith(PREFIX)}
    orphans = [state for key, state in states.items() if key not in present]
    if len(orphans) > 1:
        raise FingerprintError(
            "The checkpoint holds the states of several other compression recipes",
            got="; ".join(str(state["stages"]) for state in orphans),
            expected="the recipes that wrote the checkpoint",
            remedy="give the Trainer the same callbacks as the run that is resumed",
        )
    return orphans[0] if orphans else None
