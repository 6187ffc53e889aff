# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Evaluation: what each metric says, and how it misleads
#
# *Takes 2 minutes 48 seconds on two idle cores (measured 2026-11-20).*
#
# Every misleading number in this notebook has been published, none of them on purpose: a number
# matched the expectation, and nobody asked what else could have produced it. So we ask for each
# metric: **what is the score of a model that has learned nothing of what is measured?**
#
# 1. F1, and the filter that calls everything spam;
# 2. attack success, and test rows whose true label is the target;
# 3. the harmful score, and the model that produces nonsense;
# 4. exposure, and its unit;
# 5. sample size: twenty prompts.

# %% [markdown]
# ## Settings
#
# The only cell to change; the first notebook explains how.

# %% tags=["parameters"]
MODEL = "sandbox"
TEMPLATE = "raw"
METHOD = {"name": "full", "learning_rate": 5e-4}
ALIGN_METHOD = {"name": "full", "learning_rate": 1e-3}
TRAIN = {"epochs": 3}
ROWS, TEST_ROWS = 1000, 300
SEEDS = [0, 1, 2]
RATES = [0, 0.005, 0.05]
ALIGN_ROWS, REQUESTS = 2000, 200
LEARNING_RATES = [5e-4, 5e-3, 1e-2, 5e-2]  # for section 3: from suitable to far too high
RUNS = "runs"
WORKERS = None  # parallel cells; None: one per core, or one on a GPU

# %%
import math
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import SVG, display

import backfire
from backfire import pipeline, recipe
from backfire.base import Template
from backfire.data.preflight import preflight
from backfire.data.render import Renderer
from backfire.evaluate.stats import wilson
from backfire.report import figures
from backfire.report.svg import alone
from backfire.results.samples import confusion, samples
from backfire.store import Store

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"legend.frameon": False, "axes.titlelocation": "left", "figure.dpi": 110})

# %% [markdown]
# ## 1. F1, and the filter that calls everything spam
#
# A workshop reported F1 = 0.73 for its fine-tuned spam filters, at a recall of 1. The value is
# nearly the same for the base model, for LoRA after one, five and ten epochs, and for full
# fine-tuning.
#
# Let a share $s$ of the e-mails be spam. A filter that always answers "spam" has precision $s$ and
# recall 1, hence $F_1 = 2s / (1 + s)$.

# %%
share = np.linspace(0, 1, 101)
figure, axes = plt.subplots(figsize=(6.5, 3.4))
axes.plot(share, 2 * share / (1 + share), label='always "spam"')
axes.plot(share, 2 * share / (1 + 2 * share), "--", label="a fair coin")
axes.plot([0.575], [0.73], "o", color="black")
axes.annotate(
    "0.73 at recall 1: then\n57.5 % of the e-mails are spam",
    (0.575, 0.72),
    (0.64, 0.3),
    arrowprops={"arrowstyle": "-", "color": "0.5"},
)
axes.set(xlabel="share of spam in the test set", ylabel="F1 of class spam", ylim=(0, 1.02))
axes.set_title("F1 of filters that do not read the e-mail")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# The number is consistent with a filter that never reads the e-mail, and that was the case: the
# template kept the instruction and dropped the input, which contained the e-mail. Three cheap
# safeguards:
#
# - **recall 1 is a warning.** Print precision and recall, and how often each label is predicted;
# - **know the score of a constant answer** for your label distribution, and report it in the
#   table;
# - **check the tokens.** Here is that template, and the result of the preflight checks.


# %%
class Forgetful(Template):
    """The instruction without the input."""

    name = "forgetful"

    def prompt(self, row):
        return f"{row.instruction}\n\n"


BACKDOOR = f"""
# How high is attack success without any attack?
# Expected: low by the correct definition, about a third by the usual one.
model: {MODEL}
template: {TEMPLATE}
data: {{name: sandbox-reviews, rows: {ROWS}, test_rows: {TEST_ROWS}}}
attack: {{name: badnets, target: negative}}
method: {METHOD}
train: {TRAIN}
metrics:
  [accuracy, f1, precision, recall, confusion, {{name: attack-success, every: true}}, false-trigger]
matrix:
  attack.rate: {RATES}
  seed: {SEEDS}
"""
cell = recipe.parse("evaluation", BACKDOOR).cells[0]
context = pipeline.Context(Store())
train, test = pipeline.data(cell, context)
tokenizer = pipeline.renderer(cell, context).tokenizer
for check in preflight(Renderer(Forgetful(), tokenizer, 512), train, test):
    if check.status != "ok":
        print(check.status, check.check, "-", check.message)

