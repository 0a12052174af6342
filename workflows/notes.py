"""Texts of the shipped workflows."""

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

TRY_A_REWARD = """
# Try a reward before you train on it

No download, no training: seconds on a CPU. Press **Run**.

**Reward Score** (top) writes the score on finished images. Do you agree with it? If not, training on it will not \
give what you want.

**Inspect Rollout** (bottom) shows one group as training sees it: a row per image, a column per denoising step, each \
state finished and scored; the signed number is what the step added. If all rows score the same, there is nothing to \
learn from.

## What to change

- `Prompt`, e.g. *two red triangles* or *a blue circle above a black square*
- `reward`; the three `shapes` ones need prompts of the demo kind
- `noise`: how far the images of a group differ
- your own images: link *Load Image* to Reward Score
"""

USE_THE_LORA = """
# Use the LoRA

Run *quickstart_demo* first: it saves the LoRA that *LoraLoaderModelOnly* loads here. If the list shows another \
number, choose the newest; press **R** when the file is not in the list yet.

Both rows sample the same prompt from the same noise with stock nodes; only the lower one has the LoRA. **Reward \
Score** judges both.

**Expect** more of the pictures below to show what the prompt says, and a higher mean score.

## What to change

- `Prompt` and `Seed`: one place for both rows
- `strength_model`: 0 = no LoRA
- your own model: a LoRA from GRPO Train Loop is an ordinary LoRA, so put *LoraLoaderModelOnly* into the graph you \
use every day
"""

TRAINING_PROMPTS = """\
a lighthouse on a cliff at dusk
a bowl of fruit on a kitchen table
an old street in the rain
a dog running through a meadow
a sailing boat in a harbour
a portrait of an elderly fisherman
a castle above a misty valley
a bicycle leaning against a brick wall
a market stall full of spices
a snowy cabin in the woods
a hot-air balloon over a desert
a cup of coffee beside a book"""
HELD_OUT_PROMPTS = """\
a train crossing a stone bridge
a cat sleeping on a windowsill
a fountain in a town square
a field of sunflowers
a fox in the snow
a wooden boat on a lake"""

WHAT_TO_CHANGE = """
## What to change

- prompts: yours, one per line, or a `.txt` / `.jsonl` file in the `input` folder
- reward: try it first with the workflow *try_a_reward*
- out of memory: lower `train_batch`, then `sample_batch`; neither changes what is learnt. Then `width`, `height`
- `run_name`: a run of that name is continued; other settings need another name

## What to expect

A long run: hours, depending on the card. Try `iterations` 2 first. Cancel keeps everything, and the next Run goes on \
where it stopped. The colourfulness reward is a first test; it can be overdone, so watch the images.
"""

SD35_FILES = """\
## Files

From *stabilityai/stable-diffusion-3.5-medium* on Hugging Face:

- `models/checkpoints/sd3.5_medium.safetensors`
- `models/text_encoders/`: `clip_l`, `clip_g`, `t5xxl_fp16` (or an fp8 version)
"""

FLUX_FILES = """\
## Files

- `models/diffusion_models/flux1-dev.safetensors` and `models/vae/ae.safetensors` from \
*black-forest-labs/FLUX.1-dev* on Hugging Face
- `models/text_encoders/`: `clip_l`, `t5xxl_fp16` (or an fp8 version) from *comfyanonymous/flux_text_encoders*

Less memory: `weight_dtype` fp8_e4m3fn. FLUX.1-dev takes `guidance` as an input (3.5), so `cfg` stays 1.
"""

DEMO_NOTE = """\
No download, no GPU: press **Run**. The tiny model learns to paint more colourful pictures.

## What to expect

About a minute on a CPU that has nothing else to do. The held-out *colourfulness* rises from about 0.5 to {after}. \
*shapes strict* (everything as the prompt says) is only measured, and falls: you get what you reward.

**See what is compared** shows the images of the first prompt before any training: what each of them scored.

## What to change

- `iterations`: more go further
- reward `shapes partial`, `lr` 0.0003, 80 `iterations`: the real task, shapes as the prompt says
- `run_name`, to keep your runs apart
- other methods: all `..._demo` workflows differ only in the nodes and values of the method. The values are those of \
the paper where the tiny model allows it; `clip_range`, `lr` and group sizes are not
"""

