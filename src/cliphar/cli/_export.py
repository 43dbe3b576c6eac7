"""cliphar export: add runtimes to a bundle, each proved equal first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cliphar.cli._options import a_path
from cliphar.cli._output import say, tell
from cliphar.errors import UsageError, printable

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="A model's name or a bundle's directory.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="Comma-separated: onnx-fp32, onnx-fp16, onnx-w8, onnx-int8, openvino, openvino-bf16, openvino-int8, "
            "torch-export, torchscript, tensorrt, tensorrt-int8. Or one of triton and kserve.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the extended bundle goes.", show_default="in place, or the models' store")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            parser=a_path,
            metavar="<path>",
            help="Photos to calibrate and verify with; LABEL/PHOTO measures accuracy too.",
            show_default="the package's three",
        ),
    ] = None,
    runtime: Annotated[str, typer.Option(help="For triton and kserve: the runtime to use.")] = "onnx",
    max_loss: Annotated[float, typer.Option(min=0, max=1, help="How much top-1 accuracy a runtime may lose.")] = 0.005,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per target.")] = False,
) -> None:
    """Add faster or smaller runtimes to a model. One whose answers differ from the reference's is refused."""
    from cliphar.bundle import find_bundle

    targets = [name.strip() for name in to.split(",") if name.strip()]
    try:
        from cliphar.export import LAYOUTS, export_bundle, write_layout
    except ImportError as error:
        raise UsageError("exporting needs torch and onnx; run: pip install 'cliphar[train]'") from error
    if set(targets) & set(LAYOUTS):
        if len(targets) > 1 or out is None:
            raise UsageError(f"--to {to}: a server's layout is written alone, with --out DIR")
        place = write_layout(find_bundle(model), targets[0], out, runtime=runtime)
        written = {"target": targets[0], "added": True, "path": printable(str(place))}
        print(json.dumps(written) if as_json else f"{targets[0]}: {place}")
        return
    bundle, outcomes = export_bundle(
        find_bundle(model),
        targets,
        out=out,
        photos=calibration,
        max_loss=max_loss,
        say=say,
    )
    for outcome in outcomes:
        if outcome.failed:
            tell(outcome.failed)
        if as_json:
            print(json.dumps({"target": outcome.target, "added": not outcome.failed} | outcome.parity))
        elif not outcome.failed:
            parity = outcome.parity
            speed = parity["images_per_s"] / parity["reference_images_per_s"]
            accuracy = f", accuracy {parity['accuracy_difference']:+.4f}" if "accuracy" in parity else ""
            print(
                f"{outcome.target:<14} cosine {parity['cosine_mean']:.5f} (least {parity['cosine_min']:.5f}), "
                f"top-1 agreement {parity['agreement']:.3f}{accuracy}, {speed:.2f} x the reference's speed"
            )
    if not as_json:
        print(f"{bundle.info.name}: {', '.join(bundle.runtimes)} at {bundle.path}")
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)
