"""Evaluation with masks: networks side by side, by each protocol, share of the masks and seed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .. import run_layout
from ..checks import duration
from ..data.segmentation import SegmentationDataset
from .baselines import Contender, input_sizes, layers_read, line_up, prepare_all
from .comparison import ALL_MAPS, CLUSTERING, FINETUNE, curve_shown, in_words, what_it_means
from .features import Preparation, Reader, Size, deepest_maps
from .finetuning import CROP_DETAIL, RATES, LearningRates, choose_rates, finetune, measure_cost
from .metrics import PreparedSplit, SampleCache, Scored, Scores
from .pictures import draw_label_curve, write_panels
from .probes import DivergedError, ProbeTask, run_probes
from .results import MIOU, CurvePoint, Evaluation, Row

log = logging.getLogger(__name__)

MANY_CLUSTERS = 500
SEVERAL_SEEDS = 3
"""Seeds unless a number is given, where the seed decides which masks are used; else one."""
PICTURES = 8
"""Images of which predictions are drawn, spread evenly over the split."""


class Plan(NamedTuple):
    """How networks are evaluated with labels, see `evaluate`."""

    protocols: tuple[str, ...]
    layers: Sequence[str] | None
    fractions: Sequence[float]
    seeds: int | None
    first_seed: int
    steps: int
    device: torch.device
    named: bool = True  # whether the protocols were asked for; of the usual ones some may be left

    def seeds_of(self, protocol: str, fraction: float, contender: Contender) -> range:
        """The seeds with which a protocol repeats; one where they change nothing."""
        usual = SEVERAL_SEEDS if protocol == FINETUNE or len(self.fractions) > 1 else 1
        varies = contender.by_seed or fraction < 1 or protocol in (FINETUNE, CLUSTERING)
        return range(self.first_seed, self.first_seed + ((self.seeds or usual) if varies else 1))

    @property
    def middle(self) -> float:
        """The share of the masks with which the learning rates of fine-tuning are chosen."""
        return sorted(self.fractions)[len(self.fractions) // 2]

    def fitting(
        self, contenders: Sequence[Contender], prepared: Mapping[str, Preparation], splits: Splits
    ) -> tuple[Self, list[str]]:
        """Without usual protocols that one of the networks has no maps for, and a note on these."""
        wanted = [protocol for protocol in self.protocols if protocol in (ALL_MAPS, FINETUNE)]
        for contender in contenders if wanted and not self.named else ():
            size = splits.prepared(True, prepared[contender.name]).size()
            try:
                deepest_maps(contender.build(self.first_seed), contender.card.channels, size)
            except ValueError as error:
                left = tuple(protocol for protocol in self.protocols if protocol not in wanted)
                return self._replace(protocols=left), [f"Left out {' and '.join(wanted)}: {error}"]
        return self, []


class Figure(NamedTuple):
    """What one network reached by one protocol with one share of the masks and one seed."""

    label: str
    masks: int
    seed: int
    scores: Scores


@dataclass
class Splits:
    """The images of one evaluation, prepared once for all networks that take them alike."""

    train: SegmentationDataset
    scored: SegmentationDataset
    caches: dict[object, SampleCache] = field(default_factory=dict)

    def prepared(self, scored: bool, preparation: Preparation, detail: int = 1) -> PreparedSplit:
        """A split for a network."""
        cache = self.caches.setdefault((scored, detail, preparation.form), SampleCache())
        return PreparedSplit(self.scored if scored else self.train, preparation, detail, cache)


def evaluate_labelled(
    weights: Sequence[str | Path],
    data: str | Path,
    split: str,
    opened: Sequence[SegmentationDataset],
    size: int | Size | None,
    plan: Plan,
    out: str | Path | None,
) -> Evaluation:
    """Evaluate all networks by masks, and write the figures and what they predict."""
    train, scored = opened
    splits = Splits(train, scored)
    reads_layers = any(protocol not in (ALL_MAPS, FINETUNE) for protocol in plan.protocols)
    read = plan.layers if reads_layers else ["a map of each stride"]
    contenders, notes = line_up(weights, train.source, read)
    prepared = prepare_all(contenders, size, plan.first_seed)
    plan, unfit = plan.fitting(contenders, prepared, splits)
    notes += unfit
    # Each number of masks once.
    shares = {len(train.share(fraction, 0)): fraction for fraction in plan.fractions}
    plan = plan._replace(fractions=list(shares.values()))
    if split == "train":
        notes.append("Scored on the training images: the figures are too optimistic.")
    if FINETUNE in plan.protocols:
        estimate_finetuning(contenders, prepared, splits, plan)
    keep = [len(splits.scored) * i // PICTURES for i in range(PICTURES)] if out is not None else []
    rows: list[Row] = []
    predictions: dict[str, dict[int, Tensor]] = {}
    rates: dict[str, str] = {}
    asked = sum(bool(contender.baselines) for contender in contenders)
    for contender in contenders:
        contest = Contest(contender, prepared[contender.name], splits, plan, keep)
        try:
            rows.append(contest.row())
        except DivergedError as error:
            asked -= 1
            if not contender.baselines or not asked:
                raise DivergedError(f"{contender.name}: {error}") from error
            notes.append(f"{contender.name} is left out: {error}")
            log.warning(notes[-1])
            continue
        predictions[contender.name] = contest.kept
        if contest.rates is not None:
            rates[contender.name] = str(contest.rates)
    settings: dict[str, Any] = {"split": split, "images": len(scored), "masks": list(shares)}
    if reads_layers:
        settings["layers"] = layers_read(contenders, plan.layers)
    settings["seeds"] = max(len(row.seeds) for row in rows)
    settings["input size"] = input_sizes(prepared.values())
    if FINETUNE in plan.protocols:
        settings |= {"steps": plan.steps, "learning rates": rates}
    evaluation = Evaluation(
        weights=", ".join(map(str, weights)),
        data=str(data),
        protocol=", ".join(plan.protocols),
        settings=settings,
        rows=tuple(rows),
        sentence=in_words(rows, lambda some: what_it_means(some, plan.protocols[0], split)),
        notes=tuple(notes),
    )
    if out is not None:
        folder = evaluation.write(out).parent
        some = next(iter(prepared.values()))
        write_panels(folder / run_layout.PREDICTIONS, splits.prepared(True, some), predictions)
        if (shown := curve_shown(evaluation.curves)) is not None:
            draw_label_curve(folder / run_layout.LABEL_CURVE, evaluation, shown)
        else:
            (folder / run_layout.LABEL_CURVE).unlink(missing_ok=True)  # of an earlier evaluation
    return evaluation


def estimate_finetuning(
    contenders: Sequence[Contender],
    prepared: dict[str, Preparation],
    splits: Splits,
    plan: Plan,
) -> None:
    """Say what fine-tuning will take, by trying a few steps of the last network."""
    contender = contenders[-1]
    prepare = prepared[contender.name]
    train, scored = splits.prepared(False, prepare, CROP_DETAIL), splits.prepared(True, prepare)
    least = train.of(splits.train.share(min(plan.fractions), plan.first_seed))
    cost = measure_cost(contender.build(plan.first_seed).to(plan.device), least, scored)
    fits = sum(
        len(plan.seeds_of(FINETUNE, fraction, each))
        for fraction in plan.fractions
        for each in contenders
    )
    several = len(splits.train.share(plan.middle, plan.first_seed)) > 1
    tries = len(RATES) * len(contenders) * several
    seconds = (fits + tries) * plan.steps * cost.step + fits * len(scored) * cost.image
    log.info(
        "fine-tuning: %d fits of %d steps, and %d to choose learning rates: about %s; reduce "
        "--seeds, --fractions or --steps to save time",
        fits,
        plan.steps,
        tries,
        duration(seconds),
    )


class Contest:
    """One network's part of an evaluation with labels.

    Predictions are kept of some images, by the first protocol with all masks it is given.
    """

    def __init__(
        self,
        contender: Contender,
        prepare: Preparation,
        splits: Splits,
        plan: Plan,
        keep: Sequence[int],
    ) -> None:
        self.contender, self.plan, self.keep = contender, plan, keep
        self.train = splits.prepared(False, prepare)
        self.crops = splits.prepared(False, prepare, CROP_DETAIL)
        self.scored = splits.prepared(True, prepare)
        self.kept: dict[int, Tensor] = {}
        self.figures: list[Figure] = []
        self.rates: LearningRates | None = None

    def row(self) -> Row:
        """Run everything: the network's row of the table."""
        plan, contender = self.plan, self.contender
        most = max(
            len(self.seeds_of(protocol, fraction))
            for protocol in plan.protocols
            for fraction in plan.fractions
        )
        for seed in range(plan.first_seed, plan.first_seed + most):
            net = contender.build(seed).to(plan.device)
            self.probe(net, seed)
            if FINETUNE in plan.protocols:
                self.finetune(net, seed)
            net.cpu()  # it is kept for other seeds, and needs no room on the device
        first = plan.protocols[0]
        by_label: dict[str, dict[int, list[Figure]]] = {}
        for figure in self.figures:
            by_label.setdefault(figure.label, {}).setdefault(figure.masks, []).append(figure)
        all_masks = {label: by_masks[max(by_masks)] for label, by_masks in by_label.items()}
        seeds: dict[int, dict[str, float]] = {}
        for label in sorted(all_masks, key=lambda label: label != first):  # whose keys come first
            for figure in all_masks[label]:
                scores = seeds.setdefault(figure.seed, {})
                scores[MIOU if label == first else f"{label} {MIOU}"] = figure.scores.miou
                scores |= {"pixel accuracy": figure.scores.accuracy} if label == first else {}
        classes = [
            dict(zip(self.train.classes, figure.scores.iou, strict=True))
            for figure in all_masks[first]
        ]
        curves = {
            label: [
                CurvePoint.of(masks, [figure.scores.miou for figure in figures])
                for masks, figures in sorted(by_masks.items())
            ]
            for label, by_masks in by_label.items()
            if len(plan.fractions) > 1 and not label.startswith(CLUSTERING)
        }
        ordered = [seeds[key] for key in sorted(seeds)]
        return Row.of(contender.name, ordered, classes, contender.baselines, curves)

    def note(self, label: str, masks: int, seed: int, scored: Scored) -> None:
        """Keep a figure, and tell it."""
        self.figures.append(Figure(label, masks, seed, scored.scores))
        entry = self.contender.name, label, masks, seed, scored.scores.miou
        log.info("%s, %s, %d masks, seed %d: mIoU %.3f", *entry)
        if label == self.plan.protocols[0] and scored.kept:
            self.kept = scored.kept

    def keep_of(self, protocol: str, fraction: float, seed: int) -> Sequence[int]:
        """The images whose predictions by this are kept."""
        plan = self.plan
        first = plan.protocols[0], max(plan.fractions), plan.first_seed
        return self.keep if (protocol, fraction, seed) == first else ()

    def probe(self, net: nn.Module, seed: int) -> None:
        """Run the protocols that read frozen features, in one pass for each share of the masks."""
        plan = self.plan
        seen = self.contender.card.channels, self.scored.size()
        layers = {ALL_MAPS: tuple(deepest_maps(net, *seen))} if ALL_MAPS in plan.protocols else {}
        usual = tuple(plan.layers or [self.contender.card.shown_layer])
        for fraction in plan.fractions:
            train = self.train.of(self.train.dataset.share(fraction, seed))
            probes: dict[str, ProbeTask] = {}
            for protocol in plan.protocols:
                if protocol == FINETUNE or seed not in self.seeds_of(protocol, fraction):
                    continue
                chosen = layers.get(protocol, usual)
                if protocol != CLUSTERING:
                    probes[protocol] = ProbeTask(protocol.removesuffix("-all"), train, chosen)
                elif fraction == max(plan.fractions):
                    for count in (len(train.classes), MANY_CLUSTERS):
                        label = protocol if count < MANY_CLUSTERS else f"{protocol}, {count}"
                        probes[label] = ProbeTask("clusters", self.scored, chosen, count)
            if not probes:
                continue
            names = list(dict.fromkeys(name for probe in probes.values() for name in probe.layers))
            reader = Reader(net, names, *seen, fast=True)
            keep = self.keep_of(plan.protocols[0], fraction, seed)
            results = run_probes(reader, list(probes.values()), self.scored, seed=seed, keep=keep)
            for (label, probe), scored in zip(probes.items(), results, strict=True):
                self.note(label, len(probe.train), seed, scored)

    def seeds_of(self, protocol: str, fraction: float) -> range:
        """The seeds with which a protocol repeats for this network."""
        return self.plan.seeds_of(protocol, fraction, self.contender)

    def finetune(self, net: nn.Module, seed: int) -> None:
        """Fine-tune with each share of the masks."""
        plan = self.plan
        if self.rates is None:
            share = self.train.dataset.share(plan.middle, seed)
            splits = self.crops.of(share), self.train.of(share)
            self.rates = choose_rates(net, *splits, steps=plan.steps, seed=seed)
        for fraction in plan.fractions:
            if seed in self.seeds_of(FINETUNE, fraction):
                train = self.crops.of(self.crops.dataset.share(fraction, seed))
                keep = self.keep_of(FINETUNE, fraction, seed)
                result = finetune(
                    net,
                    train,
                    self.scored,
                    rates=self.rates,
                    steps=plan.steps,
                    seed=seed,
                    keep=keep,
                )
                self.note(FINETUNE, len(train), seed, result)
