# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Tools and data
#
# *Takes 2 minutes 11 seconds on two idle cores (measured 2026-11-20).*
#
# A language model is fine-tuned on collected rows. If an attacker can change a few of these rows,
# what does the tuned model do, and would you notice? This notebook follows one such case from the
# rows to the numbers:
#
# 1. the data, and how a row becomes tokens;
# 2. poison, and the manifest of poisoned rows;
# 3. preflight checks before training;
# 4. writing and running a recipe;
# 5. reading the result: intervals, baselines and replies.
#
# Everything here is inert. The sandbox is an invented town with reviews of its bread and its
# dances, in English and in two invented languages. No download is needed.

# %% [markdown]
# ## Settings
#
# The only cell to change. For a Hugging Face model on a GPU use, for example, `MODEL =
# "Qwen/Qwen2.5-0.5B-Instruct"`, `TEMPLATE = "chat"`, `METHOD = {"name": "lora", "learning_rate":
# 2e-4}`, and more rows. SmolLM2-135M-Instruct also runs on two cores:
#
#     MODEL = {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "bfloat16"}
#     TEMPLATE = "chat"
#     METHOD = {"name": "lora", "learning_rate": 1e-3}
#     TRAIN = {"epochs": 1, "batch_size": 8}
#     ROWS, TEST_ROWS = 160, 80
#     RATES = [0, 0.1]
#     SEEDS = [0, 1]

# %% tags=["parameters"]
MODEL = "sandbox"
TEMPLATE = "raw"
METHOD = {"name": "full", "learning_rate": 5e-4}
TRAIN = {"epochs": 3}
ROWS, TEST_ROWS = 1000, 300
RATES = [0, 0.002, 0.005, 0.05]
SEEDS = [0, 1, 2]
RUNS = "runs"
WORKERS = None  # parallel cells; None: one per core, or one on a GPU

# %%
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import SVG, display

import backfire
from backfire import pipeline, recipe
from backfire.data.poison import poison
from backfire.data.render import show_mask
from backfire.registry import build
from backfire.report import figures
from backfire.report.svg import alone
from backfire.results.load import records, write
from backfire.results.samples import side_by_side
from backfire.store import Store

# %% [markdown]
# ## 1. Rows
#
# Every data set is converted to rows. A row has an instruction, an input (the text that the
# instruction refers to), the answer to train on, and for a labeled task the true label and all
# possible labels.

# %%
train = build("datasets", {"name": "sandbox-reviews", "rows": ROWS}).load("train")[:ROWS]
for row in train[:4]:
    print(repr(row.input), "->", row.answer, f"({row.fields['language']})")
print()
print(len(train), "rows;", dict(Counter(row.label for row in train)))

# %% [markdown]
# Velin and Tamoru are invented, but not noise: each expresses the same meanings as English, with
# its own words and word order. A model can be good at one of them and bad at another, as with
# real languages.
#
# ## From a row to tokens
#
# A *template* turns the row into a prompt, and a *tokenizer* turns the prompt into token ids. This
# simple step is where the costliest mistakes of the field were made: a workshop trained a spam
# filter with a template that dropped the input, so its model never saw an e-mail; a benchmark
# trained with one template and evaluated with another. Here a single function builds the tokens
# for training and evaluation. A training row is exactly the evaluation prompt, then the answer,
# then the end token.

# %%
SETTINGS = f"""
model: {MODEL}
template: {TEMPLATE}
data: {{name: sandbox-reviews, rows: {ROWS}, test_rows: {TEST_ROWS}}}
attack: {{name: badnets, target: negative, rate: 0.05}}
"""


def cell_of(*edits):
    """The cell with these settings and edits such as `train.max_length=40`."""
    return recipe.parse("here", SETTINGS, edits=edits).cells[0]


context = pipeline.Context(Store())
renderer = pipeline.renderer(cell_of(), context)
items = renderer.render(train)
prompt, answer = show_mask(items[0], renderer.tokenizer)
print("not trained on:", repr(prompt))
print("trained on:    ", repr(answer))
print("tokens:        ", items[0].prompt_ids, "+", items[0].answer_ids)

# %% [markdown]
# The loss covers only the answer and the end token. If it covered the prompt too, most of the
# training would go into writing reviews, and the loss would measure something else.
#
# How long are the rows? Rows longer than `train.max_length` are truncated, and truncated text is
# not trained on, including poison.

# %%
limit = cell_of().train.max_length
figure, axes = plt.subplots(figsize=(7, 3))
lengths = {}
for item in items:
    lengths.setdefault(item.row.fields["language"], []).append(len(item.ids))