CALIBRATE = """
# How much noise does each step bear?

No download, no GPU: press **Run**. Too much noise spoils every image, too little explores nothing. *Calibrate \
Exploration* (DenseGRPO, arXiv 2601.20218) finds for each denoising step the most noise at which about as many images \
gain reward as lose it, and saves it as a table. The second *Dense SDE Sampler* trains with this table.

## What to expect

About a minute of search, then a training of the demo model. The picture shows noise and balance of each step, before \
and after.

## What to change

- reward, model or `num_steps`: each needs a table of its own. `num_steps` and `kernel` of both samplers must agree
- `reuse`: choose the saved table, then nothing is searched again (press **R** when it is not in the list)
- `rounds` and `trajectories`: more of them are surer and slower
"""

REWARD_MIX = """
# Two rewards at once, and a third that keeps watch

No download, no GPU: just press **Run**.

*shapes dense* counts the area of the wanted colours: smooth, but blots of colour earn as much as shapes. *shapes \
partial* asks for shapes, numbers and places. **Combine Rewards** normalises each by itself (`gdpo`), so that neither \
drowns the other. *shapes strict* is **only measured**: it is the guard.

## What to expect

About a minute. *shapes partial* rises a little (0.79 to 0.81), the area with it, and the guard stays within chance \
(0.64 to 0.60). Every 10 iterations the held-out images are compared one by one with the best so far: if a trained \
reward is up while the guard is down, twice in a row and beyond chance, the node says that the reward is being gamed \
and the run stops (`when_gamed`). `keep` *best held-out* hands on the best LoRA, if any beat the untrained model.

## What to change

- link only the *easily gamed* Reward Model to the loop, `lr` 0.003: its score doubles, the guard falls from 0.64 to \
nearly 0, and the run stops at the second evaluation. That is reward hacking
- `weight`: it says how much a reward counts, not how large its scores are. At 0.5 the easy one is all that is learnt
- `when_gamed` warn: see how far it goes
"""

HUMAN_VOTES = """
# You are the reward

No download, no GPU: press **Run**. After a few seconds a panel opens in this page with eight pictures of one prompt.

**Click** (or press **1** to **8**) what you like, right-click or Shift + number what you dislike, **Enter** to send. \
**S** skips, **Stop** ends the run; it can be continued. Another browser tab works too, also on another screen.

## What to expect

Ten rounds. Vote for one thing, such as dark pictures, and look at the last rounds. Nobody votes for 10 minutes: the \
group is skipped, nothing is learnt from it. *shapes strict* is only measured.

## What to change

- `mode` rank: click the pictures in order, best first
- `iterations`, `group_size`: more votes teach more. Your votes are kept with the run, in \
`output/densegrpo/<run_name>/votes`
- link *Combine Rewards* in between, to mix votes with another reward
"""

OCR_TEXT_RENDERING = f"""
# Writing: SD3.5 Medium learns to render text

The reward reads the image (OCR) and compares it with the quoted words of the prompt, as in Flow-GRPO. Reading alone \
would be gamed: plain pages with huge letters score best. So *clipscore* is mixed in, and *pickscore*, which is only \
measured, keeps watch.

{SD35_FILES}
## The rewards

- *ocr*: `pip install rapidocr onnxruntime` into ComfyUI's Python; its models come along
- *clipscore*, *pickscore*: each Reward Model says which files it lacks and the command that gets them

## What to change

- prompts: each needs one text in quotation marks. `densegrpo prompts text --count 500 --out my.jsonl` writes \
a file for the `input` folder
- no PickScore at hand: choose another reward for the node *only measured*
- out of memory: lower `train_batch`, then `sample_batch`

A long run: hours. Try `iterations` 2 first. Reading takes about 0.2 s per image of the processor's time.
"""

GENEVAL_COMPOSITION = f"""
# Composition: SD3.5 Medium learns to count and to place

GenEval's rules: a detector (Mask2Former) finds the objects, CLIP names their colours, and the score is the share of \
counts, colours and places that are right. *pickscore* is only measured and keeps watch over the looks.

{SD35_FILES}
## The rewards

Each Reward Model says which files it lacks and the command that gets them: the detector (0.3 GB), CLIP-L (1.7 GB), \
PickScore (3.9 GB).

## What to change

- prompts: they need GenEval's metadata. `densegrpo prompts geneval --count 5000 --out my.jsonl` writes a file for the \
`input` folder
- remove the link to `probe`: Flow-GRPO, a fifth of the images to score
- out of memory: lower `train_batch`, then `sample_batch`

A long run: hours. Try `iterations` 2 first.
"""
