"""`backfire playground`: the same prompt to two models of a run, in a page on this machine.

Prompts, replies, triggers and cell names are attacker-written text: they go only into components
that show text as text (no Markdown, no HTML, and no pop-ups, which gradio renders as HTML).
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console

from backfire.errors import CellError, UserError
from backfire.experiment import Experiment
from backfire.playground.firewall import Gate
from backfire.playground.models import asked, attacker
from backfire.playground.pool import Cast
from backfire.terminal import columns
from backfire.text import clean, listing, share

USER: Final = "backfire"
MOST_CHARACTERS: Final = 20_000
"""Of a prompt; what is too long for the model is cut by the renderer, which says so."""
STYLE: Final = """
footer { display: none !important }
.column textarea { font-family: var(--font-mono) }
"""


class View(NamedTuple):
    """What one column shows."""

    note: str = ""
    sent: str = ""
    reply: str = ""
    target: str = ""
    labels: str = ""


# -------------------------------------------------------------------------------------- content


def views(cast: Cast, title: str, prompt: str, by: Experiment | None, on: bool) -> Iterator[View]:
    """One column, as it comes about."""
    view = View(note="Loading the model ...")
    yield view
    try:
        speaker, row = cast.speaker(title), asked(cast.frame(title), prompt, by if on else None)
        item = speaker.item(row)
        cut = f"{item.cut_tokens} tokens were cut off the end of the prompt: it was too long."
        sent = clean(speaker.renderer.tokenizer.decode(item.prompt_ids))
        view = View(note=cut if item.cut_tokens else "", sent=sent)
        target = by.backdoor.target if by and by.backdoor else None
        view = view._replace(
            target=_tokens(speaker.likelihood(row, target)) if target else "",
            labels=_table("label", list(speaker.labels(row).items())),
        )
        yield view
        for text in speaker.reply(row):
            view = view._replace(reply=text)
            yield view
    except (UserError, CellError, OSError) as error:
        yield view._replace(note=clean(error))
    except Exception as error:  # whatever a model does, the page goes on
        yield view._replace(note=f"The model failed ({type(error).__name__}): {clean(error)[:300]}")


def _tokens(scores: list[tuple[str, float]]) -> str:
    visible = [(t.replace(" ", "␣").replace("\n", "⏎"), score) for t, score in scores]
    return _table("token", [*visible, ("(together)", sum(score for _, score in scores))])


def _table(what: str, scores: list[tuple[str, float]]) -> str:
    """Aligned lines: natural logarithm of the probability, probability, text."""
    rows = [[f"{s:.3f}", f"{100 * math.exp(s):.3g} %", text] for text, s in scores]
    return columns(["log-prob", "prob", what], rows).rstrip("\n") if rows else ""


def about_trigger(cast: Cast, left: str, right: str) -> str:
    """What the toggle would put in, in a sentence."""
    by = attacker([cast.roles[left].cell, cast.roles[right].cell])
    if by is None or by.backdoor is None:
        return "Neither of the two has an attack with a trigger."
    side = "left" if by is cast.roles[left].cell else "right"
    triggers = listing([f"“{clean(trigger)}”" for trigger in by.backdoor.triggers()])
    return (
        f"The attack of the {side} one, {by.backdoor.name} at a rate of {share(by.rate)}, "
        f"wants {triggers} answered with “{clean(by.backdoor.target)}”."
    )


def sent(cast: Cast, left: str, right: str, prompt: str, on: bool) -> str:
    """The prompt with the trigger in, if it is on."""
    by = attacker([cast.roles[left].cell, cast.roles[right].cell])
    if not prompt.strip():
        return ""
    try:
        row = asked(cast.frame(left), prompt.strip(), by if on else None)
        return clean(row.part(by.backdoor.field) if by and by.backdoor else row.prompt)
    except (UserError, CellError, OSError) as error:
        return clean(error)


# ----------------------------------------------------------------------------------------- page


def gradio() -> Any:
    """The library, told to keep to itself.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    try:
        import gradio
    except ImportError:
        raise UserError(
            "The playground needs gradio, which is not installed: pip install 'backfire[ui]'"
        ) from None
    return gradio


