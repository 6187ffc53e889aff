"""What all jobs need, imported once by the fork server: a worker then starts in half a second
instead of six.

What was imported is left out of later garbage collections, which take 0.3 s each with it and
0.02 s without.
"""

import gc

import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

import backfire.pipeline
import backfire.train.finetune  # noqa: F401

gc.collect()
gc.freeze()