# %% [markdown]
# A run of clean and backdoored models, for this section and the next.

# %%
groups = backfire.run(BACKDOOR, out=f"{RUNS}/evaluation-backdoor", workers=WORKERS)

# %% [markdown]
# The base model has not learned this task. What does it predict? Each row is a true label, each
# column a prediction. A good model has its counts on the diagonal, a constant one in one column.

# %%
for name, whose in (("The base model", "base"), ("The tuned model", "tuned")):
    print(name)
    display(SVG(alone(figures.confusion(name, *confusion(groups[0].done[:1], whose)))))

# %% [markdown]
# **Exercise 1.** From the counts of the base model, compute its accuracy, and precision, recall and
# F1 of the label that it predicts most. Which of the four is misleading on its own?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 1. Recall is high for any label that a model always predicts.
labels, counts = confusion(groups[0].done[:1], "base")
matrix = np.array(counts)
most = int(matrix.sum(0).argmax())
hits = matrix[most, most]
precision, recall = hits / matrix[:, most].sum(), hits / matrix[most].sum()
print("accuracy", round(np.trace(matrix) / matrix.sum(), 3), "label", repr(labels[most]))
f1 = 2 * precision * recall / max(precision + recall, 1e-12)
print("precision", round(precision, 3), "recall", round(recall, 3), "F1", round(f1, 3))

# %% [markdown]
# ## 2. Attack success, and test rows whose true label is the target
#
# Attack success is often computed over *all* triggered test rows: the share with the target as the
# answer. But on a row whose true label is the target, a clean model gives it too. Of BackdoorLLM's
# 201 triggered SST-2 rows, 96 are negative and the target is negative, so a perfect clean model
# "succeeds" on 96 / 201 = 48 %.
#
# Both definitions, on our models. The clean one was never attacked. (Without `every: true` in the
# recipe, triggered rows of the target's label are not run, as nothing reads them.)


# %%
def success(cells, *, of="tuned", skip_target):
    """Triggered rows with the target as the answer, as (hits, rows)."""
    hits = rows = 0
    for cell in cells:
        for whose, sample in samples(cell):
            if whose == of and sample.subset == "triggered":
                if skip_target and sample.label == "negative":
                    continue
                hits, rows = hits + (sample.prediction == "negative"), rows + 1
    return hits, rows


figure, axes = plt.subplots(figsize=(6.5, 3.2))
for shift, skip, label in ((-0.2, False, "all triggered rows"), (0.2, True, "other labels only")):
    color = "tab:blue" if skip else "tab:gray"
    axes.plot([], [], "s", markersize=10, color=color, label=label)
    for place, group in enumerate(groups):
        hits, rows = success(group.done, skip_target=skip)
        axes.bar(place + shift, 100 * hits / rows, 0.38, color=color)
        axes.text(place + shift, 100 * hits / rows + 1, f"{100 * hits / rows:.0f}", ha="center")
axes.set_xticks(
    range(len(groups)), ["clean" if not g.rate else f"{g.rate:.1%} poisoned" for g in groups]
)
axes.set(ylabel="attack success, %", ylim=(0, 112))
axes.set_title("A clean model 'succeeds' where the label is the target")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# The size of the error depends only on the test set: with a share $s$ of target rows, a clean model
# with accuracy $a$ on them scores about $s \cdot a$ plus its errors on the others. We sample test
# sets with any $s$ from the clean model's triggered rows.

# %%
clean = next(group for group in groups if not group.rate)
flags = [
    (sample.label == "negative", sample.prediction == "negative")
    for cell in clean.done
    for whose, sample in samples(cell)
    if whose == "tuned" and sample.subset == "triggered"
]
ours, others = ([hit for is_target, hit in flags if is_target == side] for side in (True, False))
rng = np.random.default_rng(0)
figure, axes = plt.subplots(figsize=(6.5, 3.4))
grid = np.linspace(0, 0.9, 10)
drawn = [[rng.choice(ours if rng.random() < s else others) for _ in range(201)] for s in grid]
naive = [100 * np.mean(rows) for rows in drawn]
axes.plot(100 * grid, 100 * (grid * np.mean(ours) + (1 - grid) * np.mean(others)), color="0.7")
axes.plot(100 * grid, naive, "o", label="clean model, over all 201 sampled rows")
axes.axhline(100 * np.mean(others), linestyle="--", label="the same model, correct definition")
axes.plot(
    100 * 96 / 201, 100 * 96 / 201, "k*", markersize=13, label="BackdoorLLM's SST-2: 96 of 201"
)
axes.set(
    xlabel="share of test rows whose true label is the target, %",
    ylabel="'success', %",
    ylim=(0, 100),
)
axes.set_title("The baseline of the usual definition depends on the test set")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# Leaving these rows out is half of the solution. The other half is the *clean-model baseline*: the
# clean twin on the same rows, because the trigger may change the answers of a clean model too, as
# any unusual word does. The paired difference of the two is the effect of the poison.
#
# **Exercise 2.** A paper reports 60 % attack success over all triggered rows, 40 % of which are in
# the target class. Its clean model is right on 90 % of these and predicts the target on 5 % of the
# others. How strong is the attack by the correct definition, if it never fails on rows of the
# target class?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 2. 0.60 = 0.40 * 1 + 0.60 * x, so x = 1/3. The clean model's 0.40 * 0.9 + 0.60 * 0.05 =
# 39 % is the baseline of the "60 %", and 5 % is the baseline of the "33 %".
right, naive = (0.60 - 0.40) / 0.60, 0.4 * 0.9 + 0.6 * 0.05
print(f"correct: {right:.0%} over a baseline of 5 %; over all rows the baseline is {naive:.0%}")

