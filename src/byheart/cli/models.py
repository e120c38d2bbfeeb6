"""`byheart models` and `doctor`: what is there, and what was found in a model."""

from __future__ import annotations

import json
from typing import Any

import typer

from byheart import __version__
from byheart.cli.options import AsJson, BaseName, Device, DtypeName, EncoderName, indented

app = typer.Typer()


@app.command("models")
def _models(as_json: AsJson = False) -> None:
    """List the embedded models, and whether they are there."""
    from byheart.embedded import EMBEDDED, folder_of, is_ready

    rows: list[dict[str, Any]] = [
        {
            "alias": m.alias,
            "role": m.role,
            "download_mb": m.megabytes,
            "licence": m.licence,
            "there": is_ready(m.alias),
            "folder": str(folder_of(m.alias)),
            "facts": m.facts,
        }
        for m in EMBEDDED.values()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = row["folder"] if row["there"] else f"not here yet ({row['download_mb']} MB to fetch)"
        print(f"{row['alias']:14} {row['role']:15} {row['licence']:11} {state}\n{'':14} {row['facts']}")


@app.command("doctor")
def _doctor(
    base: BaseName = "smollm2-135m",
    encoder: EncoderName = "minilm",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Load a model and an encoder, check that byheart can work on them, and show what was found."""
    from byheart.base import load_base
    from byheart.encoder import load_encoder
    from byheart.progress import Terminal
    from byheart.record import machine
    from byheart.storage import home

    show = Terminal()
    record: dict[str, Any] = {"byheart": __version__, "home": str(home()), "machine": machine()}
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    record["base"] = {
        "name": model.name,
        "type": model.model.config.model_type,
        "kind": model.kind,
        "dtype": model.dtype_name,
        "device": str(model.device),
        "blocks": len(model.parts.blocks),
        "width": model.parts.d_model,
        "mlp_width": model.parts.d_ff,
        "hash": model.hash,
        "parts": model.parts.names(model.model),
        "self_check": "ok: the found parts give the model's own logits",
    }
    record["encoder"] = load_encoder(encoder, device=device, dtype=dtype, say=show.say).card.to_dict()
    print(json.dumps(record, indent=2) if as_json else indented(record))


# -- ledger --------------------------------------------------------------------------------------------------
