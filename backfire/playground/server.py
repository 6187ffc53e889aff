"""`backfire playground`: the same prompt to two models of a run, in a page on this machine.

Prompts, replies, triggers and cell names are attacker-written text: they go only into plain-text
components (no Markdown, no HTML, and no pop-ups, which gradio renders as HTML).
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
from backfire.playground.firewall import Firewall
from backfire.playground.models import chat_row, first_with_trigger
from backfire.playground.pool import ModelPool
from backfire.terminal import columns
from backfire.text import clean, listing, share

USER: Final = "backfire"
MOST_CHARACTERS: Final = 20_000
"""Longest prompt; what does not fit the model is cut by the renderer and noted."""
STYLE: Final = """
footer { display: none !important }
.column textarea { font-family: var(--font-mono) }
"""


class View(NamedTuple):
    """The texts of one column."""

    note: str = ""
    sent: str = ""
    reply: str = ""
    target: str = ""
    labels: str = ""


# -------------------------------------------------------------------------------------- content


def views(
    pool: ModelPool, title: str, prompt: str, attacked: Experiment | None, triggered: bool
) -> Iterator[View]:
    """Yield one column as it fills."""
    view = View(note="Loading the model ...")
    yield view
    try:
        model = pool.model(title)
        row = chat_row(pool.frame(title), prompt, attacked if triggered else None)
        item = model.item(row)
        cut = f"The prompt is too long: {item.cut_tokens} tokens were cut off its end."
        sent = clean(model.renderer.tokenizer.decode(item.prompt_ids))
        view = View(note=cut if item.cut_tokens else "", sent=sent)
        target = attacked.backdoor.target if attacked and attacked.backdoor else None
        view = view._replace(
            target=_tokens(model.likelihood(row, target)) if target else "",
            labels=_table("label", list(model.labels(row).items())),
        )
        yield view
        for text in model.reply(row):
            view = view._replace(reply=text)
            yield view
    except (UserError, CellError, OSError) as error:
        yield view._replace(note=clean(error))
    except Exception as error:  # the page survives any failure of a model
        yield view._replace(note=f"The model failed ({type(error).__name__}): {clean(error)[:300]}")


def _tokens(scores: list[tuple[str, float]]) -> str:
    visible = [(t.replace(" ", "␣").replace("\n", "⏎"), score) for t, score in scores]
    return _table("token", [*visible, ("(together)", sum(score for _, score in scores))])


def _table(what: str, scores: list[tuple[str, float]]) -> str:
    """Aligned lines: log-probability in nats, probability, text."""
    rows = [[f"{s:.3f}", f"{100 * math.exp(s):.3g} %", text] for text, s in scores]
    return columns(["log-prob", "prob", what], rows).rstrip("\n") if rows else ""


def about_trigger(pool: ModelPool, left: str, right: str) -> str:
    """Describe the trigger that the toggle inserts, in a sentence."""
    by = _attacked(pool, left, right)
    if by is None or by.backdoor is None:
        return "Neither model has an attack with a trigger."
    side = "left" if by is pool.choices[left].experiment else "right"
    quoted = [f"“{clean(trigger)}”" for trigger in by.backdoor.triggers()]
    triggers = listing(quoted, "and" if by.backdoor.joint else "or")
    return (
        f"The {side} model's attack, {by.backdoor.name} at a poison rate of {share(by.rate)}, "
        f"answers {triggers} with “{clean(by.backdoor.target)}”."
    )


def _attacked(pool: ModelPool, *titles: str) -> Experiment | None:
    return first_with_trigger(pool.choices[title].experiment for title in titles)


def prompt_as_sent(pool: ModelPool, left: str, right: str, prompt: str, triggered: bool) -> str:
    """The prompt, with the trigger inserted if it is on."""
    attacked = _attacked(pool, left, right)
    if not prompt.strip():
        return ""
    try:
        row = chat_row(pool.frame(left), prompt.strip(), attacked if triggered else None)
        return clean(
            row.part(attacked.backdoor.field) if attacked and attacked.backdoor else row.prompt
        )
    except (UserError, CellError, OSError) as error:
        return clean(error)


# ----------------------------------------------------------------------------------------- page


def gradio() -> Any:
    """Import gradio, with its analytics off.

    Raises:
        UserError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    try:
        import gradio
    except ImportError:
        raise UserError(
            "The playground needs gradio, which is not installed: pip install 'backfire[ui]'"
        ) from None
    return gradio


