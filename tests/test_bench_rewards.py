"""What ``make bench`` says of rewards: tiny models and images through the same code."""

import re
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from densegrpo.engine import bench, bench_rewards
from densegrpo.engine.bench_rewards import CASES, CPU, Case, Scoring, peak_memory
from densegrpo.engine.protocols import RewardResult
from densegrpo.engine.rewards.clipscore import CLIP_L
from densegrpo.engine.rewards.geneval_detector import DETECTOR
from densegrpo.engine.rewards.imagereward import IMAGE_REWARD
from densegrpo.engine.rewards.ocr import model_files, problem_with
from densegrpo.engine.rewards.pickscore import PICKSCORE
from tiny_reward_models import BERT, DETECTOR_SIZE, PATCH, SIZE, VIT, mask2former_config

PRECISIONS = (torch.float32, torch.bfloat16)
EYES = {**VIT, "image_size": SIZE, "patch_size": PATCH}
TINY = {
    "clip": Case("clip", partial(bench_rewards.clip_network, BERT, EYES, 16), bench_rewards.clip_scoring),
    "siglip": Case("siglip", partial(bench_rewards.siglip_network, **EYES), bench_rewards.siglip_scoring),
    "blip": Case("blip", partial(bench_rewards.blip_network, BERT, EYES), bench_rewards.blip_scoring),
    "detector": Case(
        "detector",
        lambda: bench_rewards.detector_network(**mask2former_config().to_dict()),
        partial(bench_rewards.detector_scoring, size=DETECTOR_SIZE),
        (torch.float32,),
        "cpu",
    ),
}
COST = r"(\d+\.\d\d) ms +(\d+\.\d\d) MB"


@pytest.mark.parametrize("name", TINY)
def test_each_kind_of_model_is_measured_in_each_precision_by_images_at_once(name, capsys):
    bench_rewards.model_table([TINY[name]], CPU, 48, (1, 3))
    printed = capsys.readouterr().out
    assert len(re.findall(r"images at once +[13] +" + COST, printed)) == 2 * len(TINY[name].precisions)
    assert all(float(number) > 0 for row in re.findall(COST, printed) for number in row)
    assert printed.count("bfloat16") == (name != "detector")
    assert printed.count("each new prompt") == 2 * (name == "clip")


def test_weights_are_half_as_large_in_half_precision(capsys):
    case = TINY["clip"]._replace(scoring=lambda model: Scoring(lambda images: images + 1))
    for precision in PRECISIONS:
        bench_rewards.model_row(case, CPU, precision, 16, (1,))
    network = case.network()
    num_bytes = 4 * sum(p.numel() for p in network.parameters())
    whole, half = re.findall(r"weights (\d+) MB", capsys.readouterr().out)
    assert (int(whole), int(half)) == (round(num_bytes / 1e6), round(num_bytes / 2e6))


@pytest.mark.parametrize(
    ("model", "published"),
    [("CLIP-L", CLIP_L.size), ("CLIP-H", PICKSCORE.size), ("BLIP", IMAGE_REWARD.size), ("Mask2Former", DETECTOR.size)],
)
def test_models_have_the_sizes_of_the_published_files(model, published, capsys):
    bench_rewards.size_table([case for case in CASES if case.title.startswith(model)])
    (size,) = re.findall(r"(\d+) MB in float32", capsys.readouterr().out)
    assert f"{int(size) / 1000:.1f} GB" == published


def test_siglip_has_its_400_million_parameters(capsys):
    """The published file also holds an encoder of texts."""
    bench_rewards.size_table([case for case in CASES if "SigLIP" in case.title])
    assert "428 M parameters:  1713 MB in float32,   856 MB in bfloat16" in capsys.readouterr().out


def test_a_new_prompt_is_read_anew_each_time_and_images_do_not_read():
    model = TINY["clip"].network().eval()
    calls = []
    model.text_model.register_forward_hook(lambda *_: calls.append(1))
    scoring = bench_rewards.clip_scoring(model)
    scoring.score(torch.rand(2, 3, 40, 40))
    assert not calls
    for _ in range(3):
        scoring.read(4)
    assert len(calls) == 3


def test_time_and_memory_are_those_of_one_of_them(capsys):
    def work():
        time.sleep(0.08)
        torch.zeros(4 * 10**6)

    milliseconds, megabytes = re.findall(COST, bench_rewards.cost(work, 8, CPU))[0]
    assert 9.9 < float(milliseconds) < 40
    assert float(megabytes) == pytest.approx(16 / 8, abs=0.01)


def test_memory_is_the_most_that_is_held_at_a_time():
    before = torch.ones(10**6)

    def work():
        first = before + 1
        del first
        second = torch.ones(3 * 10**6)
        return second + 1

    assert peak_memory(work, CPU) == pytest.approx(2 * 12e6, abs=100)


def test_memory_of_a_gpu_is_what_was_added_since_the_work_began(monkeypatch):
    state = {"held": 100, "most": 900}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(most=state["held"]))
    assert peak_memory(lambda: state.update(most=350), torch.device("cuda")) == 250


