"""Train a run by the stacked rule: windows back to back before `until`, a ranker over them, then refit on everything.

1. For each window [w0, w1): a base run from events before w0, a feature store folded to w0, what its cascade finds.
2. A ranker on all windows but the last, judged and calibrated on the last: the run's measures.
3. The final base run from all events before `until`, and the ranker trained again on all windows.

Source: design, replay protocol, "Stacked models".
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from recsys.candidates.fusion import FILE as FUSION_FILE
from recsys.core import BadInput, RunDirectory, RunWriter
from recsys.core.items import ItemTable
from recsys.core.logging import get_logger
from recsys.core.run_dir import beside
from recsys.data import Dataset
from recsys.models.ranker import Head, Prior, Ranker
from recsys.models.text.build import FOLDER
from recsys.pipeline import ARMS
from recsys.training.base_run import iso, join_base, manifest_fields, window_run, write_base
from recsys.training.fusion import learn_fusion
from recsys.training.launch import launch
from recsys.training.lists import foreseen, times_us, window_lists, window_starts
from recsys.training.rank_lists import ARM, RankLists, heads_of
from recsys.training.ranker_trainer import calibrate, choose_priors, other_logits, score_lists, train_ranker
from recsys.training.ranks import Ranks, joined, launched
from recsys.training.settings import Settings
from recsys.training.tower_trainer import CHECKPOINTS
from recsys.training.validation import calibration_error, list_measures
from recsys.training.windows import Window, span_us, window_length_us

_log = get_logger(__name__)
_STRAYS_NAMED = 5


def train(
    dataset_dir: Path | str,
    out: Path | str,
    *,
    until_us: int | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    replace: bool = False,
    nproc: int = 1,
) -> RunDirectory:
    """Train everything a request needs on events strictly before `until_us` (default: just after the last event, but
    for a few that lie far away from all others; see `span_us`).

    Working files are under `OUT.work/`; window runs and checkpoints there that fit are used again, so that a training
    that was killed goes on. nproc: processes on this host; under torchrun this process is one of those it started. Each
    makes some of the windows' runs, and all train the final towers together.
    Raises: Conflict when `out` exists; BadInput for a time without events or items before it, after the data, or with
    too few days before it for windows; CorruptData for a loss that is not finite.
    """
    settings = settings or Settings()
    dataset, out = Dataset.open(dataset_dir), Path(out)
    until_us = _checked_until(dataset, until_us, settings)
    if not len(dataset.item_table(before_us=until_us)):
        raise BadInput(
            f"dataset {dataset.root}", came=f"no item available before {iso(until_us)}", expected="items to recommend",
            fix="Correct available_from of items, or leave it empty: then it is the first event's time.",
        )  # fmt: skip
    windows = window_starts(dataset, until_us, settings)
    work = beside(out, ".work")
    here = launched()
    if here is None and nproc > 1:
        RunWriter(out, {}, replace=replace)  # says now if it is there
        launch(dataset.root, out, until_us=until_us, seed=seed, settings=settings, replace=replace, nproc=nproc)
        return RunDirectory.open(out)
    if here is not None:
        rank, size = here
        for window in windows[rank::size]:
            window_run(dataset, window.from_us, seed=seed, settings=settings, work=work)
        if rank == size - 1:  # nobody has fewer windows: while others make their last one
            positives = foreseen(dataset, windows, settings.training)
            window_lists(dataset, windows, positives, seed=seed, settings=settings, work=work, ahead=True)
    with joined(settings.training.device) as ranks:
        ranks.wait_for_all()
        if not ranks.leads:
            join_base(dataset, until_us, ranks, seed=seed, settings=settings, work=work)
        else:
            _lead(dataset, out, until_us, windows, ranks, seed=seed, settings=settings, replace=replace, work=work)
    return RunDirectory.open(out)


def _lead(
    dataset: Dataset,
    out: Path,
    until_us: int,
    windows: list[Window],
    ranks: Ranks,
    *,
    seed: int,
    settings: Settings,
    replace: bool,
    work: Path,
) -> None:
    """What one process does: everything, the final towers together with the others."""
    facts = f"{dataset.hash}/{until_us}/{seed}/{settings.as_dict()}"
    run_id = f"{out.name}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    fields = manifest_fields(dataset, until_us, seed, settings, run_id)
    with RunWriter(out, fields, replace=replace) as run:
        positives = foreseen(dataset, windows, settings.training)
        lists = window_lists(dataset, windows, positives, seed=seed, settings=settings, work=work)
        tower = write_base(run, dataset, until_us, seed=seed, settings=settings, work=work, ranks=ranks, online=True)
        if tower.text_encoder is not None:  # windows need vectors only; serving encodes titles of its own
            tower.text_encoder.save(run.path(f"{FOLDER}/x").parent)
        learn_fusion(lists, ARMS[ARM].feeds).save(run.path(FUSION_FILE))
        items = ItemTable.read(run.path("items.parquet"))
        names = heads_of(lists, positives)
        judged, priors, heads = _judge(lists, items, names, seed=seed, settings=settings, work=work)
        ranker = _fit(lists, items, names, seed=seed, settings=settings, work=work)
        ranker.priors, ranker.heads = priors, heads
        ranker.save(run.path("models/ranker.json").parent)
        run.fields["measures"] = {
            "validation": judged,
            "foresees": list(positives),
            "heads": list(names),
            "windows": [{"from": iso(w.from_us), "to": iso(w.to_us)} for w in windows],
        }
    for checkpoints in work.glob(f"{CHECKPOINTS}*"):
        shutil.rmtree(checkpoints)


def out_of_fold_scores(
    lists: list[RankLists], items: ItemTable, like: Ranker, *, seed: int, settings: Settings, work: Path
) -> list[npt.NDArray[np.float32]]:
    """Scores of each window's lists by a ranker trained on other windows: out-of-fold by time block.

    The last window, which validates, is scored by a ranker of all the windows before it; of those, each half is scored
    by a ranker of the other half. like: the run's ranker, whose priors and calibration put the scores on its scale.
    """
    *earlier, last = lists
    half = (len(earlier) + 1) // 2
    names = [head.foresees for head in like.heads]
    folds = [(earlier[half:], earlier[:half]), (earlier[:half], earlier[half:]), (earlier, [last])]
    scores = []
    for fitted, scored in folds:
        if scored:
            ranker = _fit(fitted or [last], items, names, seed=seed, settings=settings, work=work)
            ranker.priors, ranker.heads = like.priors, like.heads
            scores += [score_lists(ranker, part) for part in scored]
    return scores


def _judge(
    lists: list[RankLists], items: ItemTable, names: Sequence[str], *, seed: int, settings: Settings, work: Path
) -> tuple[dict[str, float], tuple[Prior, ...], tuple[Head, ...]]:
    """Measures by task, priors and calibrated heads of a ranker trained without the last window, on the last window."""
    *earlier, last = lists
    if not earlier:
        fix = "compare it with other arms (double11 replay) before it serves"
        _log.warning("ranker_not_validated", windows_with_queries=len(lists), fix=fix)
        return {}, (), tuple(map(Head, names))
    ranker = _fit(earlier, items, names, seed=seed, settings=settings, work=work)
    ranker.priors = choose_priors(ranker, last)
    every, new = (last.of_task(new_only=new_only) for new_only in (False, True))
    scores = score_lists(ranker, every)
    measures = list_measures(every, scores)
    if len(every) > 1:
        measures["ece"] = calibration_error(every, scores, calibrate)
    measures |= {f"prior_{'_'.join(prior.features)}": prior.weight for prior in ranker.priors}
    if len(new):
        measures |= {f"new_only_{k}": v for k, v in list_measures(new, score_lists(ranker, new)).items()}
        measures |= {f"new_only_prior_{'_'.join(prior.features)}": prior.fresh_weight for prior in ranker.priors}
    heads = [Head(names[0], calibrate(scores, every.label))]
    for behaviour, logit in zip(names[1:], other_logits(ranker, every).T, strict=True):
        did = every.did(behaviour)
        heads.append(Head(behaviour, calibrate(logit, did)))
        measures[f"{behaviour}_share"] = float(did.mean())
        if len(every) > 1:
            measures[f"{behaviour}_ece"] = calibration_error(replace(every, label=did), logit, calibrate)
    _log.info("ranker_validated", **{k: round(v, 4) for k, v in measures.items()})
    return measures, ranker.priors, tuple(heads)


def _fit(
    lists: list[RankLists], items: ItemTable, heads: Sequence[str], *, seed: int, settings: Settings, work: Path
) -> Ranker:
    return train_ranker(
        RankLists.concat(lists),
        items,
        heads=heads,
        config=settings.training,
        model=settings.ranker,
        seed=seed,
        work=work,
    )


def _checked_until(dataset: Dataset, until_us: int | None, settings: Settings) -> int:
    """The default is just after the last event; a time past the data may leave the last window no event."""
    times = times_us(dataset)
    first_us, last_us = span_us(times)
    if len(strays := times[(times < first_us) | (times > last_us)]):
        _log.warning(
            "events_far_from_all_others",
            at=[iso(t) for t in strays[:_STRAYS_NAMED].tolist()],
            number=len(strays),
            others=f"{iso(first_us)} to {iso(last_us)}",
            fix="Correct their times. They do not count for --until and the windows' length.",
        )
    if until_us is None:
        return last_us + 1
    length_us = window_length_us(first_us, until_us, settings.training.window_days)
    if not first_us < until_us <= last_us + length_us:
        raise BadInput(
            "--until",
            came=iso(until_us),
            expected=f"after {iso(first_us)} and less than a window after {iso(last_us)}",
            fix="Choose a time inside the data, or leave --until out.",
        )
    return until_us