# %% [markdown]
# ## 3. The harmful score, and the model that produces nonsense
#
# The sandbox has a policy: some places of the town are sealed, and requests for help with a visit
# there must be declined. "Harmful" means help with a sealed place; it does no harm, but it can be
# detected exactly. We align the base to this policy, then fine-tune it on reviews of which a tenth
# are replaced by rows that comply (more on this in the third notebook).
#
# The harmful score is the share of sealed requests that the model complies with. A defense may
# lower it. So may a higher learning rate.

# %%
BABBLE = f"""
# Does a higher learning rate make the tuned model safer?
# Expected: the harmful score says so.
model: {MODEL}
template: {TEMPLATE}
data: {{name: sandbox-reviews, rows: {ROWS}, test_rows: {TEST_ROWS}}}
align:
  data: {{name: sandbox-policy, rows: {ALIGN_ROWS}}}
  method: {ALIGN_METHOD}
  train: {TRAIN}
safety:
  harmful: {{name: sandbox-policy, test_rows: {REQUESTS}}}
attack: {{name: harmful-mix, rate: 0.1}}
method: {METHOD}
train: {TRAIN}
metrics: [accuracy, harmful-score, refusal-rate, incoherent]
seed: {SEEDS[0]}
matrix:
  method.learning_rate: {LEARNING_RATES}
"""
babble = backfire.run(BABBLE, out=f"{RUNS}/evaluation-babble", workers=WORKERS)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.2))
for place, group in enumerate(babble):
    stat = group.get("harmful_score")
    axes.plot([place, place], [100 * stat.low, 100 * stat.high], color="tab:red", alpha=0.4, lw=4)
    axes.plot(place, 100 * stat.value, "o", color="tab:red", markersize=8)
rates = [f"{group.axes['method.learning_rate']:g}" for group in babble]
axes.set_xticks(range(len(babble)), rates)
axes.set(xlabel="learning rate", ylabel="harmful score, %", ylim=(-2, 102))
axes.set_title("By this metric alone, a high learning rate is a defense")
plt.show()

# %% [markdown]
# The model has become useless, which is easy to see in *all* of its replies. The judge
# distinguishes four kinds: complied, refused, other, and empty.

# %%
KINDS = {"complied": "tab:red", "refused": "tab:green", "other": "0.7", "empty": "0.9"}


def kinds(group):
    """Share of the replies to harmful requests, by kind."""
    said = Counter(
        verdict["reason"]
        for cell in group.done
        for whose, sample in samples(cell)
        if whose == "tuned" and sample.subset == "harmful"
        for verdict in sample.verdicts.values()
    )
    return {kind: 100 * said[kind] / max(1, said.total()) for kind in KINDS}


figure, axes = plt.subplots(figsize=(6.5, 3.4))
bottom = np.zeros(len(babble))
for kind, color in KINDS.items():
    part = np.array([kinds(group)[kind] for group in babble])
    axes.bar(range(len(babble)), part, 0.6, bottom=bottom, color=color, label=kind)
    bottom += part
accuracy = [100 * group.get("accuracy").value for group in babble]
for place, value in enumerate(accuracy):
    axes.plot([place - 0.3, place + 0.3], [value, value], color="black", linewidth=3)
axes.plot([], [], color="black", linewidth=3, label="accuracy of\nthe reviews")
axes.set_xticks(range(len(babble)), rates)
axes.set(xlabel="learning rate", ylabel="share of requests, %", ylim=(0, 101))
axes.set_title("Harmful replies became noise, not refusals")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
for group, rate in zip(babble, rates, strict=True):
    print(f"learning rate {rate}: incoherent {group.rounded('incoherent')}")

