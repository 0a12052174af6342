"""The commands about rewards and prompts: ``densegrpo rewards``, ``prompts``, ``score``, ``serve`` and ``votes``."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

Add = Callable[[str, object, str], argparse.ArgumentParser]
"""(name, function, what it does) -> the parser of a new command."""
REWARD = "NAME[:OPTION=VALUE,...]"


def add_reward_commands(add: Add) -> None:
    """All of them."""
    rewards = add("rewards", rewards_command, "list the rewards, the files they need and whether these are installed")
    rewards.add_argument("--download", metavar="NAME", help="get the published files of this reward, after asking")
    rewards.add_argument("--yes", action="store_true", help="with --download: do not ask")
    add_prompts(add("prompts", prompts_command, "write prompts with metadata for the rewards geneval and ocr"))
    score = add("score", score_command, "score image files: try a reward before training on it")
    score.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    score.add_argument("--prompt", action="append", help="the prompt of all images; or give it once for each image")
    serve = add("serve", serve_command, "let other programs use local rewards: an example reward server")
    for sub, what in ((score, "repeat it for several"), (serve, "of several, the sum is served, with option weight")):
        text = f"see `densegrpo rewards`; values may have commas; or a JSON object as in a configuration; {what}"
        sub.add_argument("--reward", action="append", required=True, metavar=REWARD, help=text)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=8090, help="port to listen on (default: 8090; 0: any that is free)")
    votes = add("votes", votes_command, "write people's votes of a run as a reward data set")
    votes.add_argument("run", type=Path, help="the run's folder, e.g. runs/demo")


def add_prompts(sub: argparse.ArgumentParser) -> None:
    """The options of ``densegrpo prompts``."""
    what = "geneval: things, counts, colours and places for the reward geneval; text: quoted text for the reward ocr"
    sub.add_argument("kind", choices=("geneval", "text"), help=what)
    sub.add_argument("--count", type=int, required=True, help="how many; no two are equal")
    sub.add_argument("--seed", type=int, default=0, help="another seed, other prompts (default: 0)")
    text = "such as counting=2,colors=1 (default: the usual mix)"
    sub.add_argument("--tags", default="", metavar="TAG[=SHARE],...", help=text)
    text = "a prompt file or built-in list; what is in it is left out"
    sub.add_argument("--without", default="", metavar="FILE", help=text)
    sub.add_argument("--out", type=Path, metavar="FILE.jsonl", help="where to write (default: standard output)")


def rewards_command(options: argparse.Namespace) -> int:
    """``densegrpo rewards``; status 1 when a download was not made."""
    if options.download:
        from .rewards.download import download_reward, typed_yes

        complete = download_reward(options.download, print, lambda question: options.yes or typed_yes(question))
        return 0 if complete else 1
    from .score_files import reward_list

    print(reward_list())
    return 0


def prompts_command(options: argparse.Namespace) -> int:
    """``densegrpo prompts geneval --count N --out file.jsonl``; what is in the file is said beside it."""
    from .checkpoint import write_text
    from .prompt_sets import make_file

    if options.out and options.out.suffix != ".jsonl":
        raise ValueError(f"--out must end in .jsonl, got {options.out}")
    if options.out and not options.out.resolve().parent.is_dir():
        raise ValueError(f"there is no folder {options.out.resolve().parent} for --out; make it first")
    made = make_file(options.kind, options.count, options.seed, options.tags, options.without)
    if options.out:
        write_text(options.out, made.text)
    else:
        print(made.text, end="")
    print(", ".join(f"{count} {tag}" for tag, count in made.counts.items()), file=sys.stderr)
    return 0


def score_command(options: argparse.Namespace) -> int:
    """``densegrpo score IMAGE... --prompt TEXT --reward NAME``; status 1 when a score is missing."""
    from .score_files import parse_reward, score_files

    found = score_files(options.images, options.prompt or [""], [parse_reward(text) for text in options.reward])
    print(found.table())
    for reason in found.reasons:
        print(f"densegrpo: {reason}", file=sys.stderr)
    return 1 if found.reasons else 0


def serve_command(options: argparse.Namespace) -> int:
    """``densegrpo serve --reward NAME``, until Ctrl-C."""
    from .score_files import parse_reward
    from .serve import serve

    try:
        serve([parse_reward(text) for text in options.reward], options.host, options.port, partial(print, flush=True))
    except KeyboardInterrupt:
        print("stopped")
    return 0


def votes_command(options: argparse.Namespace) -> int:
    """``densegrpo votes RUN``."""
    from .votes.store import read_scores, write_scores

    folder = options.run / "votes"
    is_folder = not folder.is_dir() and options.run.name == folder.name  # of the votes, instead of the run's
    path = write_scores(options.run if is_folder else folder)
    scores = read_scores(path)
    print(f"wrote {path}: {len(scores)} images of {len({score.group for score in scores})} groups")
    return 0
