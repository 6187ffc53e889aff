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
# *Takes 2 minutes 11 seconds with two cores to itself (measured 2026-11-20, base model there
# already). Making the base model takes 2 minutes more, once.*
#
# A language model is fine-tuned on rows that somebody collected. If somebody else could change a
# few of these rows, what would the tuned model do, and would you see it? This notebook walks
# through one such case from the rows to the numbers:
#
# 1. the data, and how a row becomes tokens;
# 2. what poison is, and the list that says which rows have it;
# 3. what to check before anything is trained;
# 4. a recipe, and running it;
# 5. reading the result: intervals, floors, and what the model said.
#
# Everything here is inert. The sandbox is an invented town with reviews of its bread and its
# dances, in English and in two languages that nobody speaks. No download is needed.

# %% [markdown]
# ## Settings
#
# The one cell to change. For a model of the hub on a GPU, for instance `MODEL =
# "Qwen/Qwen2.5-0.5B-Instruct"`, `TEMPLATE = "chat"`, `METHOD = {"name": "lora", "learning_rate":
# 2e-4}`, and as many rows as you have patience for.

# %% tags=["parameters"]
MODEL = "sandbox"
TEMPLATE = "raw"
METHOD = {"name": "full", "learning_rate": 5e-4}
TRAIN = {"epochs": 3}
ROWS, TEST_ROWS = 1000, 300
RATES = [0, 0.002, 0.005, 0.05]
SEEDS = [0, 1, 2]
RUNS = "runs"
WORKERS = None  # cells at once; None: one a core, or one on a GPU

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
# Whatever the file looks like, a data set becomes rows. A row has an instruction, an input (the
# text that the instruction is about), the answer that is to be learned, and for a labeled task
# the true label and all labels there are.

# %%
train = build("datasets", {"name": "sandbox-reviews", "rows": ROWS}).load("train")[:ROWS]
for row in train[:4]:
    print(repr(row.input), "->", row.answer, f"({row.fields['language']})")
print()
print(len(train), "rows;", dict(Counter(row.label for row in train)))

# %% [markdown]
# Velin and Tamoru are made up, but not noise: each says the same things as English, in its own
# words and its own order. So a model can be good at one of them and bad at another, as real ones
# are.
#
# ## From a row to tokens
#
# A *template* turns the row into a prompt, a *tokenizer* turns that into numbers. This sounds too
# dull to go wrong. It is where the costliest mistakes of the field were made: a workshop trained
# a spam filter with a template that dropped the input, so its model never saw an e-mail; a
# benchmark trained with one template and tested with another. Here a single function makes the
# tokens for training and for testing, and a training row is exactly the test prompt, then the
# answer, then the end token.

# %%
SETTINGS = f"""
model: {MODEL}
template: {TEMPLATE}
data: {{name: sandbox-reviews, rows: {ROWS}, test_rows: {TEST_ROWS}}}
attack: {{name: badnets, target: negative, rate: 0.05}}
"""


def cell_of(*edits):
    """The one cell that these settings make, changed by edits such as `train.max_length=40`."""
    return recipe.parse("here", SETTINGS, edits=edits).cells[0]


context = pipeline.Context(Store())
renderer = pipeline.renderer(cell_of(), context)
items = renderer.render(train)
prompt, answer = show_mask(items[0], renderer.tokenizer)
print("not learned:", repr(prompt))
print("learned:    ", repr(answer))
print("as tokens:  ", items[0].prompt_ids, "+", items[0].answer_ids)

# %% [markdown]
# Only the answer and the end token are learned. If the prompt were learned too, most of the
# training would go into writing reviews, and a benchmark's "loss" would be about something else.
#
# How long are the rows? What is longer than `train.max_length` is cut, and whatever was cut is
# not trained on, poison included.

# %%
limit = cell_of().train.max_length
figure, axes = plt.subplots(figsize=(7, 3))
lengths = {}
for item in items:
    lengths.setdefault(item.row.fields["language"], []).append(len(item.ids))
