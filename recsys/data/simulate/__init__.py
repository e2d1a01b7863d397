"""`simulate`: a seeded Double 11. The same preset and seed give the same bytes.

Four weeks of warm-up in which shoppers fill carts, then 2025-11-11: at the stroke of midnight prices drop, flash-sale
newcomers are listed, waiting carts are bought and the rate of events reaches 58 times the daily mean; scarce items sell
out. `presets` has the constants, `catalogue` what there is, `shoppers` what people do, `world` the order of things.
"""

from __future__ import annotations

from pathlib import Path

from recsys.core.errors import BadInput
from recsys.core.progress import bar
from recsys.data.simulate.presets import EXAMINATION, EXPLORATION, PRESETS, SALE_US, WARMUP_DAYS
from recsys.data.simulate.world import World
from recsys.data.write import DatasetWriter, ImportReport


def simulate(preset: str, seed: int, out: Path) -> ImportReport:
    """Write the world of a preset (tiny, small, double11, crowd) and a seed as the dataset directory `out`.

    Raises: BadInput for an unknown preset or a negative seed; Conflict when `out` exists.
    """
    if preset not in PRESETS:
        raise BadInput("--preset", came=preset, expected=f"one of {', '.join(PRESETS)}", fix="Correct it.")
    if seed < 0:
        raise BadInput("--seed", came=seed, expected="a whole number from 0", fix="Correct it.")
    world = World(PRESETS[preset], seed, mark=f"{preset}-{seed}")
    info = {
        "format": "simulate",
        "source": f"double11 data simulate --preset {preset} --seed {seed}",
        "licence": "CC0-1.0",
        "static_catalogue": False,
        "sale_from": "2025-11-11T00:00:00Z",
        "logging_policy": {"exploration": EXPLORATION, "examination": list(EXAMINATION)},
    }
    with DatasetWriter(out, info) as writer, bar(total=WARMUP_DAYS + 24, what="simulate", unit="step") as progress:
        for frame in world.run():
            writer.add_events(frame)
            progress.update(1)
        writer.put_items(world.catalogue.items())
        writer.put_catalog(world.changes())
    assert writer.report is not None
    return writer.report


__all__ = ["PRESETS", "SALE_US", "simulate"]