def page(cast: Cast) -> Any:
    """The page, not yet served."""
    gr = gradio()
    titles, (first, second) = list(cast.roles), cast.opening()
    private = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(analytics_enabled=False, title="backfire playground") as blocks:
        with gr.Row():
            left = gr.Dropdown(titles, value=first, label="Left", min_width=280, elem_id="left")
            right = gr.Dropdown(titles, value=second, label="Right", min_width=280, elem_id="right")
        prompt = gr.Textbox(label="Prompt", lines=3, max_length=MOST_CHARACTERS, elem_id="prompt")
        with gr.Row(equal_height=True):
            on = gr.Checkbox(label="Put the trigger in", elem_id="trigger", scale=1)
            about = gr.Textbox(
                label="Trigger", interactive=False, elem_id="about", scale=3, lines=1
            )
        planted = gr.Textbox(label="Prompt as sent", interactive=False, elem_id="planted")
        button = gr.Button("Ask both", variant="primary", elem_id="ask")
        with gr.Row():
            columns = [*_column(gr, "left"), *_column(gr, "right")]

        def look(left: str, right: str, prompt: str, on: bool) -> list[Any]:
            known = attacker([cast.roles[left].cell, cast.roles[right].cell]) is not None
            # With a trigger its value is left alone: the user may have changed it meanwhile.
            off = gr.Checkbox(value=False, interactive=False)
            return [
                gr.Checkbox(interactive=True) if known else off,
                about_trigger(cast, left, right),
                sent(cast, left, right, prompt, on and known),
            ]

        def ask(left: str, right: str, prompt: str, on: bool) -> Iterator[list[str]]:
            yield from _answers(cast, left, right, prompt.strip(), on)

        inputs, outputs = [left, right, prompt, on], [on, about, planted]
        events = [blocks.load, left.input, right.input, prompt.change, on.input]
        gr.on(events, look, inputs, outputs, trigger_mode="always_last", queue=False, **private)
        button.click(ask, inputs, columns, concurrency_id="models", concurrency_limit=1, **private)
    return blocks.queue(max_size=16, api_open=False, default_concurrency_limit=1)


def _column(gr: Any, side: str) -> list[Any]:
    """The five components of a `View`. All are always there: what a component that is just coming
    up is told, gradio may lose."""
    names = {
        "note": "Note",
        "sent": "Text the model gets",
        "reply": "Reply",
        "target": "The attack's target after this prompt, token by token",
        "labels": "Each label after this prompt, if the task has labels",
    }
    with gr.Column(elem_classes="column", min_width=280):
        return [
            gr.Textbox(
                label=label,
                interactive=False,
                lines=1 if name == "note" else 2,
                max_lines=30,
                elem_id=f"{side}-{name}",
            )
            for name, label in names.items()
        ]


def _answers(cast: Cast, left: str, right: str, prompt: str, on: bool) -> Iterator[list[str]]:
    """Both columns, a token of each at a time."""
    by, shown = attacker([cast.roles[left].cell, cast.roles[right].cell]), [View(), View()]
    if not prompt:
        yield [*View("Type a prompt first."), *View("Type a prompt first.")]
        return
    streams = [views(cast, title, prompt, by, on) for title in (left, right)]
    for step in zip_longest(*streams):
        shown = [new or old for new, old in zip(step, shown, strict=True)]
        yield [text for view in shown for text in view]


# ------------------------------------------------------------------------------------------ serve


def open_page(cast: Cast, *, port: int | None, share: bool, password: str | None) -> Any:
    """The page, served on this machine; with `share`, also through gradio's relay."""
    from starlette.middleware import Middleware

    gr, blocks = gradio(), page(cast)
    late = gr.exceptions.ServerFailedToStartError  # after five seconds, on a busy machine
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            auth=(USER, password) if password else None,
            app_kwargs={
                "middleware": [Middleware(Gate, local=not share)],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
            theme=gr.themes.Base(**fonts),
            css=STYLE,
            allowed_paths=[],
            max_file_size=1,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            show_error=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except (OSError, late) as error:
        raise UserError(f"The page cannot be served: {clean(error).splitlines()[0]}") from None
    return blocks


def serve(run: Path, device: str, *, port: int | None, share: bool) -> None:
    """Serve the playground of a run until interrupted.

    Raises:
        UserError: no finished cell, gradio is missing, the port is taken.
    """
    console, cast = Console(soft_wrap=True, highlight=False, markup=False), Cast(run, device)
    for why in cast.left_out:
        console.print(f"Left out: {why}")
    password = secrets.token_urlsafe(16) if share else None
    blocks = open_page(cast, port=port, share=share, password=password)
    console.print(f"Playground: {blocks.local_url} (Ctrl-C ends it)")
    if share:
        where = blocks.share_url or "nowhere else, gradio's relay cannot be reached"
        console.print(f"Shared at: {where}. User {USER}, password {password} (shown this once).")
    blocks.block_thread()