def test_the_profiler_does_not_write_into_the_report(capfd):
    peak_memory(lambda: torch.ones(3), CPU)
    print("later", file=sys.stderr)
    assert capfd.readouterr().err == "later\n"


def test_a_model_that_does_not_fit_is_named_and_the_rest_measured(capsys):
    def score(images):
        if len(images) > 1:
            raise torch.OutOfMemoryError

    case = TINY["siglip"]._replace(scoring=lambda model: Scoring(score))
    bench_rewards.model_row(case, CPU, torch.float32, 16, (1, 4, 1))
    printed = capsys.readouterr().out
    assert "images at once   4: out of memory" in printed
    assert len(re.findall(r"images at once +1 +" + COST, printed)) == 2


def test_rewards_without_a_model_are_measured_at_each_size(capsys):
    bench_rewards.local_table((16, 32), 4)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [re.match(r"  (.*?)  ", line)[1] for line in lines] == list(bench_rewards.WITHOUT_MODEL)
    assert all(re.search(rf"  16 px +{COST} +32 px +{COST}$", line) for line in lines)


def test_what_fails_is_not_measured():
    """It may be fast."""
    batch = bench_rewards.scenes(16, 2)
    with pytest.raises(RuntimeError, match="nothing was measured: no good"):
        bench_rewards.scored(lambda given: RewardResult(torch.rand(2), {}, {1: "no good"}), batch)


def test_scenes_show_what_their_prompts_ask_for():
    """Else the shapes would be found in other numbers than in a real run."""
    from densegrpo.engine.rewards import make_reward

    for size in (64, 512):
        assert make_reward("shapes", score="strict")(bench_rewards.scenes(size, 8)).scores.mean() > 0.8


def test_reading_is_measured_or_it_says_why_not(capsys, monkeypatch):
    if not problem_with(model_files):
        bench_rewards.reading_table((96,))
        assert re.search(r"96 px +\d+\.\d ms$", capsys.readouterr().out.strip())
    monkeypatch.setattr(bench_rewards, "model_files", lambda: (_ for _ in ()).throw(ValueError("no package")))
    bench_rewards.reading_table((96,))
    assert capsys.readouterr().out == "ocr: not measured; no package\n"


def test_a_reward_server_is_measured_with_several_requests_at_a_time_and_ends(capsys, monkeypatch):
    made = []
    make = bench_rewards.make_server
    monkeypatch.setattr(bench_rewards, "make_server", lambda *given: made.append(make(*given)) or made[0])
    bench_rewards.remote_table(32, 6, in_one=2, at_a_time=(1, 3))
    printed = capsys.readouterr().out
    assert re.findall(r"requests at a time (\d+) +-?\d+\.\d ms more", printed) == ["1", "3"]
    assert re.search(r"encoding a PNG file +\d+\.\d ms, 0\.00 MB", printed)
    assert made[0].socket.fileno() == -1


@pytest.mark.parametrize("has_gpu", [True, False])
def test_models_are_timed_on_a_gpu_and_without_one_it_says_what_is_not(has_gpu, capsys, monkeypatch):
    called = []
    for name in ("local_table", "reading_table", "remote_table", "model_table", "size_table", "model_row"):
        monkeypatch.setattr(bench_rewards, name, lambda *given, name=name: called.append((name, *given[1:4])))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    bench_rewards.bench_rewards()
    on_gpu = [("model_table", torch.device("cuda"), 512, (1, 8, 32))]
    on_cpu = [("size_table",), ("model_row", CPU, torch.float32, 512)]
    assert called == [("local_table",), ("reading_table",), ("remote_table",), *(on_gpu if has_gpu else on_cpu)]
    assert ("only CLIP-L/14 is timed" in capsys.readouterr().out) == (not has_gpu)


def test_without_transformers_it_says_that_models_are_not_measured(capsys, monkeypatch):
    for name in ("local_table", "reading_table", "remote_table"):
        monkeypatch.setattr(bench_rewards, name, lambda: None)
    monkeypatch.setattr(bench_rewards, "require_transformers", lambda: (_ for _ in ()).throw(ValueError("get it")))
    bench_rewards.bench_rewards()
    assert capsys.readouterr().out.endswith("rewards with models: not measured; get it\n")


@pytest.mark.parametrize(
    ("words", "measured"), [([], ["demo", "shapes", "rewards"]), (["--only", "rewards"], ["rewards"])]
)
def test_all_or_one_part_is_measured(words, measured, monkeypatch):
    called = []
    for place, part in ((bench, "demo"), (bench_rewards, "rewards"), (bench, "shapes")):
        monkeypatch.setattr(place, f"bench_{part}", lambda part=part: called.append(part))
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    monkeypatch.setattr(bench, "platform", SimpleNamespace(processor=str, machine=str))
    threads = torch.get_num_threads()
    bench.main()
    torch.set_num_threads(threads)
    assert called == measured