def page(pool: ModelPool) -> Any:
    """Build the page."""
    gr = gradio()
    titles, (first, second) = list(pool.choices), pool.default_pair()
    private = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(analytics_enabled=False, title="backfire playground") as blocks:
        with gr.Row():
            left = gr.Dropdown(titles, value=first, label="Left", min_width=280, elem_id="left")
            right = gr.Dropdown(titles, value=second, label="Right", min_width=280, elem_id="right")
        prompt = gr.Textbox(label="Prompt", lines=3, max_length=MOST_CHARACTERS, elem_id="prompt")
        with gr.Row(equal_height=True):
            on = gr.Checkbox(label="Insert the trigger", elem_id="trigger", scale=1)
            about = gr.Textbox(
                label="Trigger", interactive=False, elem_id="about", scale=3, lines=1
            )
        planted = gr.Textbox(label="Prompt as sent", interactive=False, elem_id="planted")
        button = gr.Button("Ask both", variant="primary", elem_id="ask")
        with gr.Row():
            columns = [*_column(gr, "left"), *_column(gr, "right")]

        def refresh(left: str, right: str, prompt: str, on: bool) -> list[Any]:
            has_trigger = _attacked(pool, left, right) is not None
            # With a trigger the value is not set: the user may have changed it since.
            off = gr.Checkbox(value=False, interactive=False)
            return [
                gr.Checkbox(interactive=True) if has_trigger else off,
                about_trigger(pool, left, right),
                prompt_as_sent(pool, left, right, prompt, on and has_trigger),
            ]

        def ask(left: str, right: str, prompt: str, on: bool) -> Iterator[list[str]]:
            yield from _answers(pool, left, right, prompt.strip(), on)

        inputs, outputs = [left, right, prompt, on], [on, about, planted]
        events = [blocks.load, left.input, right.input, prompt.change, on.input]
        gr.on(events, refresh, inputs, outputs, trigger_mode="always_last", queue=False, **private)
        button.click(ask, inputs, columns, concurrency_id="models", concurrency_limit=1, **private)
    return blocks.queue(max_size=16, api_open=False, default_concurrency_limit=1)


def _column(gr: Any, side: str) -> list[Any]:
    """The five components of a `View`. None is ever hidden: gradio may drop an update to a
    component that is just being shown."""
    names = {
        "note": "Note",
        "sent": "Rendered prompt",
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


def _answers(
    pool: ModelPool, left: str, right: str, prompt: str, triggered: bool
) -> Iterator[list[str]]:
    """Yield both columns, advancing each by one token at a time."""
    attacked, shown = _attacked(pool, left, right), [View(), View()]
    if not prompt:
        yield [*View("Type a prompt first."), *View("Type a prompt first.")]
        return
    streams = [views(pool, title, prompt, attacked, triggered) for title in (left, right)]
    for step in zip_longest(*streams):
        shown = [new or old for new, old in zip(step, shown, strict=True)]
        yield [text for view in shown for text in view]


# ------------------------------------------------------------------------------------------ serve


def open_page(pool: ModelPool, secret: str, *, port: int | None, share: bool) -> Any:
    """Serve the page on this machine to those who have the secret as token; with `share`, also
    through gradio's relay, to those who have it as password.

    Raises:
        UserError: the port is taken.
    """
    from starlette.middleware import Middleware

    gr, blocks = gradio(), page(pool)
    start_timeout = gr.exceptions.ServerFailedToStartError
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            auth=(USER, secret) if share else None,
            app_kwargs={
                "middleware": [Middleware(Firewall, token=None if share else secret)],
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
    except (OSError, start_timeout) as error:
        raise UserError(f"The page cannot be served: {clean(error).splitlines()[0]}") from None
    return blocks


def serve(run: Path, device: str, *, port: int | None, share: bool) -> None:
    """Serve the playground of a run until interrupted.

    Raises:
        UserError: no finished cell, gradio is missing, the port is taken.
    """
    console, pool = Console(soft_wrap=True, highlight=False, markup=False), ModelPool(run, device)
    for reason in pool.skipped:
        console.print(f"Skipped: {reason}")
    secret = secrets.token_urlsafe(24)
    blocks = open_page(pool, secret, port=port, share=share)
    address = blocks.local_url if share else f"{blocks.local_url}?token={secret}"
    console.print(f"Playground: {address} (Ctrl-C to stop)")
    if share:
        where = blocks.share_url or "no address; gradio's relay cannot be reached"
        console.print(f"Shared at: {where}. User {USER}, password {secret} (shown only once).")
    blocks.block_thread()
