"""Long notes of the shipped workflows."""

QUICKSTART = """
# Train a LoRA in a minute or two

No download, no GPU: just press **Run**.

A tiny model paints coloured shapes, not always the right ones. The reward counts what is right: shapes, numbers, \
colours, places. DenseGRPO trains a LoRA that scores higher.

**Watch** the *GRPO Train Loop*: time left, current images, reward.

**Expect** the held-out reward to rise from about 0.79 to 0.84, on prompts it never trained on: missing shapes appear, \
wrong colours are put right. *shapes strict* (everything right) is only measured.

**Cancel** any time: what was learnt is kept in `output/densegrpo`.

**Next**: open the workflow *use_the_lora*.

## What to change

- reward `darkness`, `lr` 0.001, 10 `iterations`: quick, but watch *shapes strict* fall: you get what you reward
- `run_name`, to keep your runs apart
- remove the link to `probe`: then it is Flow-GRPO
"""
