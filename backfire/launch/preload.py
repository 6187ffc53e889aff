"""Imported once by the fork server, so that a worker starts in half a second rather than six."""

import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

import backfire.pipeline
import backfire.train.finetune  # noqa: F401
