"""`tidelock generate RUN --prompt …`: ask a trained model."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from tidelock.cli.output import Output
from tidelock.errors import ConfigError
from tidelock.run.folder import RunFolder


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    *,
    prompt: Annotated[str, typer.Option(help="What to ask.", show_default=False)],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to answer with.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens with this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    cloud: Annotated[str | None, typer.Option(help="Another address than the run's, grpcs://HOST:PORT.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token for it.")] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file with the authority to trust.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Ask a trained model; it answers piece by piece."""
    output = Output(json=json)
    folder = RunFolder.open(run)
    config = folder.config().elsewhere(cloud, token_file, ca)
    if config.num_labels is not None or config.task == "regression":
        msg = (
            f"Generating: expected a run with --task causal-lm or text-to-text, got {config.task} ({run}). Measure it "
            "with tidelock eval."
        )
        raise ConfigError(msg)
    # These load torch, which --help must not wait for.
    torch = import_module("torch")
    module = import_module("tidelock.run.generate")
    settings_class = import_module("tidelock.device.generate").GenerationSettings
    settings = settings_class(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    output.quiet_libraries()
    torch.manual_seed(seed)
    model = module.open_trained(folder, config)
    try:
        tokenizer = import_module("tidelock.run.open_model").load_tokenizer(model.ends.folder)
        is_plain = raw or config.task == "text-to-text"
        ids = module.raw_prompt(tokenizer, prompt) if is_plain else module.chat_prompt(tokenizer, prompt)
        pieces: list[str] = []
        for piece in module.stream(model, tokenizer, ids, settings):
            pieces.append(piece)
            if not json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        model.close()
    output.result({"prompt": prompt, "answer": "".join(pieces)}, "")