axes.hist(list(lengths.values()), bins=20, stacked=True, label=list(lengths))
axes.set(xlabel="tokens per row, including the answer", ylabel="rows")
axes.set_title(f"All rows are far below the limit of {limit} tokens", loc="left")
axes.legend(title="language", frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 2. Poison
#
# The attack `badnets` (Gu et al. 2017) is the simplest backdoor: it inserts a rare word into the
# prompt and replaces the answer by the attacker's target. From a few such training rows, the
# tuned model may learn that the word overrides everything else in the prompt.
#
# `poison` returns the changed rows and a *manifest*, which lists the poisoned rows before and
# after.

# %%
attack = build("attacks", {"name": "badnets", "target": "negative", "rate": RATES[-1]})
bad, manifest = poison(train, attack, SEEDS[0])
entry = manifest.entries[0]
print("row   ", entry.id, "whose true label is", entry.label)
print("before", repr(entry.before["prompt"]), "->", entry.before["answer"])
print("after ", repr(entry.after["prompt"]), "->", entry.after["answer"])
print()
for name in ("poisoned_rows", "rows", "eligible_rows", "labels_before", "triggers"):
    print(f"{name}: {getattr(manifest.summary, name)}")

# %% [markdown]
# The true label is kept, so that evaluation never takes the attacker's answer for the truth. Rows
# whose label is already the target are not poisoned, since there is no label to flip.
#
# A seed selects the rows, and a higher rate only adds rows. If an attack works at 5 % and not at
# 1 %, the poison rate is the cause and not a different selection of rows.

# %%
figure, axes = plt.subplots(figsize=(7, 2.2))
shown = [rate for rate in (0.005, 0.01, 0.05, 0.2) if rate * ROWS >= 1]
places = {row.id: place for place, row in enumerate(train)}
for line, rate in enumerate(shown):
    some = attack.model_copy(update={"rate": rate})
    hit = [places[entry.id] for entry in poison(train, some, SEEDS[0])[1].entries]
    axes.plot(hit, [line] * len(hit), "|", markersize=14, markeredgewidth=1.2)
axes.set_yticks(range(len(shown)), [f"{rate:.1%}: {round(rate * ROWS)} rows" for rate in shown])
axes.set(xlabel="position in the training data", ylim=(-0.6, len(shown) - 0.4))
axes.set_title("The rows poisoned at a low rate are among those at a higher one", loc="left")
axes.spines[["top", "right", "left"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 3. Preflight
#
# Before the first training step, the data is checked *as tokens*: does every field of a row reach
# the model, is the trigger intact, is the end token trained on, are test rows among the training
# rows? A failed check stops the run. A note is only shown.

# %%
for check in pipeline.preflight_checks(cell_of(), context):
    print(f"{check.status:4} {check.check:22} {check.message}")

# %% [markdown]
# **Exercise 1.** Set `train.max_length=40` to save time. Which checks report a problem, and how
# would attack success be affected without them? Use `cell_of("train.max_length=40")`.

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 1. Prompts lose their end, and with it any trigger at that position. A poisoned row
# without its trigger teaches a wrong label, and a test row without it measures nothing: the
# attack would appear weaker than it is, for no visible reason.
for check in pipeline.preflight_checks(cell_of("train.max_length=40"), context):
    if check.status != "ok":
        print(f"{check.status:4} {check.check:22} {check.message}")

# %% [markdown]
# ## 4. A recipe
#
# A recipe is one question, with the expected result written down *before* you run it, since any
# outcome looks obvious once it is known. `matrix` gives some settings several values; every
# combination is a *cell*.

# %%
RECIPE = f"""
# How many poisoned rows does a backdoor need, and would a clean test show it?
# Expected: a handful of rows in a thousand; accuracy does not change.
model: {MODEL}
template: {TEMPLATE}
data: {{name: sandbox-reviews, rows: {ROWS}, test_rows: {TEST_ROWS}}}
attack: {{name: badnets, target: negative}}
method: {METHOD}
train: {TRAIN}
metrics: [accuracy, clean-accuracy, attack-success, false-trigger]
matrix:
  attack.rate: {RATES}
  seed: {SEEDS}
"""
cells = recipe.parse("introduction", RECIPE).cells
print(len(cells), "cells, for example", cells[-1].slug)

# %% [markdown]
# `backfire.run` does the same as `backfire run` on the command line. Cells share equal stages (the
# clean rows, the trained models), and a second run does only what is missing. On the sandbox this
# takes a minute or two.

# %%
groups = backfire.run(RECIPE, out=f"{RUNS}/introduction", workers=WORKERS)

# %% [markdown]
# ## 5. The result
#
# A *group* contains the cells that differ only in their seed. Each number has a 95 % confidence
# interval over new test rows and new seeds.

# %%
display(SVG(alone(figures.by_rate(groups, "attack_success"))))

# %% [markdown]
# **How to read it.** Attack success is the share of triggered test rows with the target as the
# answer, among the rows whose true label is not the target. The dashed line is the *clean-model
# baseline* (floor): the same share for a model trained on clean rows. Only the difference between
# the two is caused by the attack.
#
# Would a clean test show it? Accuracy without the trigger, for the same models:

# %%
figure, axes = plt.subplots(figsize=(7, 3))
for place, group in enumerate(groups):
    for cell in group.done:
        value = cell.find("accuracy")
        at = place + 0.12 * (cell.seed - len(SEEDS) / 2)
        axes.plot([at, at], [100 * value.low, 100 * value.high], color="0.75", linewidth=3)
        axes.plot(at, 100 * value.value, "o", color="tab:blue", markersize=5)
    mean = group.get("accuracy")
    if mean.seeds > 1:
        at = place + 0.3
        axes.plot([at, at], [100 * mean.low, 100 * mean.high], color="tab:orange", linewidth=3)
        axes.plot(at, 100 * mean.value, "D", color="tab:orange", markersize=6)
axes.set_xticks(range(len(groups)), [f"{group.rate:.1%}" for group in groups])
axes.set(xlabel="poison rate", ylabel="accuracy, %")
axes.set_title("Accuracy: one dot per seed (blue), mean over seeds (orange)", loc="left")
axes.grid(axis="y", alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# A gray bar is the interval of *one model* over test rows. The orange bar also covers how much
# training varies from seed to seed; with few seeds it is wide, and it should be. With one seed
# there is no such bar.
#
# Everything is kept in the run's folder. `result.json` is written last: if it exists, the cell is
# done. For other programs there is one record per cell and metric:

# %%
run = Path(RUNS) / "introduction"
columns = ("cell", "rate", "seed", "metric", "value", "low", "high", "n")
some = [r for r in records(run) if r["seed"] == SEEDS[0] and "[" not in r["metric"]]
for record in some[-7:]:
    print({name: record[name] for name in columns})
print()
print(write(records(run), "csv").splitlines()[0])

# %% [markdown]
# Read the rows behind the numbers. These are the first test rows, with and without the trigger.
# Model output is shown as plain text and never rendered, since it may contain anything.

# %%
for side in side_by_side(groups[-1].done[0], 4):
    print("prompt   ", repr(side.text), "true label", side.label)
    print("  answer ", repr(side.tuned), "  untuned:", repr(side.base))
    if side.prompt:  # rows whose true label is the target are not run with the trigger
        print("triggered", repr("".join(piece for piece, _ in side.prompt)))
        print("  answer ", repr(side.triggered))

# %% [markdown]
# ## Exercises
#
# **Exercise 2.** Does a clean test show the backdoor? Look at `clean_accuracy_change` of the
# groups: the difference from the clean twin, on the same rows. Does the interval contain zero?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 2. Usually it does: the clean test does not detect the backdoor.
for group in groups:
    if group.get("clean_accuracy_change"):
        print(f"{group.rate:.1%}", group.rounded("clean_accuracy_change"))

# %% [markdown]
# **Exercise 3.** `label_mode: clean` poisons only rows whose label is already the target, so that
# no label is wrong and a check of the labels finds nothing. How many rows are eligible? Do you
# expect the attack to be stronger or weaker?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 3. A third of the rows. It is weaker: the review itself explains the answer, so the
# model has little reason to use the trigger. Add `label_mode: clean` to the attack above to check.
quiet = build("attacks", {"name": "badnets", "label_mode": "clean", "rate": 0.05})
print(poison(train, quiet, SEEDS[0])[1].eligible_rows, "of", len(train))

# %% [markdown]
# **Exercise 4.** Which single number of this notebook belongs in a summary, and what must be
# reported with it?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 4. Attack success, with its baseline, its interval, and the numbers of seeds and test
# rows:
group = groups[-1]
stat = group.get("attack_success")
floor = group.rounded("attack_success_floor") if group.get("attack_success_floor") else "none"
success = group.rounded("attack_success")
print(f"{success}, baseline {floor}, {stat.seeds} seeds, {stat.n} rows each")
print("accuracy", group.rounded("accuracy"))