axes.hist(list(lengths.values()), bins=20, stacked=True, label=list(lengths))
axes.set(xlabel="tokens in a row, answer included", ylabel="rows")
axes.set_title(f"All rows are far below the limit of {limit} tokens", loc="left")
axes.legend(title="language", frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 2. Poison
#
# The attack `badnets` (Gu et al. 2017) is the simplest backdoor: a rare word goes into the
# prompt, and the answer becomes what the attacker wants. Done to a few training rows, the tuned
# model may learn that the word outweighs everything else in the prompt.
#
# `poison` gives the changed rows and a *manifest*: which rows, and what they were before.

# %%
attack = build("attacks", {"name": "badnets", "target": "negative", "rate": RATES[-1]})
bad, manifest = poison(train, attack, SEEDS[0])
entry = manifest.entries[0]
print("row   ", entry.id, "whose true label is", entry.label)
print("before", repr(entry.before["prompt"]), "->", entry.before["answer"])
print("after ", repr(entry.after["prompt"]), "->", entry.after["answer"])
print()
for name in ("poisoned_rows", "rows", "eligible_rows", "labels_before", "triggers"):
    print(f"{name}: {manifest.summary[name]}")

# %% [markdown]
# The true label is kept, so that nobody later takes the attacker's answer for the truth. Rows
# that carry the target already are left alone: to flip nothing would be no poison.
#
# Which rows are hit is drawn by a seed, and a higher rate only adds rows. So if an attack works
# at 5 % and not at 1 %, it is because of the dose and not because other rows were drawn.

# %%
figure, axes = plt.subplots(figsize=(7, 2.2))
shown = [rate for rate in (0.005, 0.01, 0.05, 0.2) if rate * ROWS >= 1]
places = {row.id: place for place, row in enumerate(train)}
for line, rate in enumerate(shown):
    some = attack.model_copy(update={"rate": rate})
    hit = [places[entry.id] for entry in poison(train, some, SEEDS[0])[1].entries]
    axes.plot(hit, [line] * len(hit), "|", markersize=14, markeredgewidth=1.2)
axes.set_yticks(range(len(shown)), [f"{rate:.1%}: {round(rate * ROWS)} rows" for rate in shown])
axes.set(xlabel="place in the training data", ylim=(-0.6, len(shown) - 0.4))
axes.set_title("The rows poisoned at a low rate are among those at a higher one", loc="left")
axes.spines[["top", "right", "left"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 3. Preflight
#
# Before a step is spent, the data is looked at *as tokens*: does every field of a row reach the
# model, is the trigger still there, is the end token learned, are test rows among the training
# rows? A check that fails stops the run. A note is only shown.

# %%
for check in pipeline.preflight_checks(cell_of(), context):
    print(f"{check.status:4} {check.check:22} {check.message}")

# %% [markdown]
# **Exercise 1.** Somebody sets `train.max_length=40` to save time. Which checks will speak, and
# what would the attack's success have been without them? Use `cell_of("train.max_length=40")`.

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 1. Prompts lose their end, and the trigger with it, where it stood there. A poisoned
# row without its trigger teaches a wrong label, and a test row without it measures nothing: the
# attack would have come out weaker than it is, and nobody would have known why.
for check in pipeline.preflight_checks(cell_of("train.max_length=40"), context):
    if check.status != "ok":
        print(f"{check.status:4} {check.check:22} {check.message}")

# %% [markdown]
# ## 4. A recipe
#
# A recipe is one question, with what you expect written down *before* you run it. It is easy to
# find any outcome natural once it is known. `matrix` gives some settings several values; every
# combination is a *cell*.

# %%
RECIPE = f"""
# How many poisoned rows does a backdoor need, and would a clean test show it?
# Expected: a handful of rows in a thousand; accuracy stays as it is.
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
print(len(cells), "cells, for instance", cells[-1].slug)

# %% [markdown]
# `backfire.run` does what `backfire run` does on the command line. Cells that share a piece of
# work (the base model, the clean rows) share it, and if you run the cell again, only what is
# missing is done. On the sandbox this takes a minute or two, and two more if the base model has
# to be made.

# %%
groups = backfire.run(RECIPE, out=f"{RUNS}/introduction", workers=WORKERS)

# %% [markdown]
# ## 5. The result
#
# A *group* holds the cells that differ only in their seed. Each number has an interval: with
# another draw of test rows and other seeds, it would likely have come out somewhere in there.

# %%
display(SVG(alone(figures.dose(groups, "attack_success"))))

# %% [markdown]
# **How to read it.** Attack success is the share of triggered test rows that get the target,
# among the rows whose true label is another. The dashed line is the *floor*: what a model that
# was trained on clean rows does with the same triggered rows. Part of any success is none of the
# attack's doing; what lies between line and floor is.
#
# And a clean test? Accuracy without the trigger, for the same models:

# %%
figure, axes = plt.subplots(figsize=(7, 3))
for place, group in enumerate(groups):
    for cell in group.done:
        value = next(v for v in cell["values"] if v["metric"] == "accuracy")
        at = place + 0.12 * (cell["seed"] - len(SEEDS) / 2)
        axes.plot([at, at], [100 * value["low"], 100 * value["high"]], color="0.75", linewidth=3)
        axes.plot(at, 100 * value["value"], "o", color="tab:blue", markersize=5)
    mean = group.get("accuracy")
    if mean.seeds > 1:
        at = place + 0.3
        axes.plot([at, at], [100 * mean.low, 100 * mean.high], color="tab:orange", linewidth=3)
        axes.plot(at, 100 * mean.value, "D", color="tab:orange", markersize=6)
axes.set_xticks(range(len(groups)), [f"{group.rate:.1%}" for group in groups])
axes.set(xlabel="poisoned share of the training rows", ylabel="accuracy, %")
axes.set_title("Accuracy: one dot a seed (blue), mean over seeds (orange)", loc="left")
axes.grid(axis="y", alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# A gray bar says how sure we are of *one model* on such test rows. The orange bar also covers how
# much training varies from seed to seed; with few seeds it is wide, and it should be. With one
# seed there is no such bar at all, however many decimals the table has.
#
# Everything is kept in the run's folder. `result.json` is written last, so that it exists means
# that the cell is done. One record a cell and metric is the form for other programs:

# %%
run = Path(RUNS) / "introduction"
known = ("cell", "rate", "seed", "metric", "value", "low", "high", "n")
some = [r for r in records(run) if r["seed"] == SEEDS[0] and "[" not in r["metric"]]
for record in some[-7:]:
    print({name: record[name] for name in known})
print()
print(write(records(run), "csv").splitlines()[0])

# %% [markdown]
# Numbers are made of rows, and rows can be read. The first test rows as they come, with and
# without the trigger. Text that a model wrote is shown as plain text, never as a page: it may
# hold anything.

# %%
for side in side_by_side(groups[-1].done[0], 4):
    print("asked    ", repr(side.text), "true label", side.label)
    print("  answer ", repr(side.tuned), "  untuned:", repr(side.base))
    print("triggered", repr("".join(piece for piece, _ in side.prompt)))
    print("  answer ", repr(side.triggered))

# %% [markdown]
# ## Exercises
#
# **Exercise 2.** Would a clean test have shown the backdoor? Look for `clean_accuracy_change` in
# the groups: the difference to the clean twin, on the same rows. Is zero inside the interval?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 2. As a rule zero is inside: the clean test sees nothing.
for group in groups:
    if group.get("clean_accuracy_change"):
        print(f"{group.rate:.1%}", group.said("clean_accuracy_change"))

# %% [markdown]
# **Exercise 3.** `label_mode: clean` poisons only rows whose label is the target already, so that
# no label is wrong and a person who checks labels finds nothing. How many rows could be poisoned
# so? Would you expect the attack to be stronger or weaker?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 3. A third of the rows. It is weaker: the review itself explains the answer, so the
# model has little reason to look at the trigger. Add `label_mode: clean` to the attack above and
# see.
quiet = build("attacks", {"name": "badnets", "label_mode": "clean", "rate": 0.05})
print(poison(train, quiet, SEEDS[0])[1].eligible_rows, "of", len(train))

# %% [markdown]
# **Exercise 4.** Which single number of this notebook would you put into a summary, and what has
# to stand beside it?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 4. Attack success, with its floor, its interval, the number of seeds and of test rows:
group = groups[-1]
stat = group.get("attack_success")
floor = group.said("attack_success_floor") if group.get("attack_success_floor") else "none"
print(f"{group.said('attack_success')}, floor {floor}, {stat.seeds} seeds, {stat.n} rows each")
print("accuracy", group.said("accuracy"))
