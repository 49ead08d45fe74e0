"""``baton ops``: which implementation of each operation would run where, and why."""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape
from rich.table import Table

from baton.cli.admin import make_console
from baton.cli.settings import parse_settings
from baton.core.errors import ConfigError
from baton.engine.checkpoint import open_checkpoint


def show_ops(model: str | None, engine: dict[str, Any], *, as_json: bool) -> None:
    """Print the choices for a model; no weights are read.

    ``engine``: settings of ``EngineConfig``, ``None`` where not given. Raises ConfigError for wrong
    settings, a broken checkpoint, a device that is not there, or ranks that the model cannot be
    cut for.
    """
    if not model:
        raise ConfigError("model is missing: give --model DIR", param="model")
    given = {name: value for name, value in engine.items() if value is not None}
    config = parse_settings({"model": model, "engine": given}, source="flags").engine
    checkpoint = open_checkpoint(model)
    # Here, because importing torch takes longer than finding most mistakes.
    from baton.engine.ops.dry import dry_choices, unused_ops

    choices = dry_choices(checkpoint, config)
    settings: dict[str, str | int] = {"device": config.device, "dtype": config.dtype}
    settings |= {"tp": config.tp, "ep": config.ep, "dp": config.dp}
    rows = [
        {
            "where": choice.site.where,
            "op": choice.site.op,
            "dtype": str(choice.site.dtype).removeprefix("torch."),
            "shape": dict(choice.site.shape),
            "implementation": choice.implementation.name,
            "reason": choice.reason,
            "weights": choice.layout,
            "passed_over": [
                {"implementation": name, "reason": reason} for name, reason in choice.passed_over
            ],
        }
        for choice in choices
    ]
    unused = unused_ops(choices)
    if as_json:
        print(json.dumps({"model": model, **settings, "ops": rows, "unused": unused}))
        return
    console = make_console()
    stated = "  ".join(f"{name} {value}" for name, value in settings.items())
    console.print(f"{escape(model)}  {stated}  (sizes are those of one rank)")
    console.print(_table(rows))
    if unused:
        console.print(f"not used by this model: {', '.join(unused)}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("where", "op", "dtype"):
        table.add_column(column, no_wrap=True)
    table.add_column("shape")
    table.add_column("implementation", no_wrap=True)
    for column in ("why", "weights", "passed over"):
        table.add_column(column)
    for row in rows:
        passed_over = (f"{item['implementation']}: {item['reason']}" for item in row["passed_over"])
        cells = (
            row["where"],
            row["op"],
            row["dtype"],
            " ".join(f"{name}={size}" for name, size in row["shape"].items()),
            row["implementation"],
            row["reason"],
            row["weights"] or "",
            "; ".join(passed_over),
        )
        table.add_row(*map(escape, cells))
    return table