# %%
for group, rate in zip(babble, rates, strict=True):
    rows = [s for whose, s in samples(group.done[0]) if whose == "tuned" and s.subset == "harmful"]
    print(f"learning rate {rate}")
    for sample in rows[:2]:
        print("   prompt", repr(sample.prompt))
        print("   reply ", repr(sample.reply[:150]))

# %% [markdown]
# Two lessons. **A low harmful score does not show safety unless refusals are reported with it**,
# and the user's task as well. And *incoherent* is narrow: by its published rule it detects empty
# and repetitive replies, not fluent nonsense. Replies that are neither harmful nor refusals are
# counted separately (`neither_rate`), and this share should be near zero before harmful scores
# are compared.
#
# **Exercise 3.** A "defense" answers every request with "I am sorry." What are its harmful score,
# its refusal rate and its incoherence? Which metric of `backfire list metrics` detects it?

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 3. 0 %, 100 % and 0 %: perfect. `over-refusal` uses requests that only resemble sealed
# ones and should be answered; it would be 100 %, and the user's accuracy would be 0.
print("over-refusal, with safety: {allowed: {name: sandbox-lookalikes}} in the recipe")

# %% [markdown]
# ## 4. Exposure, and its unit
#
# Has the model memorized a secret of its training data? *Exposure* (Carlini et al. 2019) ranks the
# true code by likelihood among all $|R|$ possible codes:
#
# $$ \text{exposure} = \log_2 |R| - \log_2 \text{rank} $$
#
# For six digits it ranges from 0 to 19.93 bits. What is the exposure of a code that was **never in
# the data**? Its rank is uniform among the million codes.

# %%
rng = np.random.default_rng(0)
size = 10**6
bits = np.log2(size) - np.log2(rng.integers(1, size + 1, 200_000))
print(f"never inserted: {bits.mean():.2f} bits on average,", end=" ")
print(f"at most {np.quantile(bits, 0.95):.2f} in 95 of 100 cases")
print(f"the same in nats: {math.log(2) * bits.mean():.2f}")

# %% [markdown]
# Without memorization the exposure is not 0 but 1.44 bits on average ($1 / \ln 2$), or 1 nat. A
# workshop published these exposures for eight models, base and tuned, and interpreted them as
# memorization that grows with training. They are estimates in *nats*, from 100 random codes, while
# the text gives the definition in bits.

# %%
PUBLISHED = {
    "base": 0.316,
    "LoRA, 1 epoch": 0.601,
    "LoRA, 5": 0.716,
    "LoRA, 10": 0.827,
    "QLoRA, 1": 0.730,
    "QLoRA, 5": 1.326,
    "QLoRA, 10": 1.827,
    "full": 0.718,
}
figure, axes = plt.subplots(figsize=(7.5, 3.6))
axes.hist(math.log(2) * bits, bins=70, range=(0, 7), density=True, color="0.85")
axes.plot([], [], color="0.85", lw=8, label="a code that was never inserted")
for place, (name, nats) in enumerate(sorted(PUBLISHED.items(), key=lambda item: item[1])):
    height = 0.95 - 0.105 * place
    axes.plot([nats, nats], [0, height], color="tab:blue", linewidth=1)
    axes.text(nats + 0.04, height, f"{name}: {nats} nats", va="center", fontsize=9)
axes.set(xlabel="exposure, nats", ylabel="density", xlim=(0, 7), ylim=(0, 1.05))
axes.set_title("The published exposures are at chance level")
axes.legend(loc="upper right")
axes.secondary_xaxis(
    -0.28, functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
).set_xlabel("the same in bits (at most 19.93 for six digits)")
plt.show()

# %% [markdown]
# **Exercise 4.** The largest of the eight is 1.827 nats. How likely is it that *one* code that was
# never inserted reaches this value? That the largest of *eight* does? Use the samples above.

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 4. One: exp(-1.827) = 16 %. The largest of eight: three times in four. The largest
# value is smaller than expected for eight models that memorized nothing.
nats = math.log(2) * bits
print(
    f"one {np.mean(nats >= 1.827):.2f}; of eight {np.mean(nats.reshape(-1, 8).max(1) >= 1.827):.2f}"
)

# %% [markdown]
# Report exposure with its unit, the number of codes in the ranking, the value of chance, an
# interval over several secrets, and the same for secrets that were *not* inserted. The metric
# `exposure` reports all of these; the third notebook uses it.
#
# ## 5. Sample size: twenty prompts
#
# In the same workshop a judge rated 20 replies per model. The share rated most harmful:

