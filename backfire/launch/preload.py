"""What all jobs need, imported once by the fork server: a worker then starts in half a second
instead of six."""

from backfire.launch.imports import freeze, uncollected

with uncollected():
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import backfire.pipeline
    import backfire.train.finetune  # noqa: F401

freeze()