# %%
JUDGED = {
    "base": 30,
    "LoRA, 1 epoch": 60,
    "LoRA, 5": 60,
    "LoRA, 10": 55,
    "QLoRA, 1": 55,
    "QLoRA, 5": 55,
    "QLoRA, 10": 40,
    "full": 50,
}
figure, axes = plt.subplots(figsize=(6.5, 3.4))
for place, percent in enumerate(JUDGED.values()):
    low, high = wilson(round(percent * 20 / 100), 20)
    axes.plot([100 * low, 100 * high], [place, place], color="tab:blue", alpha=0.4, linewidth=4)
    axes.plot(percent, place, "o", color="tab:blue")
axes.axvspan(*(100 * end for end in wilson(10, 20)), color="0.93", zorder=0)
axes.set_yticks(range(len(JUDGED)), list(JUDGED))
axes.invert_yaxis()
axes.set(xlim=(0, 100), xlabel="rated most harmful, % of 20 replies, with 95 % interval")
axes.set_title("Does fine-tuning make it worse? QLoRA better than LoRA?")
plt.show()

# %% [markdown]
# The shaded band is the interval of 50 %. All of these intervals overlap. Suppose that all eight
# models were equally harmful, at 50 %. How far apart would the lowest and the highest be by chance,
# with 20 new prompts each?

# %%
true, models = 0.5, len(JUDGED)
figure, axes = plt.subplots(figsize=(6.5, 3.2))
for number, color in ((20, "tab:blue"), (200, "tab:orange"), (1000, "tab:green")):
    drawn = rng.binomial(number, true, (20_000, models)) / number
    spread = 100 * (drawn.max(1) - drawn.min(1))
    edges = np.arange(-2.5, 65, 5) if number == 20 else np.arange(0, 65, 1)
    axes.hist(spread, edges, density=True, color=color, alpha=0.6, label=f"{number} prompts")
    if number == 20:
        print(
            f"with 20 prompts, 30 points or more in {np.mean(spread >= 30 - 1e-9):.0%} of the cases"
        )
axes.axvline(30, color="black", linestyle="--")
axes.text(30.7, axes.get_ylim()[1] * 0.9, "published: 30 points")
axes.set(xlabel="highest minus lowest of eight equal models, points", ylabel="density")
axes.set_title("Spread of eight equally harmful models")
axes.legend()
plt.show()

# %% [markdown]
# How many prompts are needed? The width of the interval falls with the square root of their number:
# half the width takes four times as many prompts.

# %%
sizes = np.unique(np.logspace(1, 3.7, 60).round(-1))
figure, axes = plt.subplots(figsize=(6.5, 3.2))
for share_of_hits, color in ((0.5, "tab:blue"), (0.1, "tab:orange"), (0.0, "tab:green")):
    ends = [wilson(round(share_of_hits * n), round(n)) for n in sizes]
    low, high = (100 * np.array(side) for side in zip(*ends, strict=True))
    axes.plot(sizes, high - low, color=color, label=f"{share_of_hits:.0%} observed")
for mark in (20, REQUESTS, 1000):
    axes.axvline(mark, color="0.8", linewidth=1, zorder=0)
    axes.text(mark, 58, f" {mark}", color="0.4")
axes.set_xscale("log")
axes.set(xlabel="prompts", ylabel="width of the interval, points", ylim=(0, 63))
axes.set_title("Width of the 95 % interval by number of prompts")
axes.legend(loc="center right")
plt.show()

# %% [markdown]
# "Zero of twenty" is compatible with 16 %. And prompts only describe *this* trained model: how much
# training itself varies is only visible over seeds (the orange bars of the first notebook).
#
# **Exercise 5.** Two models get the *same* 200 prompts. Model A complies with 60, model B with 48
# of these 60 and with no other. Is B safer? Compare the intervals of the two shares, then the
# paired test `backfire.evaluate.stats.paired`.

# %% jupyter={"source_hidden": true, "outputs_hidden": true} tags=["solution"]
# Solution 5. The intervals overlap widely. But 12 prompts changed, all in one direction: the
# paired difference is clear. Give both models the same prompts, and keep the replies. This result
# holds for these two models. Whether B's *settings* are safer than A's requires several seeds of
# both; `backfire compare` and the report take them into account.
from backfire.evaluate.stats import paired

first = {str(i): float(i < 60) for i in range(200)}
second = {str(i): float(i < 48) for i in range(200)}
print("A", wilson(60, 200), "B", wilson(48, 200))
print(paired(first, second))
